"""The router of two levels: a gate over branches, and one in each branch.

Shazeer et al. 2017, Appendix B (https://arxiv.org/abs/1701.06538). A branch's
gate multiplies the tokens that chose it and no others, so that the work per
token grows with a + b, not with their product. Not here: what two levels mean
(`moe_jax.routing.hierarchical_rule`), and the experts, which are those of any
layer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from moe_jax import routing
from moe_jax.dispatch import dropless
from moe_jax.kernels import grouped_matmul
from moe_jax.layers.initializers import zeros
from moe_jax.layers.routers.router import Router, gate_logits
from moe_jax.layers.routers.router_config import RouterConfig
from moe_jax.partitioning import on_each_device
from moe_jax.routing import hierarchical_rule
from moe_jax.shapes import Array, Bool, Float, Float32, Int, Int32, UInt32


def make_router(config: RouterConfig, name: str) -> nn.Module:
  """The router that the config describes, of one level or of two."""
  kind = HierarchicalRouter if config.branching else Router
  return kind(config, name=name)


class HierarchicalRouter(nn.Module):
  """As `Router`, for `config.branching` > 0.

  `w` and `w_noise` are the primary gate's, `w_branch` and `w_branch_noise`
  [a, M, b] those of the branches. The balance loss is 0: importance and load
  losses are those that have two levels. Entropy, squared logits and z-loss are
  the primary gate's plus those of the chosen branches, weighted by its gates.
  """

  config: RouterConfig

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'G S M'],
    mask: Bool[Array, 'G S'],
    train: bool = False,
    hash_ids: UInt32[Array, 'G S'] | None = None,
    layer: int | Int[Array, ''] = 0,
  ) -> tuple[routing.Routing, routing.MoeAux]:
    """Arguments are those of `Router`; the last two have no meaning here."""
    del hash_ids, layer
    c = self.config
    primary, secondary = c.levels()
    capacity = c.capacity(
      group_size=x.shape[1],
      num_experts=c.num_experts,
      num_selected=c.num_selected,
    )
    branch = _level(primary, *gate_logits(self, primary, x, train, None))
    expert = _level(
      secondary, *self._branch_logits(x, branch.index, secondary, train)
    )
    inner = (*branch.index.shape, secondary.num_selected)  # G, S, K1, K2
    index, gate = hierarchical_rule.flat_choices(
      branch.index,
      branch.gate,
      expert.index.reshape(inner),
      expert.gate.reshape(inner),
      secondary.num_experts,
    )
    chosen = routing.given_choice(
      index,
      gate,
      num_experts=c.num_experts,
      capacity=capacity,
      mask=mask,
      slot_priority=c.slot_priority,
    )
    self.sow('intermediates', 'expert_index', index)
    return chosen, _aux(chosen, gate, branch, expert, mask)

  def _branch_logits(self, x, branch_index, c, train):
    """Those of each token's branches, [G, S * K1, b], and with noise."""
    x, b = x.astype(jnp.float32), c.num_experts
    shape = (self.config.branching, x.shape[-1], b)
    # Not named for experts: what copies those would take them for experts'.
    axes = (None, 'embed', None)
    noisy = c.kind == 'noisy_top_k'
    # The fan-in is that of one branch.
    init = zeros(axes) if noisy else c.init.kernel(axes, shrink=1 / shape[0])
    w = self.param('w_branch', init, shape, jnp.float32)
    if noisy:
      w_noise = self.param('w_branch_noise', zeros(axes), shape, jnp.float32)
      w = jnp.concatenate([w, w_noise], -1)
    both = on_each_device(
      _of_chosen, (x, branch_index), (w,), (PartitionSpec(),)
    )
    if not noisy:
      return both, None
    key = self.make_rng('router') if train else None
    return both[..., :b], routing.noisy_logits(
      both[..., :b], both[..., b:], key
    )


class _Level(NamedTuple):
  """What one level decided; N tokens, or N choices of branches.

  Attributes:
    clean: float32 [G, N, E], logits without noise.
    index: int32 [G, N, K].
    gate: float32 [G, N, K], before drops.
    probability: float32 [G, N, E], P of the load estimator; None without noise.
  """

  clean: Array
  index: Array
  gate: Array
  probability: Array | None


def _level(
  c: RouterConfig,
  clean: Float32[Array, 'G N E'],
  noise: routing.NoisyLogits | None,
) -> _Level:
  E, K = c.num_experts, c.num_selected
  logits = clean if noise is None else noise.noisy

  def largest(logits):
    return routing.choose(logits, min(K + 1, E))

  best = on_each_device(largest, (logits,))
  index, probability = best[..., :K], None
  if noise is not None:
    probability = routing.load_probability(noise, K, best)
  gate = routing.gates_before_drop(logits, index, c.gates)
  return _Level(clean, index, gate, probability)


def _of_chosen(
  x: Float32[Array, 'G S M'],
  branch_index: Int32[Array, 'G S K1'],
  w: Float32[Array, 'A M N'],
) -> Float32[Array, 'G P N']:
  """x times the kernel of each branch it chose; P = S * K1."""
  K1 = branch_index.shape[-1]
  G, P = x.shape[0], x.shape[1] * K1
  chosen = routing.Routing(
    expert_index=branch_index.reshape(G, P, 1),
    slot=jnp.zeros((G, P, 1), jnp.int32),
    gate=jnp.ones((G, P, 1), jnp.float32),
    kept=jnp.ones((G, P, 1), bool),
    num_experts=w.shape[0],
    capacity=None,
  )
  rows = dropless.dispatch(jnp.repeat(x, K1, axis=1), chosen)
  with jax.default_matmul_precision('highest'):
    logits = grouped_matmul(rows, w, dropless.group_sizes(chosen))
  return dropless.combine(logits, chosen)


def _aux(
  chosen: routing.Routing,
  gate: Float32[Array, 'G S K'],
  branch: _Level,
  expert: _Level,
  mask: Bool[Array, 'G S'],
) -> routing.MoeAux:
  """Losses summed over groups, each times its real tokens; statistics."""
  tokens = mask.sum(-1).astype(jnp.float32)  # [G]
  importance = routing.importance_loss(
    gate, chosen.expert_index, mask, chosen.num_experts
  )
  load = jnp.zeros_like(tokens)
  if branch.probability is not None:
    load = hierarchical_rule.hierarchical_load_loss(
      branch.probability,
      expert.probability.reshape(*branch.index.shape, -1),
      branch.index,
      mask,
    )
  entropy, square = (
    jax.lax.stop_gradient(_both(f, branch, expert, mask))
    for f in (_entropy, _square)
  )
  stats = routing.routing_stats(chosen, None, mask)
  return routing.MoeAux(
    balance_loss=jnp.zeros((), jnp.float32),
    z_loss=_both(_z, branch, expert, mask),
    importance_loss=(importance * tokens).sum(),
    load_loss=(load * tokens).sum(),
    stats=stats._replace(entropy=entropy, logit_square=square),
  )


def _both(f, branch: _Level, expert: _Level, mask) -> Float32[Array, '']:
  """The sum over real tokens of f of both levels' logits; see the class."""
  inner = f(expert.clean).reshape(branch.gate.shape)
  # The z-loss is not to move tokens to branches of small logits.
  gate = jax.lax.stop_gradient(branch.gate)
  per_token = f(branch.clean) + (gate * inner).sum(-1)  # [G, S]
  return jnp.where(mask, per_token, 0.0).sum()


def _z(logits):
  return jax.nn.logsumexp(logits, axis=-1) ** 2


def _entropy(logits):
  log_probs = jax.nn.log_softmax(logits)
  return -(jnp.exp(log_probs) * log_probs).sum(-1)


def _square(logits):
  return jnp.mean(logits**2, -1)
