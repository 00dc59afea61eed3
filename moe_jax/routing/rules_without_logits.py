"""Choices that no logit made: by hash, at random, and in turn.

In hash layers (https://arxiv.org/abs/2106.04426) a token's experts are a fixed,
pseudo-random function of an id. Nothing is learned and nothing balanced: an id
that is common makes its experts busy. The paper keeps random tables; here a
hash function stands for a table of any size. Random routing is the paper's
baseline: a learned router should do better. Choices in turn give all experts
the same load, for measurements of speed.
"""

import jax
import jax.numpy as jnp

from moe_jax.config import unknown
from moe_jax.errors import InputError
from moe_jax.routing.capacity import check_selected
from moe_jax.routing.given_choice_rule import GivenChoices
from moe_jax.routing.rows import decided
from moe_jax.shapes import Array, Bool, Int, Int32, PRNGKey, UInt32, checked

HASH_OF = ('token', 'bigram', 'position')
FORCED = IN_TURN, AT_RANDOM = 'round_robin', 'random'
# The seed of forced random choices in evaluation and generation.
_SEED = 0


@checked
def hash_choice(
  ids: UInt32[Array, 'G S'],
  *,
  num_experts: int,
  num_selected: int,
  seed: int = 0,
  layer: int | Int[Array, ''] = 0,
) -> Int32[Array, 'G S K']:
  """K different experts of each id; equal ids have the same experts.

  With K > 1 this is the paper's MultiHash, except that in the paper the experts
  are slices of one feed-forward layer.

  Args:
    ids: The ids to hash, from `hash_ids`.
    num_experts: The number E of experts.
    num_selected: K, in [1, E].
    seed: The seed of the table; another seed gives other experts.
    layer: The index of the layer; every layer has a table of its own.

  Raises:
    ValueError: K is not in [1, E].
  """
  check_selected(num_selected, num_experts)
  salt = mixed(mixed(_uint32(seed)) + _uint32(layer))
  rank = jnp.arange(num_selected, dtype=jnp.uint32)
  salts = mixed(salt + rank)[None, None]  # [1, 1, K]
  draws = mixed(mixed(ids)[..., None] + salts)
  return distinct(draws, num_experts)


@checked
def hash_ids(
  hash_of: str,
  tokens: Int[Array, 'B T'],
  previous: Int[Array, 'B T'],
  positions: Int[Array, 'B T'],
) -> UInt32[Array, 'B T']:
  """The ids that decide the experts of each token.

  Args:
    hash_of: The source of the ids: 'token', 'bigram' (the token and the token
      before it), or 'position'.
    tokens: Token ids.
    previous: The token before each token in its segment; -1 for the first.
    positions: The position of each token in its segment.

  Raises:
    ValueError: `hash_of` is unknown.
  """
  if hash_of not in HASH_OF:
    raise unknown('hash_of', hash_of, HASH_OF)
  if hash_of == 'position':
    return positions.astype(jnp.uint32)
  if hash_of == 'token':
    return tokens.astype(jnp.uint32)
  return mixed(previous.astype(jnp.uint32)) + tokens.astype(jnp.uint32)


@checked
def previous_tokens(
  tokens: Int[Array, 'B T'], segment_ids: Int[Array, 'B T'] | None = None
) -> Int[Array, 'B T']:
  """The token before each token in its segment; -1 for the first.

  A row is one segment if `segment_ids` is None.
  """
  previous = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  if segment_ids is None:
    return previous
  shifted = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  return jnp.where(segment_ids == shifted, previous, -1)


def distinct(
  draws: UInt32[Array, '*G K'], num_experts: int
) -> Int32[Array, '*G K']:
  """K different experts from K uniform draws; the work does not grow with E.

  Draw k picks one of the E - k experts that are left.
  """
  K, experts = draws.shape[-1], []
  for k in range(K):
    expert = (draws[..., k] % jnp.uint32(num_experts - k)).astype(jnp.int32)
    # The draw is an index among the experts that are left; the loop makes it
    # the index among all experts.
    for chosen in jnp.sort(jnp.stack(experts), axis=0) if experts else ():
      expert = expert + (expert >= chosen)
    experts.append(expert)
  return decided(jnp.stack(experts, axis=-1))


def mixed(x: UInt32[Array, '*G']) -> UInt32[Array, '*G']:
  """Scrambles the bits of numbers, one to one, by MurmurHash3's finalizer."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _uint32(x: int | Int[Array, '']) -> UInt32[Array, '']:
  return jnp.uint32(x % 2**32) if isinstance(x, int) else x.astype(jnp.uint32)


@checked
def random_choice(
  key: PRNGKey,
  *,
  num_groups: int,
  group_size: int,
  num_experts: int,
  num_selected: int,
) -> Int32[Array, 'G S K']:
  """Draws K different experts for each token; all sets of K are equally likely.

  Args:
    key: The key that the experts are drawn from.
    num_groups: The number G of groups.
    group_size: The number S of tokens in a group.
    num_experts: The number E of experts.
    num_selected: K, in [1, E].

  Raises:
    ValueError: K is not in [1, E], or there are no groups or no tokens.
  """
  check_selected(num_selected, num_experts)
  if num_groups < 1 or group_size < 1:
    raise InputError(
      f'num_groups={num_groups} and group_size={group_size} must be at least 1'
    )
  shape = (num_groups, group_size, num_selected)
  return distinct(jax.random.bits(key, shape), num_experts)


@checked
def choice_in_turn(
  mask: Bool[Array, 'G S'],
  *,
  num_experts: int,
  num_selected: int,
  first: int | Int[Array, ''] = 0,
) -> Int32[Array, 'G S K']:
  """Gives the choices of a group's real tokens to the experts in turn.

  In each group the loads of two experts differ by one at most. So do the loads
  over a whole batch without padding, since each group begins with the expert
  after the last one of the group before it; this expert is computed as if no
  group had padding. Choices of padding mean nothing.

  Args:
    mask: False for padding.
    num_experts: The number E of experts.
    num_selected: K, in [1, E]; the choices of a token are different experts.
    first: The index of the expert of the first token's first choice.

  Raises:
    ValueError: K is not in [1, E].
  """
  E, K = num_experts, num_selected
  check_selected(K, E)
  G, S = mask.shape
  # The turns are counted modulo E, as G * S * K can be more than an int32.
  begins = (jnp.arange(G, dtype=jnp.int32) % E * (S * K % E) + first) % E
  number = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - mask  # [G, S]
  turn = begins[:, None, None] + (number % E * K)[..., None]
  return (turn + jnp.arange(K, dtype=jnp.int32)[None, None]) % E


def forced_choices(
  kind: str,
  mask: Bool[Array, 'G S'],
  num_experts: int,
  num_selected: int,
  layer: int | Int[Array, ''],
  key: PRNGKey | None,
) -> GivenChoices:
  """The choices that are forced on a layer, whatever its router's logits are.

  Args:
    kind: 'round_robin' gives choices to the experts in turn, 'random' draws
      them.
    mask: False for padding.
    num_experts: The number E of experts.
    num_selected: K, in [1, E].
    layer: The index of the layer; each layer has other choices.
    key: The key of random choices; None: a layer's are the same in each call.
  """
  sizes = dict(num_experts=num_experts, num_selected=num_selected)
  if kind == IN_TURN:
    return GivenChoices(choice_in_turn(mask, first=layer, **sizes))
  if key is None:
    key = jax.random.fold_in(jax.random.key(_SEED), layer)
  G, S = mask.shape
  return GivenChoices(random_choice(key, num_groups=G, group_size=S, **sizes))
