"""The corpus from Python: source files of the running Python's own library.

Its functions and their docstrings are pairs. TFDS prepares both in the cache,
once for each Python. Tests and installed packages are left out; so are, unless
they are named, packages that distributions leave out (tkinter, idlelib,
ensurepip) and code tables (encodings). Different Pythons give different
corpora: compare results only if the digest is the same.
"""

import abc
import ast
import contextlib
import dataclasses
import functools
import hashlib
import io
import pathlib
import platform
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import tensorflow_datasets as tfds

from moe_jax.config import option, unknown
from moe_jax.data import cache_folders
from moe_jax.data.sources.contract import (
  SPLITS,
  Pairs,
  Selection,
  SourceOptions,
  Texts,
)
from moe_jax.data.sources.tfds import feature_texts
from moe_jax.data.store import Digest
from moe_jax.errors import InputError

# Pure-Python modules and packages of CPython 3.11 to 3.13; 8.2 MB in all.
MODULES = tuple(
  """
  __future__ _collections_abc _compat_pickle _compression _markupbase _py_abc
  _pydatetime _pydecimal _pyio _pylong _pyrepl _sitebuiltins _strptime
  _threading_local _weakrefset abc argparse ast asyncio base64 bdb bisect bz2
  cProfile calendar cmd code codecs codeop collections colorsys compileall
  concurrent configparser contextlib contextvars copy copyreg csv ctypes curses
  dataclasses datetime dbm decimal difflib dis doctest email enum filecmp
  fileinput fnmatch fractions ftplib functools genericpath getopt getpass
  gettext glob graphlib gzip hashlib heapq hmac html http imaplib importlib
  inspect io ipaddress json keyword linecache locale logging lzma mailbox
  mimetypes modulefinder multiprocessing netrc ntpath nturl2path numbers opcode
  operator optparse os pathlib pdb pickle pickletools pkgutil platform plistlib
  poplib posixpath pprint profile pstats pty py_compile pyclbr pydoc pydoc_data
  queue quopri random re reprlib rlcompleter runpy sched secrets selectors
  shelve shlex shutil signal smtplib socket socketserver sqlite3 ssl stat
  statistics string stringprep struct subprocess symtable sysconfig tabnanny
  tarfile tempfile textwrap threading timeit token tokenize tomllib trace
  traceback tracemalloc tty turtle types typing unittest urllib uuid venv
  warnings wave weakref webbrowser wsgiref xml xmlrpc zipapp zipfile zipimport
  zoneinfo
  """.split()  # noqa: SIM905 - 150 quoted lines say no more
)
# Modules that some distributions or later Pythons leave out; they are in the
# corpus only where they are named.
OPTIONAL_MODULES = tuple(
  """
  _aix_support _osx_support asynchat asyncore cgi cgitb chunk crypt distutils
  encodings ensurepip idlelib imghdr imp lib2to3 mailcap nntplib pipes site
  smtpd sndhdr sunau telnetlib this tkinter turtledemo uu xdrlib
  """.split()  # noqa: SIM905
)
ALL_MODULES = MODULES + OPTIONAL_MODULES
_SKIPPED_FOLDERS = {'test', 'tests', 'idle_test', '__pycache__'}
# Divisor and residue: a file is for validation if the hash of its name has this
# residue. Such files have 5 % of the bytes, too, on Python 3.11 to 3.13.
_VALIDATION = 20, 6


@dataclasses.dataclass(frozen=True)
class PythonStdlibSource(SourceOptions):
  """The source files of the running Python's standard library, as texts."""

  modules: str = option(
    '',
    'Names of the top-level modules and packages of the standard library that '
    "are read, separated by commas: 'json,email'; '' is all of the corpus.",
  )
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
      ValueError: A module is not of the standard library, or the files of the
        modules do not give two splits.
    """
    modules = self.modules.split(',') if self.modules else MODULES
    files = list(source_files(modules))
    missing = set(SPLITS) - {split_of(name) for name, _ in files}
    label = f'python_stdlib{":" * bool(self.modules)}{self.modules}'
    if missing:
      raise InputError(
        f'the {len(files)} files of {label} give no split {sorted(missing)} '
        '(one file in 20 is for validation); name more modules'
      )
    digest = content_digest(files)
    read = reader(PythonStdlib, modules, digest, selection, ['text'])
    part = f', {self.train_bytes} bytes' * bool(self.train_bytes)

    def documents(split):
      texts = (text for (text,) in read(split))
      return texts if split != 'train' else first_bytes(texts, self.train_bytes)

    return Texts(
      f'{label} of Python {platform.python_version()}{part}',
      f'{digest} texts {selection.splits}{part}',
      documents,
    )


class StdlibBuilder(tfds.core.GeneratorBasedBuilder):
  """Base of TFDS builders whose examples come from the library's source files.

  An example is in the split of its file, which is found by a hash of the file's
  name and is the same on every machine. A subclass defines `FEATURES`, and
  `_examples`, which makes the examples from a file's name and text.
  """

  FEATURES: tuple[str, ...]
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
    return tfds.core.DatasetInfo(
      builder=self,
      description="The running Python's standard library.",
      features=tfds.features.FeaturesDict(
        dict.fromkeys(self.FEATURES, tfds.features.Text())
      ),
    )

  @abc.abstractmethod
  def _examples(self, name: str, text: str) -> Iterator[tuple[str, Any]]:
    """The examples of a file, each with its key."""

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    return {split: self._generate_examples(split) for split in SPLITS}

  def _generate_examples(self, split):
    for name, text in source_files(*self._sources):
      if split == split_of(name):
        yield from self._examples(name, text)


class PythonStdlib(StdlibBuilder):
  """TFDS builder with an example for each source file."""

  FEATURES = 'text', 'name'

  def _examples(self, name, text):
    yield name, {'text': text, 'name': name}


def reader(
  builder: type[StdlibBuilder],
  modules: Sequence[str],
  digest: str,
  selection: Selection,
  features: Sequence[str],
) -> Callable[[str], Iterator[tuple[str, ...]]]:
  """A function from a split to the texts of its examples' features.

  The builder prepares the examples in the cache when a split is first read.
  """
  name = f'{builder.name}-{cache_folders.FORMAT}-{digest[:16]}'
  folder = selection.cache / 'tfds' / name

  make = functools.partial(builder, modules=modules, file_format='array_record')

  def write(unfinished):
    # TFDS would print the name of this temporary folder, and fill a log with
    # progress bars for half a second's work.
    quiet = io.StringIO()
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
      make(data_dir=unfinished).download_and_prepare()

  def read(split):
    cache_folders.prepared(folder, write, digests=selection.cache_digests)
    made = make(data_dir=folder)
    return feature_texts(made, selection.name_of(split), features)

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
  """The split of a name: 'validation' for about one of 20, else 'train'."""
  divisor, residue = _VALIDATION
  number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
  return 'validation' if number % divisor == residue else 'train'


def content_digest(files: Iterable[tuple[str, str]]) -> str:
  """The sha256 of (name, text) pairs, as `source_files` gives them."""
  digest = Digest()
  for name, text in files:
    digest.split(name)
    digest.text(text.encode())
  return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class DocstringsSource(SourceOptions):
  """Pairs: functions of the standard library, and docstrings as targets."""

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
    modules = self.modules.split(',') if self.modules else ALL_MODULES
    digest = content_digest(source_files(modules))
    builder, features = PythonStdlibDocstrings, ['inputs', 'targets']
    label = f'python_stdlib_docstrings{":" * bool(self.modules)}{self.modules}'
    return Pairs(
      f'{label} of Python {platform.python_version()}',
      f'docstrings {builder.VERSION} {digest} {selection.splits}',
      cast(Any, reader(builder, modules, digest, selection, features)),
    )


class PythonStdlibDocstrings(StdlibBuilder):
  """TFDS builder with an example for each documented function."""

  FEATURES = 'inputs', 'targets', 'name'

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
