"""Functions of the running Python's standard library, for tasks on code.

Not here: the tasks (`code_reading.py`, `code_writing.py`).
"""

import ast
import functools
import hashlib
import platform
import re
from collections.abc import Iterator
from typing import NamedTuple

from moe_jax.data.sources.python_stdlib import content_digest, source_files
from moe_jax.data.sources.python_stdlib_docstrings import documented_functions

# Pure-Python modules of CPython 3.11 to 3.13 with short, documented functions.
MODULES = tuple(
  """
  argparse ast asyncio bisect calendar codecs collections colorsys concurrent
  configparser contextlib copy csv datetime difflib email fnmatch fractions
  functools gettext glob heapq http imaplib importlib inspect ipaddress json
  locale logging mailbox netrc optparse os pathlib pickletools pprint queue
  random sched selectors shlex shutil smtplib socket statistics string
  subprocess symtable tarfile tempfile textwrap threading turtle types typing
  unittest urllib uuid wave weakref xml xmlrpc zipfile
  """.split()  # noqa: SIM905
)
# Characters of the longest function and summary; a row of 256 bytes has room
# for an instruction, a function and an answer.
_LONGEST, _LONGEST_SUMMARY = 140, 72
_SCOPES = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef


class Function(NamedTuple):
  """A function of the library.

  Attributes:
    source: Its source without docstring and decorators.
    name: Its name.
    num_arguments: Number of its arguments, without `self` and `cls`.
    returns: Whether a return of its own has a value other than None.
    summary: The first line of its docstring, of two words or more.
  """

  source: str
  name: str
  num_arguments: int
  returns: bool
  summary: str


@functools.cache
def functions() -> tuple[Function, ...]:
  """The short functions that have a docstring, each source once."""
  by_source = {}
  for _, text in source_files(MODULES):
    for _, source, docstring in documented_functions(text):
      summary = docstring.strip().split('\n')[0].strip()
      fits = len(source) <= _LONGEST and len(summary) <= _LONGEST_SUMMARY
      # A symbol or a lone word, as some docstrings are, describes nothing.
      if fits and len(summary.split()) > 1:
        function = function_of(source, summary)
        if function is not None:
          by_source.setdefault(function.source, function)
  # A hash orders them, which does not depend on the modules' names.
  return tuple(
    sorted(
      by_source.values(),
      key=lambda f: hashlib.sha256(f.source.encode()).digest(),
    )
  )


@functools.cache
def shorter(source: int, name: int, summary: int) -> tuple[Function, ...]:
  """The functions with at most so many characters in these parts."""
  return tuple(
    f
    for f in functions()
    if len(f.source) <= source
    and len(f.name) <= name
    and len(f.summary) <= summary
  )


@functools.cache
def digest() -> str:
  """A text that is equal only for equal functions."""
  sources = content_digest(source_files(MODULES))
  return f'Python {platform.python_version()} {sources}'


def function_of(source: str, summary: str) -> Function | None:
  """The function of a source.

  None if it does not parse by itself, or is a generator or asynchronous, of
  which it is unclear what it returns.
  """
  start = re.search(r'^(async )?def ', source, re.MULTILINE)
  source = source[start.start() :].rstrip() if start else source
  try:
    node = ast.parse(source).body[0]
  except (SyntaxError, IndexError):
    return None
  if not isinstance(node, ast.FunctionDef):
    return None
  arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
  counted = [arg for arg in arguments if arg.arg not in ('self', 'cls')]
  starred = [arg for arg in (node.args.vararg, node.args.kwarg) if arg]
  nodes = list(_own_nodes(node))
  if any(isinstance(below, ast.Yield | ast.YieldFrom) for below in nodes):
    return None
  returned = [below.value for below in nodes if isinstance(below, ast.Return)]
  returns = any(v and ast.unparse(v) != 'None' for v in returned)
  return Function(
    source, node.name, len(counted) + len(starred), returns, summary
  )


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
  """All nodes below one, without those of inner functions and classes."""
  for below in ast.iter_child_nodes(node):
    yield below
    if not isinstance(below, _SCOPES):
      yield from _own_nodes(below)
