"""The router: tokens to a routing, losses and statistics.

Everything here is float32 whatever the model's dtype (Switch Table 2,
https://arxiv.org/abs/2101.03961). The rules are `moe_jax.routing`.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from moe_jax import routing
from moe_jax.layers.initializers import zeros
from moe_jax.layers.routers.router_config import WITHOUT_LOGITS, RouterConfig
from moe_jax.layers.rows_product import rows_matmul
from moe_jax.partitioning import on_each_device
from moe_jax.routing.aux_losses import cv_squared
from moe_jax.shapes import Array, Bool, Float, Float32, Int, Int32, UInt32


class Router(nn.Module):
  """One linear layer, or none, then the rules of `config`.

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
    hash_ids: UInt32[Array, 'G S'] | None = None,
    layer: int | Int[Array, ''] = 0,
  ) -> tuple[routing.Routing | routing.SlotRouting, routing.MoeAux]:
    """Routes each group by itself; padding (mask False) takes no part.

    Args:
      x: Token representations.
      mask: False for padding.
      train: Turns on noise.
      hash_ids: Of kind 'hash'; see `routing.hash_rule`.
      layer: Its number: those without parameters differ by it.
    """
    c = self.config
    capacity = c.capacity(
      group_size=x.shape[1],
      num_experts=c.num_experts,
      num_selected=c.num_selected,
    )
    if c.kind in WITHOUT_LOGITS:
      index = self._given(mask.shape, train, hash_ids, layer)
      return self._even(index, mask, capacity)
    logits, noise = gate_logits(self, c, x, train)
    if c.kind == 'expert_choice':
      return self._by_expert(logits, mask, capacity)
    if c.kind == 'strictly_balanced':
      return self._balanced(logits, mask, capacity, train)
    return self._by_token(logits, noise, mask, capacity, train)

  def _given(self, shape, train, hash_ids, layer):
    """Choices that no representation has a part in. int32 [G, S, K]."""
    c = self.config
    sizes = dict(num_experts=c.num_experts, num_selected=c.num_selected)
    if c.kind == 'hash':
      if hash_ids is None:
        raise ValueError(
          "router='hash' needs hash_ids, what the tokens are hashed by; see "
          'moe_jax.routing.hash_rule.hash_ids'
        )
      return routing.hash_choice(hash_ids, **sizes, seed=c.seed, layer=layer)
    if train:
      key = self.make_rng('router')
    else:
      key = jax.random.fold_in(jax.random.key(c.seed), layer)
    G, S = shape
    return routing.random_choice(key, num_groups=G, group_size=S, **sizes)

  def _even(self, expert_index, mask, capacity):
    c = self.config
    chosen = routing.even_choice(
      expert_index,
      num_experts=c.num_experts,
      capacity=capacity,
      mask=mask,
      slot_priority=c.slot_priority,
    )
    self.sow('intermediates', 'expert_index', expert_index)
    aux = routing.empty_aux(c.num_experts, c.num_selected)
    stats = routing.routing_stats(chosen, None, mask)
    return chosen, aux._replace(stats=stats)

  def _by_token(self, clean, noise, mask, capacity, train):
    c, E, K = self.config, self.config.num_experts, self.config.num_selected
    noisy = noise is not None
    logits = noise.noisy if noisy else clean
    # On each device, as no compiler splits a top-K over groups.
    largest = on_each_device(
      functools.partial(routing.choose, num_selected=min(K + noisy, E)),
      (self._scores(logits),),
    )
    chosen = routing.token_choice(
      logits,
      num_selected=K,
      capacity=capacity,
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

  def _by_expert(self, logits, mask, capacity):
    def choose(logits, mask):
      return routing.expert_choice(logits, capacity=capacity, mask=mask)

    chosen = on_each_device(choose, (logits, mask))
    return chosen, self._slot_aux(chosen, logits, mask)

  def _balanced(self, logits, mask, capacity, train):
    c, rules = self.config, routing.strictly_balanced_rule
    # A uniform gate is where one that has learned nothing is.
    init = nn.with_logical_partitioning(
      nn.initializers.constant(1 / c.num_experts), ('expert_choice',)
    )
    shape = (c.num_experts,)
    thresholds = self.param('b_threshold', init, shape, jnp.float32)

    def choose(logits, mask, thresholds):
      trained = rules.batchwise_choice(
        logits, num_selected=c.num_selected, mask=mask
      )
      loss = rules.batchwise_loss(logits, thresholds, trained, mask)
      if train:
        return trained, loss
      found = rules.threshold_choice(
        logits, thresholds, capacity=capacity, mask=mask
      )
      return found, loss

    chosen, loss = on_each_device(
      choose, (logits, mask), (thresholds,), (PartitionSpec(),)
    )
    aux = self._slot_aux(chosen, logits, mask)
    return chosen, aux._replace(load_loss=(loss * mask.sum(-1)).sum())

  def _slot_aux(self, chosen, logits, mask):
    c = self.config
    self.sow('intermediates', 'slots', chosen)
    tokens = mask.sum(-1).astype(jnp.float32)  # [G]
    importance = cv_squared(chosen.gate.sum(-1))
    aux = routing.empty_aux(c.num_experts, c.num_selected)
    return aux._replace(
      z_loss=(routing.z_loss(logits, mask) * tokens).sum(),
      importance_loss=(importance * tokens).sum(),
      stats=routing.slot_stats(chosen, logits, mask, c.num_selected),
    )

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


def gate_logits(
  module: nn.Module,
  c: RouterConfig,
  x: Float[Array, 'G S M'],
  train: bool,
  out_axis: str | None = 'expert_choice',
) -> tuple[Float32[Array, 'G S E'], routing.NoisyLogits | None]:
  """Logits without noise, and those with it where the kind has any.

  The parameters are `module`'s: `w`, and `b` and `w_noise` where there are any;
  `out_axis` is the logical name of what they choose among.
  """
  noisy = c.kind == 'noisy_top_k'
  x, shape = x.astype(jnp.float32), (x.shape[-1], c.num_experts)
  if train and c.jitter > 0:
    low, high = 1.0 - c.jitter, 1.0 + c.jitter
    key = module.make_rng('router')
    x = x * jax.random.uniform(key, x.shape, x.dtype, low, high)
  axes = ('embed', out_axis)
  init = zeros(axes) if noisy else c.init.kernel(axes)
  clean = _product(x, module.param('w', init, shape, jnp.float32))
  if c.use_bias:
    init, shape_of_bias = zeros((out_axis,)), (c.num_experts,)
    bias = module.param('b', init, shape_of_bias, jnp.float32)
    clean = clean + bias[None, None]
  if not noisy:
    return clean, None
  w_noise = module.param('w_noise', zeros(axes), shape, jnp.float32)
  key = module.make_rng('router') if train else None
  return clean, routing.noisy_logits(clean, _product(x, w_noise), key)


def _product(
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
