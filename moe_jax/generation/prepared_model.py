"""Preparation of a model for generation, and of its cache."""

import functools
from typing import Any

import jax

from moe_jax.generation.arguments import (
  check_model,
  check_variables,
  check_whole,
)
from moe_jax.generation.prefix import Prefix
from moe_jax.models import Cache, Model, check_generates
from moe_jax.models.recorded import Apply, Choices, plainly

Variables = dict[str, Any]


def prepare(
  model: Model, variables: Variables, *, batch_size: int = 1, window: int = 0
) -> tuple[Model, Variables]:
  """The model and variables that generate; prepared ones are returned as is.

  `generate` prepares a model if it is not prepared, which copies the
  parameters. To generate several times, do it once and drop the original
  variables. The prepared model drops no tokens, unless an imported checkpoint
  has a capacity of its own.

  Args:
    model: The model as trained or imported.
    variables: Its parameters, under 'params', and `router_state` if it has it.
    batch_size: The number of rows, or beams, that will be generated together;
      on a CPU the fastest layout of parameters depends on it.
    window: The number of tokens up to its own to which a token of the decoder
      attends, for texts longer than rows of training; 0 leaves it to the model.

  Raises:
    ValueError: An argument is of another kind, or the model does not generate.
  """
  check_model(model)
  check_variables(variables)
  check_whole('batch_size', batch_size, 1)
  check_whole('window', window, 0)
  check_generates(model)
  if model.is_for_decoding:
    return model, variables
  return model.for_decoding(variables, batch_size=batch_size, window=window)


@functools.partial(jax.jit, static_argnames=('model', 'num_slots'))
def begin(
  model: Model, variables: Variables, prefix: Prefix, num_slots: int
) -> Cache:
  """The cache of the prefix without each row's last token.

  Args:
    model: A prepared model.
    variables: Its variables.
    prefix: P tokens of each row.
    num_slots: The number of slots of the cache: P - 1, and one for each step.
  """
  return begin_with(plainly, model, variables, prefix, num_slots)[0]


def begin_with(
  apply: Apply,
  model: Model,
  variables: Variables,
  prefix: Prefix,
  num_slots: int,
) -> tuple[Cache, list[Choices]]:
  """The cache of `begin`, and the choices of each call of the model.

  Args:
    apply: Applies the model, and may return choices.
    model, variables, prefix, num_slots: See `begin`.
  """
  B, P = prefix.tokens.shape
  choices = []
  if prefix.encoder_tokens is None:
    cache = model.make_cache(B, num_slots)
    if prefix.task_ids is not None:
      cache = cache.replace(task_ids=prefix.task_ids)
    pieces = [slice(0, P - 1)] if P > 1 else []
  else:
    cache, recorded = apply(
      model,
      variables,
      prefix.encoder_tokens,
      prefix.encoder_mask,
      num_slots,
      task_ids=prefix.task_ids,
      method='encode',
    )
    choices.append(recorded)
    # A start and forced tokens are steps, as if the model had chosen them, as
    # tokens of one step compete for slots where capacity binds.
    pieces = [slice(i, i + 1) for i in range(P - 1)]
  for piece in pieces:
    tokens, mask = prefix.tokens[:, piece], prefix.mask[:, piece]
    (_, cache), recorded = apply(
      model, variables, tokens, mask, cache, method='decode'
    )
    choices.append(recorded)
  return cache, choices
