"""The router: token representations to a `Routing`, losses and statistics.

Everything here is float32 whatever the model's dtype (Switch Table 2,
https://arxiv.org/abs/2101.03961). The rules are `moe_jax.routing`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax import routing
from moe_jax.config import unknown
from moe_jax.layers.initializers import Init, zeros
from moe_jax.layers.matmul import rows_matmul
from moe_jax.partitioning import on_each_device
from moe_jax.routing.losses import BALANCE_CHOICES
from moe_jax.shapes import Array, Bool, Float, Float32, Int32

ROUTERS = ('token_choice', 'noisy_top_k')
SERVED_BY = ('chosen', 'transformers_nllb')


@dataclasses.dataclass(frozen=True)
class RouterConfig:
  """Who goes where. Options carry the name of the paper that means them.

  Attributes:
    num_experts: E.
    num_selected: K.
    kind: 'token_choice' (Switch, GShard, ST-MoE, Mixtral) or 'noisy_top_k'
      (Shazeer et al. 2017: both router weights start at zero).
    capacity: The capacity rule.
    gates, slot_priority, second_policy, second_threshold: See
      `routing.token_choice`.
    jitter: In training the router's input is multiplied by
      U[1 - jitter, 1 + jitter] (ST-MoE, arXiv:2202.08906 section 3.2).
    balance_choices: See `routing.balance_loss`.
    use_bias: Whether the logits have a bias, which starts at zero.
    balance_bias_rate: Of Loss-Free Balancing, per step; 0: none. See
      `routing.balance_bias`.
    served_by: 'chosen', or what transformers does with NLLB-MoE in place of
      it; see `routing.transformers_nllb`.
    init: How the kernel starts, except under 'noisy_top_k'.
  """

  num_experts: int
  num_selected: int = 1
  kind: str = 'token_choice'
  capacity: routing.CapacityRule = routing.CapacityRule()
  gates: str = 'raw'
  slot_priority: str = 'token_major'
  second_policy: str = 'all'
  second_threshold: float = 0.2
  jitter: float = 0.0
  balance_choices: str = 'all'
  use_bias: bool = False
  balance_bias_rate: float = 0.0
  served_by: str = 'chosen'
  init: Init = Init()

  def __post_init__(self):
    if self.kind not in ROUTERS:
      raise unknown('router', self.kind, ROUTERS)
    if not isinstance(self.capacity, routing.CapacityRule):
      raise ValueError(
        f'capacity={self.capacity!r} is no CapacityRule; for room for all, '
        "CapacityRule('all')"
      )
    if self.balance_choices not in BALANCE_CHOICES:
      raise unknown('balance_choices', self.balance_choices, BALANCE_CHOICES)
    if self.served_by not in SERVED_BY:
      raise unknown('served_by', self.served_by, SERVED_BY)
    if self.served_by != 'chosen' and (
      self.num_selected != 2 or self.num_experts < 2
    ):
      raise ValueError(
        f'served_by={self.served_by!r} needs num_selected=2 of at least 2 '
        f'experts, not {self.num_selected} of {self.num_experts}'
      )
    if not 0 <= self.balance_bias_rate < 1:
      raise ValueError(
        f'balance_bias_rate={self.balance_bias_rate} not in [0, 1)'
      )
    if self.balance_bias_rate and self.kind == 'noisy_top_k':
      raise ValueError(
        f'balance_bias_rate={self.balance_bias_rate} with '
        "router='noisy_top_k', whose load estimate knows no bias; use "
        "router='token_choice'"
      )
    if not 0 <= self.jitter < 1:
      raise ValueError(f'jitter={self.jitter} not in [0, 1)')
    routing.check_token_choice(
      num_experts=self.num_experts,
      num_selected=self.num_selected,
      capacity=None,
      gates=self.gates,
      slot_priority=self.slot_priority,
      second_policy=self.second_policy,
      second_threshold=self.second_threshold,
    )


class Router(nn.Module):
  """One linear layer, then the rules of `config`.

  Draws noise from the rng stream 'router', in training only, and only where
  an option asks for it.
  """

  config: RouterConfig

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'G S M'],
    mask: Bool[Array, 'G S'],
    train: bool = False,
  ) -> tuple[routing.Routing, routing.MoeAux]:
    """Routes each group by itself; padding (mask False) takes no part."""
    c = self.config
    _, S, M = x.shape
    E, K = c.num_experts, c.num_selected
    noisy = c.kind == 'noisy_top_k'
    x = x.astype(jnp.float32)
    if train and c.jitter > 0:
      low, high = 1.0 - c.jitter, 1.0 + c.jitter
      key = self.make_rng('router')
      x = x * jax.random.uniform(key, x.shape, x.dtype, low, high)
    axes = ('embed', 'expert_choice')
    init = zeros(axes) if noisy else c.init.kernel(axes)
    clean = _logits(x, self.param('w', init, (M, E), jnp.float32))
    if c.use_bias:
      init = zeros(('expert_choice',))
      clean = clean + self.param('b', init, (E,), jnp.float32)[None, None]
    noise = None
    if noisy:
      w_noise = self.param('w_noise', zeros(axes), (M, E), jnp.float32)
      key = self.make_rng('router') if train else None
      noise = routing.noisy_logits(clean, _logits(x, w_noise), key)
    logits = noise.noisy if noisy else clean
    # On each device, as no compiler splits a top-K over groups.
    largest = on_each_device(
      functools.partial(routing.choose, num_selected=min(K + noisy, E)),
      (self._scores(logits),),
    )
    chosen = routing.token_choice(
      logits,
      num_selected=K,
      capacity=c.capacity(group_size=S, num_experts=E, num_selected=K),
      mask=mask,
      gates=c.gates,
      slot_priority=c.slot_priority,
      second_policy=c.second_policy,
      second_threshold=c.second_threshold,
      key=self._policy_key(train),
      expert_index=largest[..., :K],
    )
    # For analysis only: kept where the caller makes 'intermediates' mutable.
    self.sow('intermediates', 'expert_index', chosen.expert_index)
    aux = _aux(chosen, clean, noise, largest, mask, c)
    if c.served_by == 'transformers_nllb':
      chosen = routing.transformers_nllb.by_rank(chosen)
    return chosen, aux

  def _scores(self, logits):
    """What tokens choose by."""
    c = self.config
    if not c.balance_bias_rate:
      return logits
    bias = self.variable(
      'router_state', 'balance_bias', jnp.zeros, (c.num_experts,), jnp.float32
    )
    return routing.balance_bias.biased_scores(logits, bias.value, c.gates)

  def _policy_key(self, train):
    draws = self.config.second_policy != 'all' and self.config.num_selected > 1
    return self.make_rng('router') if train and draws else None


def _logits(
  x: Float32[Array, 'G S M'], w: Float32[Array, 'M E']
) -> Float32[Array, 'G S E']:
  G, S, M = x.shape
  rows = x.reshape(G * S, M)
  logits = rows_matmul(rows, w, jax.lax.Precision.HIGHEST)
  return logits.reshape(G, S, -1)


def _aux(
  chosen: routing.Routing,
  clean: Float32[Array, 'G S E'],
  noise: routing.NoisyLogits | None,
  largest: Int32[Array, 'G S N'],
  mask: Bool[Array, 'G S'],
  c: RouterConfig,
) -> routing.MoeAux:
  """Losses summed over groups, each times its real tokens; statistics."""
  tokens = mask.sum(-1).astype(jnp.float32)  # [G]
  probs = jax.nn.softmax(clean)
  index = chosen.expert_index
  balance = routing.balance_loss(probs, index, mask, c.balance_choices)
  logits = clean if noise is None else noise.noisy
  gate = routing.gates_before_drop(logits, index, c.gates)
  importance = routing.importance_loss(gate, index, mask, c.num_experts)
  load = jnp.zeros_like(tokens)
  if noise is not None:
    load = routing.load_loss(
      routing.load_probability(noise, c.num_selected, largest), mask
    )
  return routing.MoeAux(
    balance_loss=(balance * tokens).sum(),
    z_loss=(routing.z_loss(clean, mask) * tokens).sum(),
    importance_loss=(importance * tokens).sum(),
    load_loss=(load * tokens).sum(),
    stats=routing.routing_stats(chosen, clean, mask),
  )
