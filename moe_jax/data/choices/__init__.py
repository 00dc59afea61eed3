"""Sources of questions with several answers, of which one is right.

To add a source, write a file with its `ChoiceSourceOptions` and list them here.
"""

from moe_jax.data.choices.choice_files import ChoiceFilesSource
from moe_jax.data.choices.choice_tfds import ChoiceTfdsSource
from moe_jax.data.choices.contract import ChoiceSourceOptions, SameSource
from moe_jax.data.choices.docstring_choice import DocstringChoiceSource
from moe_jax.options import Kinds

CHOICE_SOURCES = Kinds(
  'source of choices',
  ChoiceSourceOptions,
  {
    'docstring_choice': DocstringChoiceSource,
    'files': ChoiceFilesSource,
    'tfds': ChoiceTfdsSource,
  },
)
# Sources of the examples that are put before a question.
SHOTS_SOURCES = Kinds(
  'source of examples',
  ChoiceSourceOptions,
  {'same': SameSource, **CHOICE_SOURCES.builtin},
)
