"""The contract between routers and dispatchers, and the capacity rules.

A router turns logits into one `Routing`, or, where experts choose, one
`SlotRouting`; every dispatcher takes either. Not here: any router, or how
tokens move.
"""

import dataclasses
import functools
import math
from fractions import Fraction

import jax
from jax.ad_checkpoint import checkpoint_name

from moe_jax.config import unknown
from moe_jax.shapes import Leaf

# What a remat policy calls the routers' decisions.
DECISION = 'routing'


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['expert_index', 'slot', 'gate', 'kept'],
  meta_fields=['num_experts', 'capacity'],
)
@dataclasses.dataclass(frozen=True)
class Routing:
  """Where each choice of each token goes, in index form.

  Attributes:
    expert_index: int32 [G, S, K], in [0, E), also where nothing is kept.
    slot: int32 [G, S, K], the choice's place in its expert's queue, from 0. A
      choice that never queued (padding, a second choice not sent) has 0.
    gate: float32 [G, S, K], the weight of the expert's output; 0 where the
      choice is not kept.
    kept: bool [G, S, K], whether the choice is served. A served choice has
      slot < capacity, and no two served choices of a group share an expert
      and a slot.
    num_experts: E.
    capacity: C, or None where experts are unbounded.
  """

  expert_index: Leaf
  slot: Leaf
  gate: Leaf
  kept: Leaf
  num_experts: int
  capacity: int | None


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['token_index', 'gate'],
  meta_fields=['group_size'],
)
@dataclasses.dataclass(frozen=True)
class SlotRouting:
  """Who sits in each slot of each expert: a routing where experts choose.

  A token may be in the slots of any number of experts, in one of each.

  Attributes:
    token_index: int32 [G, E, C], in [0, S); S where the slot is empty.
    gate: float32 [G, E, C], the weight of the expert's output; 0 where empty.
    group_size: S.
  """

  token_index: Leaf
  gate: Leaf
  group_size: int

  @property
  def num_experts(self) -> int:
    """E."""
    return self.gate.shape[1]

  @property
  def capacity(self) -> int:
    """C."""
    return self.gate.shape[2]

  @property
  def filled(self) -> Leaf:
    """Bool [G, E, C], whether somebody sits there."""
    return self.token_index < self.group_size


def decided(index: Leaf) -> Leaf:
  """Names an array of integers that a remat policy may save.

  It is small, and making it again is a top-K or a sort.
  """
  return checkpoint_name(index, DECISION)


CAPACITY_RULES = ('per_token', 'per_assignment', 'fraction', 'fixed', 'all')
_ROUNDINGS = {'ceil': math.ceil, 'floor': math.floor, 'round': round}


@dataclasses.dataclass(frozen=True)
class CapacityRule:
  """How many slots an expert has in each group.

  The papers and codebases mean two things by a capacity factor, hence the
  rule's name says which.

  Attributes:
    rule: 'per_token' is factor * S / E (Switch, ST-MoE, GShard, whose 2.0 at
      K=2 is 2 * S / E). 'per_assignment' is factor * K * S / E (V-MoE,
      MegaBlocks). 'fraction' is factor * S (NLLB's evaluation), rounded up
      from the floating-point product as fairseq and transformers do. 'fixed'
      is `slots`. 'all' has room for every token.
    factor: The capacity factor of the first three rules.
    rounding: 'ceil' (V-MoE), 'floor' (Mesh TensorFlow) or 'round' (flaxformer;
      half to even), applied to the exact quotient, before the rest; not under
      'fraction'.
    multiple: The capacity is rounded up to a multiple of this (V-MoE: 4).
    minimum: The least capacity (flaxformer: 4).
    slots: The capacity under 'fixed'.
  """

  rule: str = 'per_token'
  factor: float = 1.25
  rounding: str = 'ceil'
  multiple: int = 1
  minimum: int = 1
  slots: int = 0

  def __post_init__(self):
    if self.rule not in CAPACITY_RULES:
      raise unknown('capacity_rule', self.rule, CAPACITY_RULES)
    if self.rounding not in _ROUNDINGS:
      raise unknown('capacity_rounding', self.rounding, _ROUNDINGS)
    if self.rule == 'fixed' and self.slots < 1:
      raise ValueError(f"capacity_rule='fixed' needs slots={self.slots} >= 1")
    if not (math.isfinite(self.factor) and self.factor > 0):
      raise ValueError(f'capacity_factor={self.factor} must be positive')
    for name in ('multiple', 'minimum'):
      if getattr(self, name) < 1:
        raise ValueError(f'capacity_{name}={getattr(self, name)} must be >= 1')

  def __call__(
    self, *, group_size: int, num_experts: int, num_selected: int
  ) -> int:
    """Slots per expert and group, C in [1, S], a Python int.

    No rule gives more than S: a token takes at most one slot of an expert.
    """
    S, E, K = group_size, num_experts, num_selected
    if self.rule == 'all':
      return S
    if self.rule == 'fixed':
      return min(self.slots, S)
    if self.rule == 'fraction':
      return min(math.ceil(self.factor * S), S)
    # Exact: 1.1 * 100 / 10 in floating point is over 11, a slot too many.
    quotient = Fraction(str(self.factor)) * S / E
    if self.rule == 'per_assignment':
      quotient *= K
    slots = max(_ROUNDINGS[self.rounding](quotient), self.minimum)
    slots = -(-slots // self.multiple) * self.multiple
    return min(slots, S)


def is_causal(
  *,
  slot_priority: str,
  num_selected: int,
  capacity_rule: str,
  router: str = 'token_choice',
) -> bool:
  """Whether outputs up to t never change when later tokens of the row do.

  Token-major slots are taken in the order of the sequence, so a token's fate
  is settled by those before it. Choice-major slots let a later token's first
  choice evict an earlier one's second, and batch priority sorts by the whole
  group: both leak the future wherever capacity can bind. So does an expert
  that chooses among all tokens of the group, as in training under
  'strictly_balanced'.
  """
  if router == 'strictly_balanced':
    return False
  if router == 'expert_choice':
    return capacity_rule == 'all'
  if capacity_rule == 'all' or slot_priority == 'token_major':
    return True
  return slot_priority == 'choice_major' and num_selected == 1
