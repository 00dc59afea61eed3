"""Hash layers: a token's id, bigram or position fixes its experts.

https://arxiv.org/abs/2106.04426. There are no parameters, and gates are 1/K.
"""

import dataclasses
from typing import ClassVar

from moe_jax import routing
from moe_jax.config import SEEDS, option
from moe_jax.layers.routers import contract, shared_options, steps
from moe_jax.routing.rules_without_logits import HASH_OF, hash_ids


@dataclasses.dataclass(frozen=True)
class Hash(contract.RouterOptions):
  """The options of a hash layer's router."""

  takes_choices: ClassVar[bool] = True
  reads: ClassVar[tuple[str, ...]] = ('tokens', 'previous', 'positions')

  slot_priority: str = shared_options.SLOT_PRIORITY_WITHOUT_PROBABILITY
  of: str = option(
    'token',
    "Key by which tokens are hashed to experts: the 'token' (its id), the "
    "'bigram' of it and the token before it, or its 'position'.",
    choices=HASH_OF,
  )
  seed: int = option(
    0,
    'Seed of the random table from ids to experts in a hash layer.',
    minimum=0,
    below=SEEDS,
  )

  def module(self, sizes, shared, name=None):
    return HashRouter(self, sizes, shared, name=name)

  def causality(self, sizes):
    return contract.Causality.of_queues(sizes, self.slot_priority)


class HashRouter(contract.Router):
  """The router that chooses experts by hash; it has no parameters."""

  options: Hash

  def route(self, x, mask, train, token_info, layer, given=None):
    o = self.options
    tokens, previous, positions, *_ = token_info
    index = routing.hash_choice(
      hash_ids(o.of, tokens, previous, positions),
      num_experts=self.sizes.num_experts,
      num_selected=self.sizes.num_selected,
      seed=o.seed,
      layer=layer,
    )
    return steps.with_equal_gates(self, index, mask, given)
