"""The embedded corpus: the running Python's own standard library, as a TFDS
builder.

Not here: tests and whatever was installed; nor, unless named, packages that
distributions leave out (tkinter, idlelib, ensurepip) and code tables
(encodings). Two Pythons give two corpora: compare results only where the
digest is the same.
"""

import hashlib
import pathlib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from moe_jax.config import unknown
from moe_jax.data.store import Digest

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
# What some distributions leave out, or later Pythons: not in the corpus unless
# named.
OPTIONAL_MODULES = tuple(
  """
  _aix_support _osx_support asynchat asyncore cgi cgitb chunk crypt distutils
  encodings ensurepip idlelib imghdr imp lib2to3 mailcap nntplib pipes site
  smtpd sndhdr sunau telnetlib this tkinter turtledemo uu xdrlib
  """.split()  # noqa: SIM905
)
_SKIPPED_FOLDERS = {'test', 'tests', 'idle_test', '__pycache__'}
# Of the twenty residues, one whose files hold 5 % of the bytes as well, on
# 3.11 to 3.13.
_VALIDATION = 20, 6


class PythonStdlib(tfds.core.GeneratorBasedBuilder):
  """One example a source file; about one file in 20 is for validation.

  A file's split is a hash of its name, the same on every machine.
  """

  VERSION = tfds.core.Version('1.0.0')

  def __init__(
    self,
    *,
    modules: Sequence[str] = MODULES,
    root: pathlib.Path | None = None,
    **kwargs: Any,
  ):
    """Args as `source_files`, and those of every TFDS builder."""
    self._sources = modules, root
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="The running Python's standard library, by source file.",
      features=tfds.features.FeaturesDict(
        {'text': tfds.features.Text(), 'name': tfds.features.Text()}
      ),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # nothing is downloaded
    return {s: self._generate_examples(s) for s in ('train', 'validation')}

  def _generate_examples(self, split):
    for name, text in source_files(*self._sources):
      if split == split_of(name):
        yield name, {'text': text, 'name': name}


def source_files(
  modules: Sequence[str] = MODULES, root: pathlib.Path | None = None
) -> Iterator[tuple[str, str]]:
  """(relative name, text) of each source file, in order of name.

  Names are posix paths such as `json/decoder.py`. Modules this Python lacks
  and files that are not UTF-8 are passed over.

  Args:
    modules: Top-level modules and packages, of `MODULES` or
      `OPTIONAL_MODULES`.
    root: The standard library's folder; None for the running Python's.

  Raises:
    ValueError: A module is of neither.
  """
  known = MODULES + OPTIONAL_MODULES
  for module in modules:
    if module not in known:
      raise unknown('standard-library module', module, known)
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


def split_of(name: str) -> str:
  """'validation' for about one name in 20, else 'train'."""
  divisor, residue = _VALIDATION
  number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
  return 'validation' if number % divisor == residue else 'train'


def content_digest(files: Iterable[tuple[str, str]]) -> str:
  """The sha256 of (name, text) pairs, such as `source_files` gives."""
  digest = Digest()
  for name, text in files:
    digest.split(name)
    digest.text(text.encode())
  return digest.hexdigest()
