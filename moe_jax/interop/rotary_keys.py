"""The keys of config.json on rotary positions, read and written.

transformers 5 has one object, `rope_parameters`; version 4 had `rope_scaling`,
`rope_theta` and `partial_rotary_factor`. All four keys are read, and the values
of `rope_parameters` take precedence; `rope_parameters` is written.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from moe_jax.interop.config_keys import (
  AMOUNT,
  LENGTH,
  OPTIONAL_LENGTH,
  OPTIONAL_POSITIVE,
  POSITIVE,
  Values,
  is_kind,
  kind_name,
)
from moe_jax.layers.positions import Positions, Rotary
from moe_jax.layers.rotary import SCALINGS

_ORIGINAL = 'original_max_position_embeddings'
_FRACTION = 'partial_rotary_factor'
# The parameters of rotary positions that most decoders have if the config has
# none.
ROPE: Mapping[str, Any] = {'rope_theta': 10_000.0}
# The keys on rotary positions, besides `max_position_embeddings`: for each the
# type and the default, as in `Keys.honoured`.
KEYS: Mapping[str, tuple[Any, Any]] = {
  'rope_parameters': (dict | None, None),
  'rope_scaling': (dict | None, None),
  'rope_theta': (OPTIONAL_POSITIVE, None),
  _FRACTION: (OPTIONAL_POSITIVE, None),
  _ORIGINAL: (OPTIONAL_LENGTH, None),
}


# For each rope type, its parameters and the types of their values. Our scaling
# has the name of the rope type, 'none' for 'default', and its options have the
# names of the parameters, except the one that `_option` renames.
_TYPES: Mapping[str, Mapping[str, Any]] = {
  'default': {},
  'yarn': {
    _ORIGINAL: LENGTH,
    'factor': POSITIVE,
    'beta_fast': POSITIVE,
    'beta_slow': POSITIVE,
    'truncate': bool,
    'attention_factor': POSITIVE,
    'mscale': AMOUNT,
    'mscale_all_dim': AMOUNT,
  },
  'longrope': {
    _ORIGINAL: LENGTH,
    'factor': POSITIVE,
    'short_factor': list,
    'long_factor': list,
    'short_mscale': POSITIVE,
    'long_mscale': POSITIVE,
  },
}
# For each rope type, the parameters that config.json must have.
_REQUIRED: Mapping[str, set[str]] = {
  'default': set(),
  'yarn': {'factor'},
  'longrope': {'short_factor', 'long_factor', 'short_mscale', 'long_mscale'},
}


def _option(key: str) -> str:
  return 'original_len' if key == _ORIGINAL else key


def problems(
  c: Values, rope: Mapping[str, Any], types: tuple[str, ...]
) -> Iterator[str]:
  """A text for each value on rotary positions that is not supported.

  Args:
    c: The values of config.json.
    rope: The architecture's parameters where the config has none. It has
      `partial_rotary_factor` only if configs may rotate a part of each head.
    types: The rope types that the architecture has, of those in `_TYPES`.
  """
  rope_type, parameters = parameters_of(c, rope)
  if rope_type not in types:
    yield f'rope type {rope_type!r} is not supported, only {" or ".join(types)}'
    return
  if not is_kind(parameters['rope_theta'], POSITIVE):
    yield f'rope_theta={parameters["rope_theta"]!r:.80} is no {POSITIVE.rule}'
  fraction = parameters.get(_FRACTION, 1)
  is_partial = _FRACTION in rope and is_kind(fraction, POSITIVE)
  if not is_partial and fraction != 1:
    yield f'{_FRACTION}={fraction!r:.80} is not supported, only 1'
  known_parameters = _TYPES[rope_type]
  for name, value in parameters.items():
    if name in ('rope_theta', _FRACTION):
      continue
    if name not in known_parameters:
      yield f'{name}={value!r:.80} of rope type {rope_type!r} is not known'
    elif not is_kind(value, known_parameters[name]):
      rule = kind_name(known_parameters[name])
      yield f'{name}={value!r:.80} of rope type {rope_type!r} is no {rule}'
    elif isinstance(value, list) and not all(
      is_kind(number, POSITIVE) for number in value
    ):
      yield f'{name}={value!r:.80} is no list of numbers above 0'
  if missing := sorted(_REQUIRED[rope_type] - parameters.keys()):
    yield f'rope type {rope_type!r} lacks {missing}'


def rotary(
  c: Values, rope: Mapping[str, Any] = ROPE, *, interleaved: bool = False
) -> Rotary:
  """This library's options for the rotary positions of a config.json.

  Args:
    c: The values of config.json, in which `problems` has found no problem.
    rope: The rotary parameters if config.json has none.
    interleaved: Whether the dimensions of a rotating pair are neighbours.
  """
  rope_type, parameters = parameters_of(c, rope)
  scaling: dict[str, Any] = {}
  for name, kind in _TYPES[rope_type].items():
    if isinstance(value := parameters.get(name), list):
      scaling[_option(name)] = tuple(map(float, value))
    elif value is not None:
      # JSON may have an integer for a float.
      is_float = kind in (AMOUNT, POSITIVE)
      scaling[_option(name)] = float(value) if is_float else value
  name = 'none' if rope_type == 'default' else rope_type
  return Rotary(
    theta=float(parameters['rope_theta']),
    interleaved=interleaved,
    fraction=float(parameters.get(_FRACTION, 1)),
    scaling=SCALINGS.get(name)(**scaling),
  )


def rope_parameters(positions: Positions) -> dict[str, Any]:
  """The value of the key `rope_parameters` for the positions of a model.

  Positions that are not rotary get the value of `Rotary()`.
  """
  if not isinstance(positions, Rotary):
    positions = Rotary()
  name = SCALINGS.name_of(positions.scaling)
  rope_type = name if name in _TYPES else 'default'
  parameters: dict[str, Any] = {
    'rope_type': rope_type,
    'rope_theta': positions.theta,
  }
  if positions.fraction != 1:
    parameters[_FRACTION] = positions.fraction
  for key in _TYPES[rope_type]:
    value = getattr(positions.scaling, _option(key))
    # 0 stands for a value that follows from other parameters, and is left out.
    if value or isinstance(value, bool):
      parameters[key] = list(value) if isinstance(value, tuple) else value
  return parameters


def parameters_of(
  c: Values, rope: Mapping[str, Any] = ROPE
) -> tuple[str, dict[str, Any]]:
  """The rope type and its parameters by name in a config.json, unchecked.

  Args:
    c: The values of config.json.
    rope: The architecture's parameters where the config has none.
  """
  theta, fraction = rope['rope_theta'], rope.get(_FRACTION)
  parameters = {**(c.rope_scaling or {}), **(c.rope_parameters or {})}
  if c.rope_parameters is None and c.rope_scaling is None:
    beside = ('rope_theta', _FRACTION)
    parameters = {key: v for key, v in rope.items() if key not in beside}
  old_type = parameters.pop('type', 'default')
  rope_type = str(parameters.pop('rope_type', old_type))
  parameters = {
    key: value for key, value in parameters.items() if value is not None
  }
  for name, value in (
    ('rope_theta', c.rope_theta or theta),
    (_FRACTION, c.partial_rotary_factor or fraction),
  ):
    if value is not None:
      parameters.setdefault(name, value)
  if rope_type not in _TYPES or _ORIGINAL not in _TYPES[rope_type]:
    return rope_type, parameters
  # `original_max_position_embeddings` outside of `rope_parameters` takes
  # precedence, as in Phi's checkpoints.
  longest = c.max_position_embeddings
  original = getattr(c, _ORIGINAL) or parameters.get(_ORIGINAL) or longest
  if original is not None:
    parameters[_ORIGINAL] = original
    if (
      'factor' not in _REQUIRED[rope_type]
      and longest is not None
      and is_kind(original, LENGTH)
    ):
      parameters.setdefault('factor', longest / original)
  return rope_type, parameters
