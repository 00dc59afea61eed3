"""Routers without parameters, whose gates are 1/K: by a hash, and at random.

Hash layers (https://arxiv.org/abs/2106.04426): the experts of a token are a
fixed function of an id. Random routing: every token has K experts that are
drawn anew each time in training, and are the same each time in evaluation.
"""

import dataclasses
from typing import ClassVar, cast

import jax

from moe_jax import routing
from moe_jax.config import SEEDS, option
from moe_jax.layers.routers.by_token import Queued, serve_evenly
from moe_jax.layers.routers.contract import NOISE, Router
from moe_jax.routing.rules_without_logits import HASH_OF, hash_ids
from moe_jax.shapes import Array


@dataclasses.dataclass(frozen=True)
class Hash(Queued):
  """The options of a hash layer's router."""

  needs_ids: ClassVar[bool] = True
  takes_choices: ClassVar[bool] = True

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
    """The router's linen module."""
    return HashRouter(self, sizes, shared, name=name)

  def multiply_adds(self, sizes, width):
    """Zero: there is no product."""
    return 0

  def ids_of(self, tokens):
    """The ids of the tokens, bigrams or positions that `of` names."""
    return hash_ids(self.of, tokens.tokens, tokens.previous, tokens.positions)

  def for_encoder(self):
    """The router with another seed, as an encoder's layers are counted anew."""
    return dataclasses.replace(self, seed=self.seed + 1)


class HashRouter(Router):
  """Choices by hash, without parameters; see `Router`."""

  options: Hash

  def route(self, x, mask, train, router_ids, layer, given=None):
    """Routes each group by itself; see `Router`."""
    del x, train
    index = routing.hash_choice(
      cast(Array, router_ids),  # the contract has checked that there are some
      num_experts=self.sizes.num_experts,
      num_selected=self.sizes.num_selected,
      seed=self.options.seed,
      layer=layer,
    )
    return serve_evenly(self, index, mask, given)


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
    minimum=0,
    below=SEEDS,
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
