"""Functions of the running Python's standard library and their docstrings.

TFDS prepares the pairs in the cache, once for each Python. Not here: which
files there are (`python_stdlib.py`).
"""

import ast
import dataclasses
import pathlib
import platform
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from moe_jax.data.cache_folders import cache_root
from moe_jax.data.sources import python_stdlib, tfds_reader
from moe_jax.data.sources.contract import Pairs, Selection, SourceOptions
from moe_jax.options import option

MODULES = python_stdlib.MODULES + python_stdlib.OPTIONAL_MODULES


@dataclasses.dataclass(frozen=True)
class DocstringsSource(SourceOptions):
  """Functions of the standard library without their docstrings, and these."""

  modules: str = option(
    '',
    'Names of the top-level modules and packages whose functions are read, '
    "separated by commas: 'json,email'; '' is all of the standard library.",
  )

  def pairs(self, selection: Selection = Selection()) -> Pairs:
    """A function's source as the inputs, its docstring as the target.

    Raises:
      ValueError: A module is not of the standard library.
    """
    modules = self.modules.split(',') if self.modules else MODULES
    digest = python_stdlib.content_digest(python_stdlib.source_files(modules))
    name = f'python_stdlib_docstrings-{digest[:16]}'
    folder = cache_root(selection.cache_dir) / 'tfds' / name

    def make(data_dir):
      return PythonStdlibDocstrings(
        modules=modules, data_dir=data_dir, file_format='array_record'
      )

    def pairs(split):
      builder = tfds_reader.own_builder(folder, make)
      features = ['inputs', 'targets']
      return tfds_reader.texts(builder, selection.own(split), features)

    label = f'python_stdlib_docstrings{":" * bool(self.modules)}{self.modules}'
    version = PythonStdlibDocstrings.VERSION
    return Pairs(
      f'{label} of Python {platform.python_version()}',
      f'docstrings {version} {digest} {selection.splits}',
      pairs,
    )


class PythonStdlibDocstrings(tfds.core.GeneratorBasedBuilder):
  """TFDS builder with one example a documented function.

  A function is in the split of its file, which a hash of the file's name says.
  """

  VERSION = tfds.core.Version('1.0.0')

  def __init__(
    self,
    *,
    modules: Sequence[str] = MODULES,
    root: pathlib.Path | None = None,
    **kwargs: Any,
  ):
    """Takes the arguments of `source_files` and of every TFDS builder."""
    self._sources = modules, root
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text()
    return tfds.core.DatasetInfo(
      builder=self,
      description="The running Python's standard library, by function.",
      features=tfds.features.FeaturesDict(
        {'inputs': text, 'targets': text, 'name': text}
      ),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    return {s: self._generate_examples(s) for s in ('train', 'validation')}

  def _generate_examples(self, split):
    for name, text in python_stdlib.source_files(*self._sources):
      if split == python_stdlib.split_of(name):
        for line, inputs, targets in documented_functions(text):
          place = f'{name}:{line}'
          yield place, {'inputs': inputs, 'targets': targets, 'name': place}


def documented_functions(text: str) -> Iterator[tuple[int, str, str]]:
  """(line, source without docstring, docstring) of a module's functions.

  Methods and inner functions are functions too. Sources keep decorators and
  comments and lose the indentation of their first line; docstrings lose
  theirs as `inspect.cleandoc` says. Functions of which nothing but the
  docstring is in the body are left out, as are files that do not parse.
  """
  text = text.replace('\r\n', '\n').replace('\r', '\n')
  try:
    tree = ast.parse(text)
  except (SyntaxError, ValueError):
    return
  lines = text.split('\n')
  for node in ast.walk(tree):
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      continue
    docstring = ast.get_docstring(node)
    if docstring and len(node.body) > 1:
      yield node.lineno, _without_docstring(lines, node), docstring


def _without_docstring(
  lines: list[str], node: ast.FunctionDef | ast.AsyncFunctionDef
) -> str:
  docstring = node.body[0]
  first = min(d.lineno for d in [node, *node.decorator_list])
  before = lines[first - 1 : docstring.lineno - 1]
  after = lines[docstring.end_lineno : node.end_lineno]
  # Columns are in bytes of UTF-8.
  head = lines[docstring.lineno - 1].encode()[: docstring.col_offset].decode()
  tail = lines[docstring.end_lineno - 1].encode()[docstring.end_col_offset :]
  rest = head + tail.decode().lstrip().removeprefix(';').lstrip()
  kept = [*before, rest, *after] if rest.strip() else [*before, *after]
  indent = ' ' * node.col_offset
  return '\n'.join(line.removeprefix(indent) for line in kept)
