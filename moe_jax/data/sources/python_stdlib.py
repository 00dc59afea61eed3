"""The corpus from Python: source files of the running Python's own library.

A second source gives the library's functions and their docstrings as pairs.
Tests and installed packages are left out. The source of texts has modules that
some distributions lack (tkinter, idlelib) or that are tables (encodings) only
if they are named. Different Pythons give different corpora: compare results
only if the digest is the same.
"""

import ast
import dataclasses
import functools
import hashlib
import pathlib
import platform
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

import tensorflow_datasets as tfds

from moe_jax.config import option, unknown
from moe_jax.data.contracts import (
  SPLITS,
  Pair,
  Pairs,
  Selection,
  SourceOptions,
  Texts,
)
from moe_jax.data.store import Digest
from moe_jax.errors import InputError

T = TypeVar('T')
# Modules that some distributions or later Pythons leave out. The source of
# texts reads them only if its option `modules` names them; the source of
# docstrings reads them unasked, where they are there.
OPTIONAL_MODULES = tuple(
  """
  _aix_support _osx_support asynchat asyncore cgi cgitb chunk crypt distutils
  encodings ensurepip idlelib imghdr imp lib2to3 mailcap nntplib pipes site
  smtpd sndhdr sunau telnetlib this tkinter turtledemo uu xdrlib
  """.split()  # noqa: SIM905
)
# Modules that are never in the corpus; nearly all of them exist on one platform
# or in two versions of Python only.
_NO_MODULES = set(
  """
  _android_support _apple_support _bootsubprocess _colorize _ios_support
  _opcode_metadata aifc antigravity sre_compile sre_constants sre_parse
  """.split()  # noqa: SIM905
)
# Modules and packages of the running Python; those that are written in C have
# no source files. On CPython 3.11 to 3.13 they give 8.2 MB in all.
MODULES = tuple(
  sorted(sys.stdlib_module_names - _NO_MODULES - set(OPTIONAL_MODULES))
)
ALL_MODULES = MODULES + OPTIONAL_MODULES
_SKIPPED_FOLDERS = {'test', 'tests', 'idle_test', '__pycache__'}
# Sources and questions that are made from the library have the same option.
MODULES_OPTION: Any = option(
  '',
  'Names of the top-level modules and packages of the standard library that '
  "are read, separated by commas: 'json,email'; '' is all that the source has.",
)


@dataclasses.dataclass(frozen=True)
class PythonStdlibSource(SourceOptions):
  """The source files of the running Python's standard library, as texts."""

  modules: str = MODULES_OPTION
  train_bytes: int = option(
    0,
    'Number of bytes of the training split that are read, its first ones in '
    'the order of the prepared corpus; the last text is cut, and of a smaller '
    'split all is read. 0 reads all.',
    minimum=0,
  )

  def texts(self, selection: Selection = Selection()) -> Texts:
    """A document for each file; about one file in 20 is for validation.

    Raises:
      ValueError: A module is not of the standard library.
    """
    modules = self.modules.split(',') if self.modules else MODULES
    files = list(source_files(modules))
    label = f'python_stdlib{":" * bool(self.modules)}{self.modules}'
    read = _reader(files, lambda name, text: [(name, text)], selection)
    part = f', {self.train_bytes} bytes' * bool(self.train_bytes)
    num_bytes = {'train': self.train_bytes, 'validation': 0}
    return Texts(
      f'{label} of Python {platform.python_version()}{part}',
      f'{content_digest(files)} texts {selection.splits}{part}',
      lambda split: first_bytes(read(split), num_bytes[split]),
    )


@dataclasses.dataclass(frozen=True)
class DocstringsSource(SourceOptions):
  """Pairs of the standard library's functions and their docstrings."""

  modules: str = MODULES_OPTION

  def pairs(self, selection: Selection = Selection()) -> Pairs:
    """Pairs of the code of a function, less its docstring, and the docstring.

    The functions of a file are in the split of the file.

    Raises:
      ValueError: A module is not of the standard library.
    """
    modules = self.modules.split(',') if self.modules else ALL_MODULES
    files = list(source_files(modules))
    label = f'python_stdlib_docstrings{":" * bool(self.modules)}{self.modules}'

    def examples(name: str, text: str) -> Iterator[tuple[str, Pair]]:
      for line, source, docstring in documented_functions(text):
        yield f'{name}:{line}', (source, docstring)

    return Pairs(
      f'{label} of Python {platform.python_version()}',
      f'docstrings 1.0.0 {content_digest(files)} {selection.splits}',
      _reader(files, examples, selection),
    )


def _reader(
  files: Sequence[tuple[str, str]],
  examples: Callable[[str, str], Iterable[tuple[str, T]]],
  selection: Selection,
) -> Callable[[str], Iterator[T]]:
  """A function from 'train' or 'validation' to the examples of the split.

  The selection may name any split expression of TFDS, such as 'train[90%:]'.

  Args:
    files: Name and text of each file; the name decides the file's split.
    examples: Function from name and text to the examples of a file, each with
      a key of its own; a hash of keys orders the examples of a split, as in
      TFDS.
    selection: The splits.
  """

  @functools.cache
  def whole(split: str) -> list[T]:
    """All examples of 'train' or of 'validation'."""
    by_hash = {
      hashlib.md5(f'{split}{key}'.encode()).digest(): example
      for name, text in files
      if split_of(name) == split
      for key, example in examples(name, text)
    }
    return [example for _, example in sorted(by_hash.items())]

  def read(split: str) -> Iterator[T]:
    name = selection.name_of(split)
    if name in SPLITS:  # the other split need not be made
      return iter(whole(name))
    infos = {s: tfds.core.SplitInfo(s, [len(whole(s))], 0) for s in SPLITS}
    try:
      parts = tfds.core.ReadInstruction.from_spec(name).to_absolute(infos)
    except ValueError as error:
      raise InputError(
        f'unknown split {name!r} of the standard library; have {[*SPLITS]} and '
        f'parts of them ({error})'
      ) from error
    return (e for p in parts for e in whole(p.splitname)[p.from_ : p.to])

  return read


def source_files(
  modules: Sequence[str] = MODULES, root: pathlib.Path | None = None
) -> Iterator[tuple[str, str]]:
  """Yields (relative name, text) for each source file, in order of name.

  Names are posix paths such as `json/decoder.py`. Modules that this Python
  lacks and files that are not UTF-8 are left out.

  Args:
    modules: Top-level modules and packages from `MODULES` or
      `OPTIONAL_MODULES`.
    root: The standard library's folder; None is that of the running Python.

  Raises:
    ValueError: A module is in neither list.
  """
  for module in modules:
    if module not in ALL_MODULES:
      raise unknown('standard-library module', module, ALL_MODULES)
  root = root or pathlib.Path(sysconfig.get_path('stdlib'))
  paths = {}
  for module in set(modules):
    for path in [root / f'{module}.py', *(root / module).rglob('*.py')]:
      name = path.relative_to(root)
      if path.is_file() and not _SKIPPED_FOLDERS & set(name.parts):
        paths[name.as_posix()] = path
  for name, path in sorted(paths.items()):
    try:
      yield name, path.read_bytes().decode()
    except UnicodeDecodeError:
      continue


def first_bytes(texts: Iterable[str], num_bytes: int) -> Iterator[str]:
  """The first texts, `num_bytes` bytes of UTF-8 in all; 0 takes all texts.

  The last text is cut; a character that the cut would split is left out.
  """
  bytes_left = num_bytes
  for text in texts:
    content = text.encode()
    yield content[:bytes_left].decode(errors='ignore') if num_bytes else text
    bytes_left -= len(content)
    if num_bytes and bytes_left <= 0:
      return


def split_of(name: str) -> str:
  """'validation' for about one in 20 names or texts, by hash, else 'train'."""
  number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
  # With the residue 6, the validation files of the standard library have 5 % of
  # its bytes, too, on Python 3.11 to 3.13.
  return 'validation' if number % 20 == 6 else 'train'


def content_digest(files: Iterable[tuple[str, str]]) -> str:
  """The sha256 of (name, text) pairs, as `source_files` gives them."""
  digest = Digest()
  for name, text in files:
    digest.split(name)
    digest.text(text.encode())
  return digest.hexdigest()


@functools.cache  # as parsing all of the library takes seconds
def documented_functions(text: str) -> list[tuple[int, str, str]]:
  """The (line, source without docstring, docstring) of each function.

  Methods and inner functions are included. Sources keep decorators and comments
  and lose the indentation of their first line; docstrings are cleaned as by
  `inspect.cleandoc`. Functions whose body is only a docstring are left out, as
  are files that do not parse.
  """
  text = text.replace('\r\n', '\n').replace('\r', '\n')
  try:
    tree = ast.parse(text)
  except (SyntaxError, ValueError):
    return []
  functions, lines = [], text.split('\n')
  for node in ast.walk(tree):
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      continue
    docstring = ast.get_docstring(node)
    if docstring and len(node.body) > 1:
      source = _without_docstring(lines, node)
      functions.append((node.lineno, source, docstring))
  return functions


def _without_docstring(
  lines: list[str], node: ast.FunctionDef | ast.AsyncFunctionDef
) -> str:
  docstring = node.body[0]
  first = min(d.lineno for d in [node, *node.decorator_list])
  before = lines[first - 1 : docstring.lineno - 1]
  after = lines[docstring.end_lineno : node.end_lineno]
  # Python's parser counts columns in bytes of UTF-8.
  head = lines[docstring.lineno - 1].encode()[: docstring.col_offset].decode()
  last = cast(int, docstring.end_lineno) - 1
  tail = lines[last].encode()[docstring.end_col_offset :]
  rest = head + tail.decode().lstrip().removeprefix(';').lstrip()
  source = [*before, rest, *after] if rest.strip() else [*before, *after]
  indent = ' ' * node.col_offset
  return '\n'.join(line.removeprefix(indent) for line in source)
