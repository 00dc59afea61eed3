"""A model as it generates, and its cache before the first step.

Not here: how parameters are laid out for it (`moe_jax.models.decoding`).
"""

import functools
from typing import Any

import jax

from moe_jax.generation.prefix import Prefix
from moe_jax.models import Cache, Model, check_generates

Variables = dict[str, Any]


def prepare(
  model: Model, variables: Variables, *, batch_size: int = 1, window: int = 0
) -> tuple[Model, Variables]:
  """The model and variables to generate with; prepared ones are returned.

  Generating prepares what is not prepared, which copies the parameters: who
  generates often does it once, and lets go of the original variables.

  Nothing is dropped, unless a capacity is part of an imported checkpoint.

  Args:
    model: The model as trained or imported.
    variables: Its parameters, under 'params', and `router_state` if it has it.
    batch_size: The number of rows that will be generated together, beams
      counted: on a CPU the fastest layout depends on it, and nothing else does.
    window: The most tokens that a decoder's token sees, itself among them: for
      going on beyond the rows that a model was trained on, where its positions
      are relative; 0 leaves it to the model.

  Raises:
    ValueError: The model does not generate.
  """
  check_generates(model)
  if model.is_for_decoding:
    return model, variables
  return model.for_decoding(variables, batch_size=batch_size, window=window)


@functools.partial(jax.jit, static_argnames=('model', 'num_slots'))
def begin(
  model: Model, variables: Variables, prefix: Prefix, num_slots: int
) -> Cache:
  """The cache with all of the prefix but each row's last token.

  Args:
    model: A prepared model.
    variables: Its variables.
    prefix: P tokens of each row.
    num_slots: The number of slots of the cache: P - 1, and one for each step.
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
