"""Token choice: each token chooses the K experts of its largest logits.

Switch (https://arxiv.org/abs/2101.03961), GShard, ST-MoE, Mixtral, Loss-Free
Balancing, OLMoE, Qwen3-MoE and DeepSeek-V2 and V3 are settings of
`TokenChoice`. The rules are `moe_jax.routing.token_choice_rule` and
`limited_rules`.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp

from moe_jax import routing
from moe_jax.config import option
from moe_jax.layers.routers import contract, shared_options, steps
from moe_jax.partitioning import on_each_device
from moe_jax.routing import balance_bias
from moe_jax.routing.aux_losses import choice_losses
from moe_jax.routing.limited_rules import (
  GROUP_SCORES,
  OUTSIDE,
  group_problems,
  limited_scores,
)
from moe_jax.routing.token_choice_rule import GATES
from moe_jax.shapes import Array, Bool, Float, Float32, Int32

# The rate of the balancing bias in Loss-Free Balancing and DeepSeek-V3.
PUBLISHED_RATE = 0.001
_BIAS = 'balance_bias'


@dataclasses.dataclass(frozen=True)
class TokenChoice(contract.RouterOptions):
  """The options of token choice."""

  takes_choices: ClassVar[bool] = True
  has_columns: ClassVar[bool] = True

  second_policy: str = shared_options.SECOND_POLICY
  gates: str = shared_options.GATES
  slot_priority: str = shared_options.SLOT_PRIORITY
  second_threshold: float = shared_options.SECOND_THRESHOLD
  jitter: float = shared_options.JITTER
  use_bias: bool = shared_options.USE_BIAS
  z_weight: float = shared_options.Z_WEIGHT
  importance_weight: float = shared_options.IMPORTANCE_WEIGHT
  balance_bias_rate: float = option(
    0.0,
    "Amount by which each step changes an expert's balancing bias, which evens "
    'loads without a loss (Algorithm 1 of arXiv:2408.15664, 0.001 there; '
    'usually with balance_weight=0.0); 0.0: there is no bias.',
    minimum=0,
    below=1,
  )
  balance_bias_rule: str = option(
    'sign',
    "Rule by which a step changes the balancing bias: 'sign' by the rate, up "
    'below the mean load and down above it (Algorithm 1 of arXiv:2408.15664); '
    "'error' by the rate times (mean load - load) / mean load (Table 3 there).",
    choices=balance_bias.RULES,
    same_function=True,
  )
  balance_weight: float = shared_options.BALANCE_WEIGHT
  balance_choices: str = shared_options.BALANCE_CHOICES
  sequence_balance_weight: float = shared_options.SEQUENCE_BALANCE_WEIGHT
  batch_balance_weight: float = shared_options.BATCH_BALANCE_WEIGHT
  batch_balance_rows: int = shared_options.BATCH_BALANCE_ROWS
  global_balance_weight: float = shared_options.GLOBAL_BALANCE_WEIGHT
  balance_scores: str = shared_options.BALANCE_SCORES
  expert_groups: int = option(
    1,
    'Number of groups of consecutive experts, of which a token chooses some '
    "before it chooses experts in them (DeepSeek checkpoints' n_group: 8 in "
    'V3); 1: all experts are one group.',
    minimum=1,
  )
  chosen_expert_groups: int = option(
    1,
    'Number of groups of experts that a token chooses (topk_group: 4 in V3).',
    minimum=1,
  )
  expert_group_score: str = option(
    'best',
    "Score by which a token chooses a group of experts: its 'best' score "
    "(DeepSeek-V2), or the sum of its 'two_best' (DeepSeek-V3).",
    choices=GROUP_SCORES,
  )
  outside_expert_groups: str = option(
    'minus_infinity',
    "Score of experts outside of the chosen groups: 'minus_infinity' (V3), or "
    "'zero' (V2), with which they win over biased scores below zero.",
    choices=OUTSIDE,
  )
  choice_policy: str = option(
    'largest',
    "Experts that a token chooses in training: 'largest' are those of its K "
    "largest scores; 'sampled' are drawn by the router's probabilities, "
    'without replacement; the gate of an expert does not depend on whether it '
    'was drawn. Evaluation always takes the largest.',
    choices=('largest', 'sampled'),
    same_function=True,
  )
  input_dropout: float = option(
    0.0,
    "Rate at which numbers of the router's input are dropped in training, and "
    'the others scaled up; experts see the whole input. 0.0 drops nothing.',
    minimum=0,
    below=1,
    same_function=True,
  )
  gate_scale: float = option(
    1.0,
    'Factor of all gates, the last step of their computation (DeepSeek '
    "checkpoints' routed_scaling_factor: 2.5 in V3).",
    above=0,
  )
  balance_bias_scores: str = option(
    'sigmoid',
    "Scores to which the balancing bias is added: 'sigmoid' for gates "
    "'sigmoid' (Loss-Free Balancing) and 'sigmoid_renormalized' (DeepSeek-V3), "
    "'softmax' for all other gates, which no paper has with a balancing bias.",
    choices=balance_bias.SCORES,
  )
  logits_dtype: str = option(
    'float32',
    "Type to whose numbers the router's input, kernel, logits and gates are "
    "rounded: 'float32' rounds nothing, and 'bfloat16' has eight bits of a "
    'number (Table 2 of arXiv:2101.03961, whose models diverge with it). '
    'Sums, softmax and losses of the rounded logits stay float32.',
    choices=steps.ROUNDINGS,
    same_function=True,
  )

  @property
  def gate_scores(self) -> str:
    """The scores that the gates are computed from, 'softmax' or 'sigmoid'."""
    return GATES[self.gates].scores

  @property
  def keeps_state(self):
    return self.balance_bias_rate > 0

  @property
  def by_logits(self):
    return self.expert_groups == 1 and super().by_logits

  def problems(self):
    yield from steps.threshold_problems(self)
    chosen, groups = self.chosen_expert_groups, self.expert_groups
    if chosen > groups:
      yield f'chosen_expert_groups={chosen} is more than expert_groups={groups}'
    if groups == 1:
      names = 'expert_group_score', 'outside_expert_groups'
      yield from self.in_vain('unless expert_groups is at least 2', *names)
    has_other_scores = self.keeps_state or groups > 1
    if self.choice_policy == 'sampled' and has_other_scores:
      yield (
        "choice_policy='sampled' draws by the softmax of the logits, not by "
        f'balance_bias_rate={self.balance_bias_rate} or '
        f"expert_groups={groups}; use choice_policy='largest' with these"
      )
    if not self.keeps_state:
      names = 'balance_bias_rule', 'balance_bias_scores'
      yield from self.in_vain('unless balance_bias_rate is above 0', *names)
    elif self.balance_bias_scores != self.gate_scores:
      yield (
        f'balance_bias_scores={self.balance_bias_scores!r} does not belong to '
        f'gates={self.gates!r}, whose scores are {self.gate_scores!r}; '
        f'set balance_bias_scores={self.gate_scores!r}, or other gates: '
        "Loss-Free Balancing has gates='sigmoid'"
      )

  def problems_with(self, sizes):
    yield from steps.gate_problems(sizes, self.gates, self.second_policy)
    yield from steps.scope_problems(self, sizes)
    E, K, groups = sizes.num_experts, sizes.num_selected, self.expert_groups
    if groups == 1:
      return
    problems = list(group_problems(E, groups, self.expert_group_score))
    yield from (f'{problem} of router.expert_groups' for problem in problems)
    open_experts = self.chosen_expert_groups * E // groups
    if open_experts < K and not problems:
      yield (
        f'num_selected={K} is more than the {open_experts} experts of the '
        f'chosen_expert_groups={self.chosen_expert_groups}'
      )

  def module(self, sizes, shared, name=None):
    return TokenChoiceRouter(self, sizes, shared, name=name)

  def causality(self, sizes):
    return contract.Causality.of_queues(sizes, self.slot_priority)

  def move_state(self, state, load, rate=None):
    """{'balance_bias': the bias after a step}, which rises below mean load."""
    if rate is None:
      rate = self.balance_bias_rate
    bias = state[_BIAS]
    router_load = load[..., : bias.shape[-1]]
    rule = self.balance_bias_rule
    return {_BIAS: balance_bias.moved(bias, router_load, rate, rule)}

  def shrunk(self):
    """The options for a small model; two or more groups of experts become two.

    A token chooses one of the two.
    """
    if self.expert_groups == 1:
      return self
    return dataclasses.replace(self, expert_groups=2, chosen_expert_groups=1)


class TokenChoiceRouter(contract.Router):
  """The router whose tokens choose by the logits of a linear layer.

  A subclass may override `logits`, `scores` and `gates`.
  """

  options: TokenChoice

  def route(self, x, mask, train, token_info, layer, given=None):
    o, sizes = self.options, self.sizes
    K, capacity = sizes.num_selected, sizes.slots(mask.shape[1])
    logits = self.logits(x, train)
    scores = self.scores(logits, train)
    index = steps.chosen_experts(scores, K, given)
    slot, kept = routing.choice_slots(
      logits,
      index,
      mask,
      capacity=capacity,
      given=given,
      **steps.queue_options(self, train),
    )
    gate = self.gates(logits, index)
    losses = choice_losses(
      logits, index, gate, mask, o.balance_choices, o.balance_scores
    )
    counted = steps.largest(logits, K) if o.keeps_state else index
    losses |= steps.scope_losses(self, logits, counted, mask)
    if o.gates == 'renormalized_after_drop':
      gate = self.gates(logits, index, kept)
    rounded = steps.ROUNDINGS[o.logits_dtype]
    gate = rounded(jnp.where(kept, gate, 0.0)) * o.gate_scale
    chosen = routing.Routing(
      index, slot, gate, kept, sizes.num_experts, capacity
    )
    return chosen, steps.choice_aux(self, losses, chosen, logits, mask)

  def logits(
    self, x: Float[Array, 'G S M'], train: bool
  ) -> Float32[Array, 'G S E']:
    """The logits, from which choices, gates and losses are computed.

    In training the input x may have jitter and dropout, as the options say.
    """
    o = self.options
    x = steps.jittered(self, x, o.jitter, train)
    if train and o.input_dropout > 0:
      keep_rate = 1.0 - o.input_dropout
      key = self.make_rng(contract.NOISE)
      is_kept = jax.random.bernoulli(key, keep_rate, x.shape)
      x = jnp.where(is_kept, x / keep_rate, 0.0)
    rounded = steps.ROUNDINGS[o.logits_dtype]
    return steps.linear_logits(self, x, o.use_bias, rounded=rounded)

  def scores(
    self, logits: Float32[Array, 'G S E'], train: bool
  ) -> Float32[Array, 'G S E']:
    """The scores of experts, of which each token chooses the K largest."""
    o = self.options
    if train and o.choice_policy == 'sampled':
      # The largest of logits with Gumbel noise is drawn by the softmax, and the
      # next ones by the softmax of those that are left (arXiv:1903.06059).
      key = self.make_rng(contract.NOISE)
      return logits + jax.random.gumbel(key, logits.shape, logits.dtype)
    scores = logits
    if o.keeps_state:
      shape = (self.sizes.num_experts,)
      bias = self.variable(
        contract.ROUTER_STATE, _BIAS, jnp.zeros, shape, jnp.float32
      )
      scores = balance_bias.biased_scores(
        logits, bias.value, o.balance_bias_scores
      )
    elif o.expert_groups > 1:
      scores = balance_bias.scores_of(logits, o.gate_scores)
    if o.expert_groups == 1:
      return scores
    rule = functools.partial(
      limited_scores,
      num_groups=o.expert_groups,
      chosen_groups=o.chosen_expert_groups,
      group_score=o.expert_group_score,
      outside=o.outside_expert_groups,
    )
    # Each device limits its own groups: a compiler would not split the top-K of
    # a sharded array, but gather all groups on every device.
    return on_each_device(rule, (scores,))

  def gates(
    self,
    logits: Float32[Array, 'G S E'],
    expert_index: Int32[Array, 'G S K'],
    kept: Bool[Array, 'G S K'] | None = None,
  ) -> Float32[Array, 'G S K']:
    """The gates of chosen experts, before `gate_scale` multiplies them.

    Args:
      logits: The logits.
      expert_index: The chosen experts.
      kept: Whether each choice is served; given only for the option gates
        'renormalized_after_drop'. Default: all are.
    """
    return routing.choice_gates(logits, expert_index, self.options.gates, kept)
