"""The choices of experts by tokens, one by one, and counts of them by token.

Not here: the sums that every step returns (`moe_jax.routing.stats`).
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from moe_jax.distributed import fetch
from moe_jax.layers.routers.contract import sown_choices
from moe_jax.models import Model
from moe_jax.routing import SlotRouting
from moe_jax.shapes import Leaf

Batch = Mapping[str, Leaf]


class Choices(NamedTuple):
  """The choices in one sparse layer and one batch, before any is dropped.

  Padding has no choices. Where experts choose tokens, they are the experts'.

  Attributes:
    position: int [N], the position of each choice's token in the batch, counted
      over all rows.
    token: int [N], the id of the token.
    expert: int [N], the number of the expert.
  """

  position: np.ndarray
  token: np.ndarray
  expert: np.ndarray


def choices(
  model: Model, variables: dict[str, Any], batches: Iterable[Batch]
) -> Iterator[dict[int, Choices]]:
  """The choices in each batch, by the number of the sparse layer.

  Args:
    model: A model; layers without experts have no choices.
    variables: Its parameters, under 'params', and its router state if it has
      any.
    batches: Batches as the model is trained on.
  """
  layers = model.sparse_layers
  choose = jax.jit(functools.partial(_sown, model))
  for batch in batches:
    sown = fetch(choose(variables, batch)) if layers else []
    yield {
      layer: _choices(model, layer, chosen, batch)
      for layer, chosen in zip(layers, sown, strict=True)
    }


def token_counts(
  model: Model, variables: dict[str, Any], batches: Iterable[Batch]
) -> dict[int, Int[np.ndarray, 'V E']]:
  """The number of times that each token id chose each expert, by layer number.

  Where experts choose tokens, it is the number of times that an expert took the
  token; where they mix them, every expert takes each. The arguments are those
  of `choices`.
  """
  if model.moe is None:
    return {}  # and no batch is read
  V = model.vocab_size
  counts = {
    layer: np.zeros((V, model.moe_of(layer).num_experts), np.int64)
    for layer in model.sparse_layers
  }
  for chosen in choices(model, variables, batches):
    for layer, (_, token, expert) in chosen.items():
      np.add.at(counts[layer], (token, expert), 1)
  return counts


def _sown(
  model: Model, variables: dict[str, Any], batch: Batch
) -> list[jax.Array | SlotRouting]:
  """The choices of each sparse layer's router, in the order of the layers."""
  _, collections = model.apply(
    variables, **model.inputs(batch), mutable=['intermediates']
  )
  layers = model.layer_trees(collections['intermediates'])
  return [sown_choices(layers[i]) for i in model.sparse_layers]


def _choices(
  model: Model, layer: int, chosen: np.ndarray | SlotRouting, batch: Batch
) -> Choices:
  prefix = model.sequence_of(layer)
  tokens = np.asarray(batch[f'{prefix}tokens']).reshape(-1)
  is_real = np.asarray(batch[f'{prefix}segment_ids']).reshape(-1) > 0
  position, expert = _pairs(chosen)
  is_inside = position < len(tokens)  # the last group may be filled up
  position, expert = position[is_inside], expert[is_inside]
  position, expert = position[is_real[position]], expert[is_real[position]]
  return Choices(position, tokens[position], expert)


def _pairs(
  chosen: np.ndarray | SlotRouting,
) -> tuple[np.ndarray, np.ndarray]:
  """The position and the expert of each choice, over all groups."""
  if not isinstance(chosen, SlotRouting):  # [G, S, K] or [B, T, N]
    by_position = chosen.reshape(-1, chosen.shape[-1])
    position, choice = np.nonzero(by_position >= 0)
    return position, by_position[position, choice]
  S = chosen.group_size
  group, expert, slot = np.nonzero(chosen.token_index < S)
  return group * S + chosen.token_index[group, expert, slot], expert
