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
from moe_jax.models import LstmLm, Model
from moe_jax.models.pattern import segments
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
      place, expert = _pairs(chosen)
      # Without the groups' padding, then without the rows'.
      inside = place < len(tokens)
      place, expert = place[inside], expert[inside]
      place, expert = place[real[place]], expert[real[place]]
      np.add.at(counts[i], (tokens[place], expert), 1)
  return counts


def _pairs(chosen) -> tuple[np.ndarray, np.ndarray]:
  """(token, expert) of each choice, tokens counted over all groups."""
  if not isinstance(chosen, SlotRouting):  # expert_index [G, S, K]
    tokens = np.arange(chosen[..., 0].size)
    return np.repeat(tokens, chosen.shape[-1]), chosen.reshape(-1)
  S = chosen.group_size
  group, expert, slot = np.nonzero(chosen.token_index < S)
  return group * S + chosen.token_index[group, expert, slot], expert


def _choices(model, variables, batch) -> list[jax.Array | SlotRouting]:
  """What each sparse layer's router sowed, in the order of the layers."""
  _, kept = model.apply(
    variables, **model.inputs(batch), mutable=['intermediates']
  )
  choices = []
  if isinstance(model, LstmLm):
    layers = [i for i, sparse in enumerate(model.config.sparse) if sparse]
    for i in layers:
      found = kept['intermediates'][f'layers_{i}']['moe']['router']
      ((one,),) = found.values()
      choices.append(one)
  # Leaves are [periods, G, ...], one a sparse layer of the period.
  for path, stack in model.config.stacks:
    found = kept.get('intermediates', {})
    for key in path:
      found = found.get(key, {})
    for segment in segments(stack.sparse):
      periods = found.get(segment.name, {})
      names = sorted(periods, key=lambda name: int(name.rsplit('_', 1)[1]))
      # A router sows one thing: its choices, or who is in its slots.
      sown = [periods[n]['moe']['router'].values() for n in names]
      stacked = [one for ((one,),) in sown]
      choices += [
        jax.tree.map(lambda leaf, i=i: leaf[i], own)
        for i in range(segment.repeats)
        for own in stacked
      ]
  return choices
