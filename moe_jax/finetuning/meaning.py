"""The options that decide what a model's parameters compute.

These options are the `meaning` of a model, by which models are compared. Two
models whose parameters have equal shapes and whose meanings are equal are the
same function outside of training, except for rounding.
"""

import dataclasses
from typing import Any

from moe_jax import config
from moe_jax.config import KIND, Options, fields_of
from moe_jax.layers.routers.contract import Causality, RouterOptions, Sizes
from moe_jax.layers.routers.token_choice import PUBLISHED_RATE
from moe_jax.models.base import ModelOptions
from moe_jax.models.layer_options import StackOptions

_ENCODER = 'encoder.'


def meaning(options: ModelOptions) -> dict[str, Any]:
  """The options that decide what a model computes, by their dotted names.

  Sizes that one option leaves to another are filled in. Names of an encoder's
  options begin with 'encoder.', and the name of a chosen kind ends with 'kind'.
  Options that only say how something is computed or trained are left out.
  """
  values = _values(options)
  if not options.has_blocks:
    return values
  fields = fields_of(StackOptions)
  values = {
    name: value
    for name, value in values.items()
    if name.split('.')[0] not in fields and not name.startswith(_ENCODER)
  }
  *encoder, decoder = (_layers(half, options.width) for half in options.halves)
  values |= decoder
  for layers in encoder:
    values |= {f'{_ENCODER}{name}': value for name, value in layers.items()}
  return values


def difference(old: ModelOptions, new: ModelOptions) -> dict[str, tuple]:
  """The options in which two models differ, each as (old value, new value).

  A value is None where the model lacks the option.
  """
  return config.difference(meaning(old), meaning(new))


def _layers(half: Any, width: int) -> dict[str, Any]:
  """The options that decide what the layers of an encoder or decoder compute.

  The result is by dotted name, without 'encoder.', and has 'sparse' and 'full',
  which say of each layer whether it is sparse, and whether it attends without a
  window.

  Args:
    half: The options of the encoder or decoder.
    width: M, the width of the layers' input.
  """
  moe = half.moe.within(half.ffn, half.dropout)
  sparse, experts = half.sparse, moe.num_experts > 0
  if experts:
    moe = dataclasses.replace(moe, router=_router(moe.router, moe.sizes))
    if not moe.capacity.binds and not moe.router.by_expert:
      moe = dataclasses.replace(moe, group_size=0)  # groups have no effect
  filled = dataclasses.replace(
    half, attention=half.attention.within(width), moe=moe
  )
  values = _values(filled)
  unused = {'moe.layers', 'num_layers', 'attention.full_layers'}
  if not any(sparse):
    unused |= {name for name in values if name.startswith('moe.')}
  elif all(sparse) and experts and not moe.extra_ffn:
    unused |= {name for name in values if name.startswith('ffn.')}
  values = {k: v for k, v in values.items() if k not in unused}
  return {**values, 'sparse': sparse, 'full': half.full}


def _router(router: Any, sizes: Sizes) -> RouterOptions:
  """A router's options, with defaults of those that change none of its choices.

  The order of slots has no effect with room for all tokens, or with K = 1, as
  there is no second choice. The rate of a balancing bias has an effect only in
  training. `sizes` are those of the layer: E, K, capacity and others.
  """
  names, changes = fields_of(type(router)), {}
  if 'slot_priority' in names:
    queues = Causality.of_queues(sizes, router.slot_priority)
    if queues.leak is None:
      changes['slot_priority'] = 'token_major'
  if 'balance_bias_rate' in names and router.keeps_state:
    changes['balance_bias_rate'] = PUBLISHED_RATE
  return dataclasses.replace(router, **changes)


def _values(options: Options, path: str = '') -> dict[str, Any]:
  values = {}
  for name, field in fields_of(type(options)).items():
    value, kinds = getattr(options, name), field.option.kinds
    if field.option.same_function:
      continue
    if isinstance(value, Options):
      if kinds is not None:
        values[f'{path}{name}.{KIND}'] = kinds.name_of(value)
      values |= _values(value, f'{path}{name}.')
    else:
      values[f'{path}{name}'] = value
  return values
