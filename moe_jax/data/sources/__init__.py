"""Sources of texts and of pairs of texts.

To add a source, write a file with its `SourceOptions` and list them here.
"""

from moe_jax.config import Kinds
from moe_jax.data.contracts import SourceOptions
from moe_jax.data.sources.django_gettext import GettextSource
from moe_jax.data.sources.files import FilesSource
from moe_jax.data.sources.instructions import InstructionSource
from moe_jax.data.sources.jsonl import JsonlSource
from moe_jax.data.sources.python_stdlib import (
  DocstringsSource,
  PythonStdlibSource,
)
from moe_jax.data.sources.tfds import TfdsSource

SOURCES = Kinds(
  'source',
  SourceOptions,
  {
    'python_stdlib': PythonStdlibSource,
    'files': FilesSource,
    'tfds': TfdsSource,
    'python_stdlib_docstrings': DocstringsSource,
    'django_gettext': GettextSource,
    'instructions': InstructionSource,
    'jsonl': JsonlSource,
  },
)
