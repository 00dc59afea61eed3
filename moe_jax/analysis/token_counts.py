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
from moe_jax.layers.routers.contract import sown_choices
from moe_jax.models import Model
from moe_jax.routing import SlotRouting


def token_counts(
  model: Model, variables: dict[str, Any], batches: Iterable[dict]
) -> dict[int, Int[np.ndarray, 'V E']]:
  """How often each token id chose each expert before drops, by layer.

  Where experts choose: how often each took the token.

  Args:
    model: Only its sparse layers are in the answer.
    variables: Its parameters, under 'params'.
    batches: What the model is trained on.
  """
  if model.moe is None:
    return {}
  layers = model.sparse_layers
  shape = (model.vocab_size, model.moe.num_experts)
  counts = {i: np.zeros(shape, np.int64) for i in layers}
  choose = jax.jit(functools.partial(_choices, model))
  for batch in batches:
    for i, chosen in zip(layers, fetch(choose(variables, batch)), strict=True):
      of = model.sequence_of(i)
      tokens = np.asarray(batch[f'{of}tokens']).reshape(-1)
      real = np.asarray(batch[f'{of}segment_ids']).reshape(-1) > 0
      place, expert = _pairs(chosen, model.moes[i].router.by_expert)
      # Without the groups' padding, then without the rows'.
      inside = place < len(tokens)
      place, expert = place[inside], expert[inside]
      place, expert = place[real[place]], expert[real[place]]
      np.add.at(counts[i], (tokens[place], expert), 1)
  return counts


def _pairs(
  chosen: np.ndarray | SlotRouting, by_expert: bool
) -> tuple[np.ndarray, np.ndarray]:
  """(token, expert) of each choice, tokens counted over all groups."""
  if not by_expert:  # expert_index [G, S, K]
    tokens = np.arange(chosen[..., 0].size)
    return np.repeat(tokens, chosen.shape[-1]), chosen.reshape(-1)
  S = chosen.group_size
  group, expert, slot = np.nonzero(chosen.token_index < S)
  return group * S + chosen.token_index[group, expert, slot], expert


def _choices(model, variables, batch) -> list[jax.Array | SlotRouting]:
  """What the router of each sparse layer chose, in the order of the layers."""
  _, kept = model.apply(
    variables, **model.inputs(batch), mutable=['intermediates']
  )
  layers = model.layer_trees(kept['intermediates'])
  return [sown_choices(layers[i]) for i in model.sparse_layers]
