"""A digest of the code that decides what a run gives: of the package `moe_jax`.

Any change of its text counts, also one of a comment: it is a mark on stored
results, no reason to withhold them.
"""

import functools
import hashlib
import pathlib

import moe_jax


@functools.cache
def digest() -> str:
  """A short hash of the text of all modules of `moe_jax`."""
  folder = pathlib.Path(moe_jax.__file__).parent
  hashed = hashlib.sha256()
  for path in sorted(folder.rglob('*.py')):
    hashed.update(str(path.relative_to(folder)).encode() + b'\0')
    hashed.update(path.read_bytes())
  return hashed.hexdigest()[:12]
