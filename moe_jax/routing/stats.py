"""Statistics of a routing: sums over real tokens, which merge by adding.

The rate of dropped choices is also defined here, and nowhere else.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Num

from moe_jax.errors import InputError
from moe_jax.routing.aux_losses import load_per_expert
from moe_jax.routing.soft_rule import AnyRouting, SoftRouting
from moe_jax.shapes import Array, Bool, Float32, Leaf, checked


class RoutingStats(NamedTuple):
  """Sums over the real tokens of all groups; add two to merge them.

  Attributes:
    tokens: float32 [], real tokens.
    load: float32 [E], choices per expert before dropping.
    kept_load: float32 [E], choices per expert that were served.
    overflowed: float32 [K], choices of each rank (a token's first, its second,
      ...) that were dropped because the expert was full; `drop_rate` makes a
      rate of them. Where experts choose, a token that no expert took counts as
      one dropped choice of every rank.
    unsent: float32 [K], choices of each rank that a random second policy
      (option of `token_choice`) did not send and whose expert was not full.
      They do not count as dropped.
    entropy: float32 [], sum over tokens of the entropy of the router's
      probabilities, in nats; 0 for a router without logits.
    logit_square: float32 [], sum over tokens of the mean square of the
      router logits; RMS = sqrt(logit_square / tokens). It is 0 for a router
      without logits.
  """

  tokens: Array
  load: Array
  kept_load: Array
  overflowed: Array
  unsent: Array
  entropy: Array
  logit_square: Array


def drop_rate(stats: RoutingStats) -> tuple[Leaf, Leaf]:
  """Dropped choices over the choices of real tokens: the drop rate.

  A choice is dropped if its expert was full. A choice that a second policy did
  not send is not dropped, and padding has no choices. Where experts choose, the
  rate is the fraction of tokens that no expert took.

  Args:
    stats: Sums over tokens, of JAX or numpy; the sums of several layers may be
      stacked.

  Returns:
    The rate by rank, [..., K], and the rate of all choices, [...]; NaN where
    there are no tokens.
  """
  tokens, K = stats.tokens, stats.overflowed.shape[-1]
  by_rank = stats.overflowed / tokens[..., None]
  return by_rank, stats.overflowed.sum(-1) / (tokens * K)


@checked
def routing_stats(
  routing: AnyRouting,
  router_logits: Float32[Array, 'G S E'] | None,
  mask: Bool[Array, 'G S'],
  num_selected: int | None = None,
) -> RoutingStats:
  """The statistics of one routing, which have no gradient.

  Where experts choose, all choices are served, and padding has no slot. In a
  soft mixture a token's K choices are divided among the experts in proportion
  to its gates, which are the router's probabilities.

  Args:
    routing: The routing.
    router_logits: The logits of which the routing was made; None if there are
      none, or if the routing is a soft mixture.
    mask: False for padding.
    num_selected: K, the length of `overflowed` and `unsent`. It may be None
      only where tokens choose, whose number of choices is then K.

  Raises:
    ValueError: `num_selected` is None where experts choose or slots are soft.
  """
  routing, real = jax.lax.stop_gradient(routing), mask[..., None]
  K = num_selected
  if K is None:
    if isinstance(routing, SoftRouting) or routing.token_index is not None:
      raise InputError('num_selected=None: only choices of tokens tell K')
    K = int(routing.gate.shape[-1])
  E, overflowed = routing.num_experts, jnp.zeros((K,), jnp.float32)
  unsent = overflowed
  if isinstance(routing, SoftRouting):
    gate = routing.token_gates()
    router_logits = jnp.log(jnp.maximum(gate, 1e-30))
    load = kept_load = K * jnp.where(real, gate, 0.0).sum((0, 1))
  elif routing.token_index is not None:
    index = routing.expert_index
    load = kept_load = load_per_expert(index, routing.kept, E).sum(0)
    group = jnp.arange(len(mask))[:, None, None]
    is_taken = jnp.zeros(mask.shape, bool)
    is_taken = is_taken.at[group, routing.token].set(True, mode='drop')
    lost = (mask & ~is_taken).sum().astype(jnp.float32)
    overflowed = jnp.broadcast_to(lost, (K,))
  else:
    load = load_per_expert(routing.expert_index, real, E).sum(0)
    kept_load = load_per_expert(routing.expert_index, routing.kept, E).sum(0)
    full = jnp.zeros_like(routing.kept)
    if routing.capacity is not None:
      full = routing.slot >= routing.capacity
    overflowed = (real & full).sum((0, 1)).astype(jnp.float32)
    unsent = (real & ~routing.kept & ~full).sum((0, 1)).astype(jnp.float32)
  zero = entropy = square = jnp.zeros((), jnp.float32)
  if router_logits is not None:
    router_logits = jax.lax.stop_gradient(router_logits)
    entropy = jnp.where(mask, token_entropy(router_logits), zero).sum()
    square = jnp.where(mask, token_square(router_logits), zero).sum()
  return RoutingStats(
    mask.sum().astype(jnp.float32),
    load,
    kept_load,
    overflowed,
    unsent,
    entropy,
    square,
  )


def token_entropy(
  router_logits: Float32[Array, '*G E'],
) -> Float32[Array, '*G']:
  """The entropy, in nats, of the softmax of each token's logits."""
  log_probs = jax.nn.log_softmax(router_logits)
  return -(jnp.exp(log_probs) * log_probs).sum(-1)


def token_square(router_logits: Float32[Array, '*G E']) -> Float32[Array, '*G']:
  """The mean square of each token's logits."""
  return jnp.mean(router_logits**2, -1)


class ExchangeStats(NamedTuple):
  """Counts of rows that devices exchange; add two to merge them.

  The counts are summed over devices, and zero on a single device.

  Attributes:
    away: float32 [], rows whose expert is on another device.
    sent: float32 [], rows that had to go to another device: those of `away`
      whose expert was not shadowed.
    shadowed: float32 [], experts that were shadowed: sent to all devices, so
      that their rows stay where they are.
    choices: float32 [], the number of choices of experts to shadow: one in each
      microbatch by each set of devices that exchange rows with each other;
      shadowed / choices is the mean number of shadowed experts.
    overflow: float32 [], rows for which the exchange had no room, and which
      were dropped. Routers do not know of such drops: the rows count as served
      in `RoutingStats`, and as kept in traces.
  """

  away: Array
  sent: Array
  shadowed: Array
  choices: Array
  overflow: Array


def no_exchange() -> ExchangeStats:
  """The statistics of a layer whose rows stay on their device: zeros."""
  zero = jnp.zeros((), jnp.float32)
  return ExchangeStats(zero, zero, zero, zero, zero)


class MoeAux(NamedTuple):
  """Losses and statistics that a feed-forward layer returns with its output.

  Losses are unweighted totals: the sum over groups of the group's loss times
  its real tokens. Divided by `stats.tokens` (of the whole batch, where it is
  split in microbatches) the totals are means. A dense layer returns zeros, so
  that the totals and counts of dense and MoE layers add up.

  Attributes:
    losses: Losses of the router by name, float32 []: the losses to which the
      router's options give a weight. Each is an attribute, too:
      `aux.balance_loss`.
    stats: Sums over real tokens; `stats.load` is the load before drops.
    exchange: Sums over devices, which depend on the mesh.
  """

  losses: dict[str, Array]
  stats: RoutingStats
  exchange: ExchangeStats

  def __getattr__(self, name: str) -> Array:
    """The loss of this name in `losses`; AttributeError if there is none."""
    if name not in self.losses:
      raise AttributeError(f'no loss {name!r}; have {sorted(self.losses)}')
    return self.losses[name]


def empty_aux(
  num_experts: int, num_selected: int, losses: Iterable[str] = ()
) -> MoeAux:
  """The zeros that a layer without a router has for losses and statistics.

  Args:
    num_experts: E, the number of experts in arrays such as the load.
    num_selected: K, the number of choices in arrays by rank of a choice.
    losses: Names of the losses of the model's other layers.
  """
  scalar, loads, choices = (
    jnp.zeros(shape, jnp.float32)
    for shape in ((), (num_experts,), (num_selected,))
  )
  stats = RoutingStats(scalar, loads, loads, choices, choices, scalar, scalar)
  return MoeAux(dict.fromkeys(losses, scalar), stats, no_exchange())


def with_room(aux: MoeAux, num_experts: int) -> MoeAux:
  """`aux` with zeros behind its loads [..., E], up to `num_experts` of them.

  So layers with fewer experts, as pruning leaves them, add up with the others.
  """
  stats = aux.stats
  missing = num_experts - stats.load.shape[-1]
  if not missing:
    return aux
  pad = [(0, 0)] * (stats.load.ndim - 1) + [(0, missing)]
  loads = {n: jnp.pad(getattr(stats, n), pad) for n in ('load', 'kept_load')}
  return aux._replace(stats=stats._replace(**loads))


def load_summary(load: Num[np.ndarray, 'E']) -> dict[str, float | int]:
  """Measures of how even the load of the experts is, in whatever unit.

  Returns:
    `load_cv`: standard deviation (population's) over mean, 0 when even,
    sqrt(E - 1) when one expert takes all. `load_max_over_mean`: 1 when even, E
    when one takes all. `unused_experts`: the number of experts that took
    nothing. The first two are NaN where no expert took anything.

  Raises:
    ValueError: `load` is not a vector of finite numbers >= 0.
  """
  load = np.asarray(load, np.float64)
  if load.ndim != 1 or not load.size:
    raise InputError(f'load has shape {load.shape}; it must be [E], E >= 1')
  if not (np.isfinite(load) & (load >= 0)).all():
    raise InputError(f'load={load.tolist()} must be finite and >= 0')
  unused = int((load == 0).sum())
  if unused == load.size:
    cv = max_over_mean = float('nan')
  else:
    cv = float(load.std() / load.mean())
    max_over_mean = float(load.max() / load.mean())
  return {
    'load_cv': cv,
    'load_max_over_mean': max_over_mean,
    'unused_experts': unused,
  }
