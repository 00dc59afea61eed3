"""Random routing: every token has K experts at random, with gates of 1/K.

The experts are drawn anew in each training step, and are the same each time in
evaluation. Random routing is the baseline of https://arxiv.org/abs/2106.04426.
"""

import dataclasses
from typing import ClassVar

import jax

from moe_jax import routing
from moe_jax.config import SEEDS, option
from moe_jax.layers.routers import contract, shared_options, steps


@dataclasses.dataclass(frozen=True)
class Random(contract.RouterOptions):
  """The options of random routing.

  Which experts are drawn depends on the shape [G, S] of the input. So a token
  has other experts when a model generates it, one token a step, than when the
  model is evaluated on the whole row.
  """

  takes_choices: ClassVar[bool] = True

  slot_priority: str = shared_options.SLOT_PRIORITY_WITHOUT_PROBABILITY
  seed: int = option(
    0,
    "Seed of a random router's choices in evaluation; training draws anew.",
    minimum=0,
    below=SEEDS,
  )

  def module(self, sizes, shared, name=None):
    return RandomRouter(self, sizes, shared, name=name)

  def causality(self, sizes):
    return contract.Causality.of_queues(sizes, self.slot_priority)


class RandomRouter(contract.Router):
  """The router that draws experts at random; it has no parameters."""

  options: Random

  def route(self, x, mask, train, token_info, layer, given=None):
    o = self.options
    if train:
      key = self.make_rng(contract.NOISE)
    else:
      key = jax.random.fold_in(jax.random.key(o.seed), layer)
    G, S = mask.shape
    index = routing.random_choice(
      key,
      num_groups=G,
      group_size=S,
      num_experts=self.sizes.num_experts,
      num_selected=self.sizes.num_selected,
    )
    return steps.with_equal_gates(self, index, mask, given)
