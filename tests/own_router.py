"""A user's module with a router, which tests copy into a folder."""

import dataclasses

import jax.numpy as jnp

from moe_jax import routing
from moe_jax.config import option
from moe_jax.layers.routers.contract import Causality, Router, RouterOptions


@dataclasses.dataclass(frozen=True)
class First(RouterOptions):
  """Every token goes to the same experts."""

  offset: int = option(0, 'Number of the first expert.', minimum=0)

  def module(self, sizes, shared, name=None):
    return FirstRouter(self, sizes, shared, name=name)

  def causality(self, sizes):
    return Causality.of_queues(sizes)


class FirstRouter(Router):
  """Sends every token to experts `offset`, `offset` + 1, ..."""

  def route(self, x, mask, train, token_info, layer):
    sizes = self.sizes
    first = jnp.arange(sizes.num_selected) + self.options.offset
    index = jnp.broadcast_to(
      (first % sizes.num_experts)[None, None], (*mask.shape, len(first))
    )
    chosen = routing.even_choice(
      index.astype(jnp.int32),
      num_experts=sizes.num_experts,
      capacity=sizes.slots(mask.shape[1]),
      mask=mask,
    )
    aux = routing.empty_aux(sizes.num_experts, sizes.num_selected)
    stats = routing.routing_stats(chosen, None, mask)
    return chosen, aux._replace(stats=stats)
