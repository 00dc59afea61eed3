"""Checks of the arguments of generation: ids, numbers and their ranges."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.errors import InputError
from moe_jax.models import Model
from moe_jax.shape_checks import is_whole

Ids = Sequence[int] | np.ndarray
_MAX = np.iinfo(np.int32).max


def check_whole(
  name: str, value: int, low: int = -_MAX, high: int = _MAX
) -> None:
  """Raises ValueError unless a value is an integer in [low, high]."""
  if not is_whole(value):
    raise InputError(f'{name}={value!r} must be an integer')
  if value < low:
    raise InputError(f'{name}={value} must be at least {low}')
  if value > high:
    raise InputError(f'{name}={value} must be at most {high}')


def check_number(name: str, value: float) -> None:
  """Raises ValueError unless a value is a finite number and no boolean."""
  is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if not is_number or not math.isfinite(value):
    raise InputError(f'{name}={value!r} must be a finite number')


def check_seed(seed: int) -> None:
  """Raises ValueError unless a seed fits into 32 bits without a sign."""
  check_whole('seed', seed, 0, 2**32 - 1)


def check_model(model: Model) -> None:
  """Raises ValueError for anything but a model."""
  if not isinstance(model, Model):
    raise InputError(
      f'model is a {type(model).__name__}; it must be a moe_jax.models.Model, '
      'as the options of a model build it'
    )


def is_list(value: Any) -> bool:
  """Whether a value is a list or an array, not a number and no text."""
  if hasattr(value, 'ndim'):
    return value.ndim > 0
  return hasattr(value, '__len__') and not isinstance(value, str | bytes)


def check_ends(model: Model, stop_ids: Ids, pad_id: int) -> None:
  """Raises ValueError for a wrong model, stop ids or id of padding."""
  check_model(model)
  as_ids('stop_ids', stop_ids, model.vocab_size)
  check_whole('pad_id', pad_id, -_MAX)


def check_variables(variables: dict) -> None:
  """Raises ValueError where there are no parameters under 'params'."""
  if 'params' not in getattr(variables, 'keys', list)():
    names = sorted(variables) if isinstance(variables, dict) else variables
    raise InputError(
      f"variables have no 'params', the parameters of the model; have "
      f'{str(names)[:80]}'
    )


def as_ids(name: str, ids: Ids, count: int, noun: str = 'token') -> np.ndarray:
  """Ids as an array, which may be empty.

  Args:
    name: The name of the argument, for messages.
    ids: The ids.
    count: The number of possible ids, such as the size of a vocabulary.
    noun: The noun for messages, 'token' or 'task'.

  Raises:
    ValueError: The ids are not a list of integers in [0, count).
  """
  if isinstance(ids, str | bytes):
    raise InputError(f'{name}={ids[:40]!r} is text; give its {noun} ids')
  try:
    row = np.asarray(ids)
  except ValueError:  # lists of several lengths
    row = np.empty((0, 0))
  if row.ndim != 1:
    raise InputError(f'{name} has shape {row.shape}; it must be a list of ids')
  if not row.size:
    return row.astype(np.int64)
  if row.dtype.kind not in 'iu':
    raise InputError(
      f'{name} has the value {row.tolist()[0]!r} of type {row.dtype}; '
      f'{noun} ids are integers'
    )
  sizes = 'vocab_size' if noun == 'token' else 'num_tasks'
  bad_ids = row[(row < 0) | (row >= count)]
  if bad_ids.size:
    raise InputError(f'{name}: {noun} {bad_ids[0]} not in [0, {sizes}={count})')
  return row.astype(np.int64)
