"""Random routing: every token has K experts drawn at random.

The router has no parameters, and its gates are 1/K. Choices are drawn anew each
time in training, and are the same each time in evaluation. The rule is
`moe_jax.routing.rules_without_logits`.
"""

import dataclasses
from typing import ClassVar

import jax

from moe_jax import routing
from moe_jax.layers.routers.by_token import Queued, serve_evenly
from moe_jax.layers.routers.contract import NOISE, Router
from moe_jax.options import SEED, option


@dataclasses.dataclass(frozen=True)
class Random(Queued):
  """The options of random routing.

  Draws depend on the shape of the input, so that generation step by step draws
  other experts than an evaluation of whole rows.
  """

  takes_choices: ClassVar[bool] = True

  seed: int = option(
    0,
    "Seed of a random router's choices in evaluation; training draws anew.",
    SEED,
  )

  def module(self, sizes, shared, name=None):
    """The router's linen module."""
    return RandomRouter(self, sizes, shared, name=name)

  def multiply_adds(self, sizes, width):
    """Zero: there is no product."""
    return 0

  def for_encoder(self):
    """The router with another seed, as an encoder's layers are counted anew."""
    return dataclasses.replace(self, seed=self.seed + 1)


class RandomRouter(Router):
  """Choices at random, without parameters; see `Router`."""

  options: Random

  def route(self, x, mask, train, router_ids, layer, given=None):
    """Routes each group by itself; see `Router`."""
    del x, router_ids
    if train:
      key = self.make_rng(NOISE)
    else:
      key = jax.random.fold_in(jax.random.key(self.options.seed), layer)
    G, S = mask.shape
    index = routing.random_choice(
      key,
      num_groups=G,
      group_size=S,
      num_experts=self.sizes.num_experts,
      num_selected=self.sizes.num_selected,
    )
    return serve_evenly(self, index, mask, given)
