"""Functions of the running Python's standard library and their docstrings.

TFDS prepares the pairs in the cache, once for each Python.
"""

import ast
import dataclasses
import platform
from collections.abc import Iterator
from typing import Any, cast

import tensorflow_datasets as tfds

from moe_jax.data.sources import python_stdlib
from moe_jax.data.sources.contract import Pairs, Selection, SourceOptions
from moe_jax.options import option

MODULES = python_stdlib.MODULES + python_stdlib.OPTIONAL_MODULES


@dataclasses.dataclass(frozen=True)
class DocstringsSource(SourceOptions):
  """Functions of the standard library and, as targets, their docstrings."""

  modules: str = option(
    '',
    'Names of the top-level modules and packages whose functions are read, '
    "separated by commas: 'json,email'; '' is all of the standard library.",
  )

  def pairs(self, selection: Selection = Selection()) -> Pairs:
    """Sources of functions without docstring as inputs, docstrings as targets.

    Raises:
      ValueError: A module is not of the standard library.
    """
    modules = self.modules.split(',') if self.modules else MODULES
    digest = python_stdlib.content_digest(python_stdlib.source_files(modules))
    builder, features = PythonStdlibDocstrings, ['inputs', 'targets']
    label = f'python_stdlib_docstrings{":" * bool(self.modules)}{self.modules}'
    return Pairs(
      f'{label} of Python {platform.python_version()}',
      f'docstrings {builder.VERSION} {digest} {selection.splits}',
      cast(
        Any,
        python_stdlib.reader(builder, modules, digest, selection, features),
      ),
    )


class PythonStdlibDocstrings(python_stdlib.StdlibBuilder):
  """TFDS builder with an example for each documented function."""

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text()
    return tfds.core.DatasetInfo(
      builder=self,
      description="The running Python's standard library, by function.",
      features=tfds.features.FeaturesDict(
        {'inputs': text, 'targets': text, 'name': text}
      ),
    )

  def _examples(self, name, text):
    for line, inputs, targets in documented_functions(text):
      key = f'{name}:{line}'
      yield key, {'inputs': inputs, 'targets': targets, 'name': key}


def documented_functions(text: str) -> Iterator[tuple[int, str, str]]:
  """Yields (line, source without docstring, docstring) for each function.

  Methods and inner functions are included. Sources keep decorators and comments
  and lose the indentation of their first line; docstrings are cleaned as by
  `inspect.cleandoc`. Functions whose body is only a docstring are left out, as
  are files that do not parse.

  Args:
    text: The source of a module.
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
  last = cast(int, docstring.end_lineno) - 1
  tail = lines[last].encode()[docstring.end_col_offset :]
  rest = head + tail.decode().lstrip().removeprefix(';').lstrip()
  source = [*before, rest, *after] if rest.strip() else [*before, *after]
  indent = ' ' * node.col_offset
  return '\n'.join(line.removeprefix(indent) for line in source)
