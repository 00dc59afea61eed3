"""The hierarchical router: a gate over branches, and a gate in each branch.

Shazeer et al. 2017, Appendix B (https://arxiv.org/abs/1701.06538). Experts form
`a` branches of b experts each. The gate of a branch is computed for the tokens
that chose the branch alone, so that the work per token grows with a + b, not
with their product. The rule is `routing.shazeer_rules`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe_jax import routing
from moe_jax.config import option
from moe_jax.kernels import grouped_matmul
from moe_jax.layers import parameters
from moe_jax.layers.routers import contract, shared_options, steps
from moe_jax.partitioning import on_each_device
from moe_jax.routing import shazeer_rules
from moe_jax.routing.dispatch import sorted_rows
from moe_jax.routing.token_choice_rule import choice_problems
from moe_jax.shapes import Array, Float32


@dataclasses.dataclass(frozen=True)
class Hierarchical(contract.RouterOptions):
  """The options of the hierarchical router."""

  slot_priority: str = shared_options.SLOT_PRIORITY_WITHOUT_PROBABILITY
  z_weight: float = shared_options.Z_WEIGHT
  importance_weight: float = shared_options.IMPORTANCE_WEIGHT
  load_weight: float = shared_options.loss_weight(
    0.0, 'load loss of two levels (Eq. 14 of arXiv:1701.06538)'
  )
  branching: int = option(
    2,
    'Number a of branches, each of num_experts / a experts.',
    minimum=1,
  )
  branches_selected: int = option(
    1,
    'Number of branches that a token chooses in the hierarchical router; in '
    'each it chooses num_selected / branches_selected experts.',
    minimum=1,
  )
  noisy: bool = option(
    False,
    'Whether a hierarchical router has noisy gates, with kernels from zero.',
  )
  gates: str = option(
    'raw',
    "Gates at each level: 'raw' is the softmax over all branches or experts, "
    "'renormalized' makes the chosen ones' sum to one.",
    choices=('raw', 'renormalized'),
  )

  def problems(self):
    a, K1 = self.branching, self.branches_selected
    if a < K1:
      yield f'branches_selected={K1} not in [1, branching={a}]'
    if not self.noisy:
      yield from self.in_vain('unless noisy is True', 'load_weight')

  def problems_with(self, sizes):
    a, K1 = self.branching, self.branches_selected
    E, K = sizes.num_experts, sizes.num_selected
    if E % a:
      yield f'num_experts={E} does not divide by branching={a}'
    if K % K1:
      yield f'num_selected={K} does not divide by branches_selected={K1}'
    if E % a or K % K1:
      return
    named_levels = zip(self.levels(sizes), ('among branches', 'in each branch'))
    for level, level_name in named_levels:
      for text in choice_problems(**level._asdict()):
        yield f'{text} ({level_name})'

  def module(self, sizes, shared, name=None):
    return HierarchicalRouter(self, sizes, shared, name=name)

  def causality(self, sizes):
    return contract.Causality.of_queues(sizes, self.slot_priority)

  def shrunk(self):
    """The options for a small model: at most two branches, all chosen."""
    a = min(self.branches_selected, 2)
    return dataclasses.replace(self, branching=a, branches_selected=a)

  def levels(self, sizes: contract.Sizes) -> tuple['LevelSizes', 'LevelSizes']:
    """The sizes of the two gates, first over branches, then in each branch.

    The first gate chooses `branches_selected` of the a branches; the second, in
    each chosen branch, K / `branches_selected` of its E / a experts.
    """
    a, K1 = self.branching, self.branches_selected

    def level(E, K):
      # The gate of a single branch or expert is 1, whatever `gates` says.
      return LevelSizes(E, K, 'raw' if E == 1 else self.gates)

    return level(a, K1), level(sizes.num_experts // a, sizes.num_selected // K1)


class LevelSizes(NamedTuple):
  """The sizes and the kind of gates of one of a hierarchical router's levels.

  Attributes:
    num_experts: The number of branches, or of experts in a branch.
    num_selected: The number of branches, or of experts in a chosen branch, that
      a token chooses.
    gates: The option `gates`, or 'raw' where `num_experts` is 1.
  """

  num_experts: int
  num_selected: int
  gates: str


class HierarchicalRouter(contract.Router):
  """The router of two levels of linear gates: over branches, then in them.

  `w` and `w_noise` are the kernels of the primary gate, which is over branches;
  `w_branch` and `w_branch_noise` [a, M, b] are those of the gates in branches.
  """

  options: Hierarchical

  def route(self, x, mask, train, token_info, layer):
    x = x.astype(jnp.float32)
    primary, secondary = self.options.levels(self.sizes)
    logits, noise = self._primary_logits(x, primary, train)
    branch = _level(primary, logits, noise)
    logits, noise = self._branch_logits(x, branch.index, secondary, train)
    expert = _level(secondary, logits, noise)
    shape = (*branch.index.shape, secondary.num_selected)  # G, S, K1, K2
    experts, gates = expert.index.reshape(shape), expert.gate.reshape(shape)
    index, gate = shazeer_rules.flat_choices(
      branch.index, branch.gate, experts, gates, secondary.num_experts
    )
    chosen = routing.given_choice(
      index,
      gate,
      num_experts=self.sizes.num_experts,
      capacity=self.sizes.slots(x.shape[1]),
      mask=mask,
      slot_priority=self.options.slot_priority,
    )
    return chosen, shazeer_rules.levels_aux(chosen, gate, branch, expert, mask)

  def _primary_logits(self, x, level, train):
    """Logits [G, S, a] of the gate over the a branches, without and with noise.

    The second result, `NoisyLogits`, is None if the router is not noisy. `x` is
    [G, S, M] in float32, and `level` has the sizes of this gate.
    """
    axes, size = ('embed', None), level.num_experts
    clean = steps.product(self, 'w', self._init(axes), x, size)
    if not self.options.noisy:
      return clean, None
    std = steps.product(self, 'w_noise', self._init(axes), x, size)
    return clean, self._noisy(clean, std, train)

  def _branch_logits(self, x, branch_index, level, train):
    """Logits [G, S * K1, b] in the chosen branches, without and with noise.

    The logits with noise, `NoisyLogits`, are None if the router is not noisy.

    Args:
      x: The tokens, [G, S, M] in float32.
      branch_index: The K1 branches that each token chooses, [G, S, K1].
      level: The sizes of the gate in a branch, of b experts.
      train: Whether noise is drawn.
    """
    a, b = self.options.branching, level.num_experts
    # The first axis has no name: 'expert' would mark it as stacked experts.
    axes, shape = (None, 'embed', None), (a, x.shape[-1], b)
    init = self._init(axes, batch_axis=(0,))
    w = self.param('w_branch', init, shape, jnp.float32)
    if self.options.noisy:
      w_noise = self.param('w_branch_noise', init, shape, jnp.float32)
      w = jnp.concatenate([w, w_noise], -1)
    products = on_each_device(
      _branch_products, (x, branch_index), (w,), (PartitionSpec(),)
    )
    if not self.options.noisy:
      return products, None
    noise = self._noisy(products[..., :b], products[..., b:], train)
    return products[..., :b], noise

  def _init(self, axes, batch_axis=()):
    if self.options.noisy:
      return parameters.zero_kernel(axes, role=steps.ROLE)
    return parameters.kernel(
      self.shared, axes, role=steps.ROLE, batch_axis=batch_axis
    )

  def _noisy(self, clean, std, train):
    key = self.make_rng(contract.NOISE) if train else None
    return routing.noisy_logits(clean, std, key)


def _level(sizes, clean, noise) -> shazeer_rules.GateLevel:
  E, K, gates = sizes
  logits = clean if noise is None else noise.noisy
  best = steps.largest(logits, min(K + 1, E))
  index, probability = best[..., :K], None
  if noise is not None:
    probability = routing.load_probability(noise, K, best)
  gate = routing.choice_gates(logits, index, gates)
  return shazeer_rules.GateLevel(clean, index, gate, probability)


def _branch_products(x, branch_index, w) -> Float32[Array, 'G P N']:
  """Products of tokens with the kernels w [a, M, N] of their chosen branches.

  Each of the S tokens of a group, x [G, S, M], chooses the K1 branches of
  `branch_index` [G, S, K1], which hold a kernel of N columns each; P is S * K1.
  """
  K1 = branch_index.shape[-1]
  G, P = x.shape[0], x.shape[1] * K1
  index, kept = branch_index.reshape(G, P, 1), jnp.ones((G, P, 1), bool)
  slot, gate = jnp.zeros_like(index), jnp.ones(index.shape, jnp.float32)
  chosen = routing.Routing(index, slot, gate, kept, w.shape[0], capacity=None)
  rows = sorted_rows.dispatch(jnp.repeat(x, K1, axis=1), chosen)
  with jax.default_matmul_precision('highest'):
    logits = grouped_matmul(rows, w, chosen.rows_per_expert())
  return sorted_rows.combine(logits, chosen)
