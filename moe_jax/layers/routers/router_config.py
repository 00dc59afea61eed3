"""What a router is: its rule and the options of it, checked together.

Not here: the router itself (`router.py`).
"""

import dataclasses

from moe_jax import routing
from moe_jax.config import unknown
from moe_jax.layers.initializers import Init
from moe_jax.routing.aux_losses import BALANCE_CHOICES
from moe_jax.routing.hash_rule import HASH_OF

ROUTERS = (
  'token_choice',
  'noisy_top_k',
  'expert_choice',
  'strictly_balanced',
  'hash',
  'random',
)
# Where experts choose tokens, not tokens experts.
BY_EXPERT = ('expert_choice', 'strictly_balanced')
WITHOUT_LOGITS = ('hash', 'random')
SERVED_BY = ('chosen', 'transformers_nllb')
# Options that a router knows nothing of; other values than the defaults would
# be silently without effect.
_UNKNOWN_TO = {
  'noisy_top_k': ('balance_bias_rate',),
  **dict.fromkeys(
    BY_EXPERT,
    (
      'gates',
      'slot_priority',
      'second_policy',
      'served_by',
      'balance_bias_rate',
    ),
  ),
  **dict.fromkeys(
    WITHOUT_LOGITS,
    ('second_policy', 'jitter', 'use_bias', 'served_by', 'balance_bias_rate'),
  ),
}


@dataclasses.dataclass(frozen=True)
class RouterConfig:
  """Who goes where. Options carry the name of the paper that means them.

  Attributes:
    num_experts: E.
    num_selected: K; where experts choose, only what `capacity` makes of it.
    kind: 'token_choice' (Switch, GShard, ST-MoE, Mixtral), 'noisy_top_k'
      (Shazeer et al. 2017: both router weights start at zero),
      'expert_choice', 'strictly_balanced' (its Appendix F), 'hash' or 'random'.
      The last two have no parameters and gates of 1/K; random choices are drawn
      anew each time in training, and are the same each time in evaluation.
    capacity: The capacity rule. Under 'expert_choice' it says how many tokens
      an expert takes, and 'all' has every expert take every token. Under
      'strictly_balanced' it is that of inference: in training an expert takes
      its share of K * S.
    gates, slot_priority, second_policy, second_threshold: See
      `routing.token_choice`.
    jitter: In training the router's input is multiplied by
      U[1 - jitter, 1 + jitter] (ST-MoE, arXiv:2202.08906 section 3.2).
    balance_choices: See `routing.balance_loss`.
    use_bias: Whether the logits have a bias, which starts at zero.
    balance_bias_rate: Of Loss-Free Balancing, per step; 0: none. See
      `routing.balance_bias`.
    hash_of: What 'hash' hashes; see `routing.hash_rule.hash_ids`.
    seed: Of the tables of 'hash', and of 'random' in evaluation.
    served_by: 'chosen', or what transformers does with NLLB-MoE in place of
      it; see `routing.transformers_nllb`.
    branching: a, the branches of a router of two levels (Shazeer et al. 2017,
      Appendix B); 0: it has one. Each branch has num_experts / a experts; see
      `layers/routers/two_levels.py`.
    branches_selected: K1, how many branches a token chooses; in each it chooses
      num_selected / K1 experts.
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
  hash_of: str = 'token'
  seed: int = 0
  served_by: str = 'chosen'
  branching: int = 0
  branches_selected: int = 1
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
    if not 0 <= self.jitter < 1:
      raise ValueError(f'jitter={self.jitter} not in [0, 1)')
    if self.hash_of not in HASH_OF:
      raise unknown('hash_of', self.hash_of, HASH_OF)
    self._check_options_of_the_router()
    if self.branching:
      self._check_levels()
      return
    routing.check_token_choice(
      num_experts=self.num_experts,
      num_selected=self.num_selected,
      capacity=None,
      # Of one choice without logits, 1 is the gate and takes nothing away.
      gates='raw' if self.kind in WITHOUT_LOGITS else self.gates,
      slot_priority=self.slot_priority,
      second_policy=self.second_policy,
      second_threshold=self.second_threshold,
    )

  def _check_options_of_the_router(self):
    defaults = {f.name: f.default for f in dataclasses.fields(self)}
    for name in _UNKNOWN_TO.get(self.kind, ()):
      value = getattr(self, name)
      if value != defaults[name]:
        raise ValueError(
          f'{name}={value!r} has no meaning with router={self.kind!r}; leave '
          f'it {defaults[name]!r}'
        )
    if self.kind in WITHOUT_LOGITS and self.slot_priority == 'batch_priority':
      raise ValueError(
        f"slot_priority='batch_priority' with router={self.kind!r}, which has "
        'no probabilities to sort by'
      )

  def levels(self) -> tuple['RouterConfig', 'RouterConfig']:
    """The gate over branches and that in each branch, as routers of one level.

    A level of one has the gate 1.
    """
    a, K1 = self.branching, self.branches_selected

    def level(E, K):
      gates = 'raw' if E == 1 else self.gates
      return dataclasses.replace(
        self,
        num_experts=E,
        num_selected=K,
        gates=gates,
        branching=0,
        branches_selected=1,
      )

    return level(a, K1), level(self.num_experts // a, self.num_selected // K1)

  def _check_levels(self):
    a, K1 = self.branching, self.branches_selected
    for name, value, part in (
      ('num_experts', self.num_experts, ('branching', a)),
      ('num_selected', self.num_selected, ('branches_selected', K1)),
    ):
      if part[1] < 1 or value % part[1]:
        raise ValueError(
          f'{name}={value} does not divide by {part[0]}={part[1]}'
        )
    for name, have in (
      ('kind', ('token_choice', 'noisy_top_k')),
      ('gates', ('raw', 'renormalized')),
      ('slot_priority', ('token_major', 'choice_major')),
      ('second_policy', ('all',)),
      ('jitter', (0.0,)),
      ('use_bias', (False,)),
      ('balance_bias_rate', (0.0,)),
      ('served_by', ('chosen',)),
    ):
      if getattr(self, name) not in have:
        raise unknown(f'{name} of two levels:', getattr(self, name), have)
    self.levels()  # each checks itself
