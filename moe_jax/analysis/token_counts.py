"""Which tokens each expert takes, counted over batches.

Not here: the other router statistics, which every step returns.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from moe_jax.distributed import fetch
from moe_jax.models import Model
from moe_jax.models.pattern import segments


def token_counts(
  model: Model, variables: dict[str, Any], batches: Iterable[dict]
) -> dict[int, Int[np.ndarray, 'V E']]:
  """How often each token id chose each expert before drops, by layer.

  Args:
    model: Only its sparse layers are in the answer.
    variables: Its parameters, under 'params'.
    batches: What the model is trained on.
  """
  moe = model.config.moe
  if moe is None:
    return {}
  layers = [i for i, sparse in enumerate(model.config.sparse) if sparse]
  shape = (model.config.vocab_size, moe.router.num_experts)
  counts = {i: np.zeros(shape, np.int64) for i in layers}
  choose = jax.jit(functools.partial(_choices, model))
  for batch in batches:
    for i, chosen in zip(layers, fetch(choose(variables, batch)), strict=True):
      of = model.config.sequence_of(i)
      tokens = np.asarray(batch[f'{of}tokens']).reshape(-1)
      real = np.asarray(batch[f'{of}segment_ids']).reshape(-1) > 0
      chosen = chosen.reshape(-1, moe.router.num_selected)
      chosen = chosen[: len(tokens)][real]  # without the groups' padding
      ids = np.broadcast_to(tokens[real][:, None], chosen.shape)
      np.add.at(counts[i], (ids, chosen), 1)
  return counts


def _choices(model, variables, batch) -> list[jax.Array]:
  """expert_index of each sparse layer, in the order of the layers."""
  _, kept = model.apply(
    variables, **model.inputs(batch), mutable=['intermediates']
  )
  # Leaves are [periods, G, S, K], one a sparse layer of the period.
  choices = []
  for path, stack in model.config.stacks:
    found = kept.get('intermediates', {})
    for key in path:
      found = found.get(key, {})
    for segment in segments(stack.sparse):
      periods = found.get(segment.name, {})
      names = sorted(periods, key=lambda name: int(name.rsplit('_', 1)[1]))
      stacked = [periods[n]['moe']['router']['expert_index'][0] for n in names]
      choices += [leaf[i] for i in range(segment.repeats) for leaf in stacked]
  return choices
