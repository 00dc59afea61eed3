"""A user's own classes, which a config names as 'module:name'."""

import hashlib
import importlib
import importlib.util
import pathlib
import traceback
from collections.abc import Iterable, Mapping
from typing import Any

import ml_collections

from moe_jax.errors import InputError

_MOE_JAX = 'moe_jax'


def load(name: str, noun: str, base: type) -> type:
  """The class that 'module:name' names.

  Args:
    name: An importable module and a class in it, 'package.module:Class'.
    noun: The noun for the class in messages: 'router'.
    base: The class that it has to extend.

  Raises:
    ValueError: The module cannot be imported, has no such class, or the class
      does not keep the contract: it does not extend `base`, is no dataclass, or
      lacks a method that every class of the contract defines.
  """
  module_name, _, attribute = name.partition(':')
  try:
    module = importlib.import_module(module_name)
  except Exception as error:
    lines = [
      f'{frame.filename}, line {frame.lineno}: {frame.line}: '
      for frame in traceback.extract_tb(error.__traceback__)[1:]
      if 'importlib' not in frame.filename
    ]
    kind = '' if isinstance(error, ImportError) else f'{type(error).__name__}: '
    raise InputError(
      f'{noun} {name!r} cannot be imported: {"".join(lines[:1])}{kind}{error}'
    ) from error
  cls = getattr(module, attribute, None)
  if cls is None:
    raise InputError(f'{noun} {name!r}: {module_name} has no {attribute!r}')
  if not (isinstance(cls, type) and issubclass(cls, base)):
    raise InputError(
      f'{noun} {name!r} does not extend {base.__module__}.{base.__name__}'
    )
  _check_contract(f'{noun} {name!r}', cls, base)
  return cls


def _check_contract(label: str, cls: type, base: type) -> None:
  """Raises ValueError for a class that does not keep the contract `base`."""
  if '__dataclass_fields__' not in vars(cls):
    raise InputError(
      f'{label} is no dataclass, so that its options are unknown; put '
      '@dataclasses.dataclass(frozen=True) above it'
    )
  missing = [
    name
    for name in dir(base)
    if getattr(getattr(base, name), 'is_required', False)
    and getattr(cls, name) is getattr(base, name)
  ]
  if missing:
    raise InputError(
      f'{label} does not define {", ".join(missing)}, which '
      f'{base.__module__}.{base.__name__} asks of it'
    )


def check_allowed(names: Iterable[str], allowed: Iterable[str]) -> None:
  """Raises ValueError for a class that a folder names and the user forbids.

  Names in a config file or on the command line are the user's own; a folder
  may have been written by somebody else, and importing runs code.

  Args:
    names: Names of classes, 'module:name'.
    allowed: Modules and packages that the user allows.
  """
  allowed = {_MOE_JAX, *allowed}
  for name in names:
    module = name.partition(':')[0]
    parents = module.split('.')
    if not any(
      '.'.join(parents[: i + 1]) in allowed for i in range(len(parents))
    ):
      raise InputError(
        f'{name!r} stands in a folder that was read, and its module is not '
        f'allowed; if you trust it, pass --allow_module={module}'
      )


def names_in(
  config: Mapping[str, Any] | ml_collections.ConfigDict,
) -> tuple[str, ...]:
  """The users' classes that a config names, sorted.

  Args:
    config: A config, or a section of one, as nested mappings.
  """
  names = set()
  for key, value in config.items():
    if isinstance(value, Mapping | ml_collections.ConfigDict):
      names.update(names_in(value))
    elif key == 'kind' and isinstance(value, str) and ':' in value:
      names.add(value)
  return tuple(sorted(names))


def digests(names: Iterable[str]) -> dict[str, str]:
  """The sha256 of the file of each class, by its name.

  Modules of this package are left out: their version is that of the package.

  Raises:
    ValueError: A module has no file.
  """
  sha256 = {}
  for name in names:
    module = name.partition(':')[0]
    if module.split('.')[0] == _MOE_JAX:
      continue
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
      raise InputError(f'{name!r}: {module} has no file')
    data = pathlib.Path(spec.origin).read_bytes()
    sha256[name] = hashlib.sha256(data).hexdigest()
  return sha256
