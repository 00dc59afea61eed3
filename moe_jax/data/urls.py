"""Files and folders at URLs, such as `gs://bucket/books`, read by fsspec.

fsspec reads `gs://` with gcsfs, `s3://` with s3fs and `hf://` with
huggingface_hub, which are packages that have to be installed, too.
"""

import glob
import os
import pathlib
from collections.abc import Sequence

import fsspec
from upath import UPath

from moe_jax.errors import InputError

Path = pathlib.Path | UPath  # of a file of this machine, or of one at a URL
LIST = 'files.json'  # name of the list of a folder's files, written last


def is_url(path: str | os.PathLike[str]) -> bool:
  """Whether a path is a URL, not a path of this machine's file system."""
  return '://' in str(path)


def without_protocol(path: str) -> str:
  """The path that a URL has within its file system; any other path as it is."""
  return fsspec.core.url_to_fs(path)[1] if is_url(path) else path


def matching(pattern: str) -> Sequence[Path]:
  """The files that match a pattern, each once, sorted; '~' is the home folder.

  Raises:
    ValueError: No file matches.
  """
  if is_url(pattern):
    files = _file_system(pattern)
    names = sorted(filter(files.isfile, files.glob(pattern)))
    paths = [UPath(files.unstrip_protocol(str(name))) for name in names]
    where = ''
  else:
    pattern = os.path.expanduser(pattern)
    # Where a pattern fits a path in several ways, glob finds it several times.
    names = sorted(set(glob.glob(pattern, recursive=True)))
    paths = [pathlib.Path(name) for name in names if os.path.isfile(name)]
    where = f' in {os.getcwd()}'
  if not paths:
    raise InputError(f'no file matches {pattern!r}{where}')
  return paths


def stamp_of(path: Path) -> list:
  """A list that changes with a file: its size, its times and its inode.

  For a file at a URL the list has the size, and the key by which fsspec tells
  versions of the file apart.
  """
  if not isinstance(path, pathlib.Path):
    return [path.stat().st_size, path.fs.ukey(path.path)]
  stat = path.stat()
  return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def upload(folder: pathlib.Path, url: str) -> None:
  """Copies the files of a folder to a URL; the file `LIST` comes last."""
  files = _file_system(url)
  names = [p.relative_to(folder).as_posix() for p in folder.rglob('*')]
  for name in sorted(names, key=lambda name: name == LIST):
    if (folder / name).is_file():
      target = f'{url}/{name}'
      files.makedirs(target.rpartition('/')[0], exist_ok=True)
      files.put_file(str(folder / name), target)


def fetch(url: str, folder: pathlib.Path) -> bool:
  """Copies a folder that `upload` has copied to a URL.

  Returns:
    Whether the URL has the folder; if its file `LIST` is missing, the upload is
    not complete, and nothing is copied.
  """
  files = _file_system(url)
  if not files.exists(f'{url}/{LIST}'):
    return False
  files.get(f'{url}/', f'{folder}/', recursive=True)
  return True


def _file_system(url: str) -> fsspec.AbstractFileSystem:
  try:
    return fsspec.core.url_to_fs(url)[0]
  except (ImportError, ValueError) as error:
    raise InputError(f'{url} cannot be read: {error}') from None
