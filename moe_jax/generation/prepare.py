"""A model as it generates, and its cache before the first step.

Not here: how parameters are laid out for it (`moe_jax.models.decoding`).
"""

import dataclasses
import functools
from typing import Any

import jax
from flax import linen as nn

from moe_jax.generation.prefix import Prefix
from moe_jax.models import Cache, Model, check_generates, router_state
from moe_jax.models.decoding import for_decoding, unstacked
from moe_jax.models.router_state import COLLECTION

Variables = dict[str, Any]


def prepare(
  model: Model, variables: Variables, *, batch_size: int = 1, window: int = 0
) -> tuple[Model, Variables]:
  """The model and variables to generate with, which others pass through.

  Generating prepares what is not prepared, which copies the parameters: who
  generates often does it once, and lets go of the original variables.

  Nothing is dropped, unless a capacity rule of a fixed size ('fixed',
  'fraction') is part of the checkpoint.

  Args:
    model: As trained or imported.
    variables: Its parameters, under 'params', and `router_state` if it has it.
    batch_size: Rows that will be generated together, beams counted: on a CPU
      the fastest layout depends on it, and nothing else does.
    window: How many tokens a decoder's token sees at most, itself among them:
      for going on beyond the rows that a model was trained on, where its
      positions are relative. 0: as the model.

  Raises:
    ValueError: The model does not generate.
  """
  check_generates(model)
  stacks = model.config.stacks
  if stacks and not any(stack.stacked for _, stack in stacks):
    return model, variables
  config = model.config
  for path, stack in config.stacks:
    name = path[-1] if path else 'stack'
    stack = _with_window(stack, window)
    config = dataclasses.replace(config, **{name: stack})
  params = nn.meta.unbox(variables['params'])
  kept = unstacked(model, variables.get(COLLECTION, {}))
  model, params = for_decoding(
    model.clone(config=config), params, batch_size=batch_size
  )
  return model, router_state.variables(params, kept)


def _with_window(stack, window: int):
  # Lengths are whatever the prompts have; not every implementation takes them.
  attention = dataclasses.replace(stack.block.attention, implementation='auto')
  if window and attention.causal:
    window = min(window, attention.window or window)
    attention = dataclasses.replace(attention, window=window)
  block = dataclasses.replace(stack.block, attention=attention)
  return dataclasses.replace(stack, block=block)


@functools.partial(jax.jit, static_argnames=('model', 'num_slots'))
def begin(
  model: Model, variables: Variables, prefix: Prefix, num_slots: int
) -> Cache:
  """The cache with all of the prefix but each row's last token.

  Args:
    model: A prepared model.
    variables: Its variables.
    prefix: P tokens a row.
    num_slots: Of the cache: P - 1 and one a step.
  """
  B, P = prefix.tokens.shape
  if prefix.encoder_tokens is None:
    cache = model.make_cache(B, num_slots)
    pieces = [slice(0, P - 1)] if P > 1 else []
  else:
    cache = model.apply(
      variables,
      prefix.encoder_tokens,
      prefix.encoder_mask,
      num_slots,
      method='encode',
    )
    # A start and forced tokens are steps, as if the model had chosen them:
    # where capacity binds, who shares a step matters.
    pieces = [slice(i, i + 1) for i in range(P - 1)]
  for piece in pieces:
    tokens, mask = prefix.tokens[:, piece], prefix.mask[:, piece]
    _, cache = model.apply(variables, tokens, mask, cache, method='decode')
  return cache
