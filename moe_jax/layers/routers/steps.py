"""The steps that several routers share, as functions of a router's module.

The functions compute logits, choices, losses and statistics. All numbers are
float32 whatever the model's dtype (Table 2 of arXiv:2101.03961).
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from moe_jax import routing
from moe_jax.kernels.rows_product import rows_matmul
from moe_jax.layers import parameters
from moe_jax.layers.routers import contract
from moe_jax.partitioning import on_each_device
from moe_jax.routing.aux_losses import (
  balance_of_rows,
  balance_probs,
  choice_losses,
  cv_squared,
  over_groups,
)
from moe_jax.routing.capacity import CAPACITIES
from moe_jax.routing.given_choice_rule import GivenChoices
from moe_jax.routing.token_choice_rule import choice_problems
from moe_jax.shapes import Array, Bool, Float, Float32, Int32

# Functions that round float32 numbers to the precision of a type, by the type's
# name. The rounded numbers, and all that is computed from them, stay float32.
ROUNDINGS = {
  'float32': lambda x: x,
  'bfloat16': lambda x: jax.lax.reduce_precision(x, 8, 7),
}
# The logical axes of a router's kernel [M, E]. The second is not 'expert', as
# that name marks kernels that are stacked by expert.
AXES = ('embed', 'expert_choice')
ROLE = 'router'
# The reason why routers whose experts choose tokens are not causal.
EXPERTS_CHOOSE = (
  'an expert chooses among all tokens of a group, which lets later tokens '
  'change earlier outputs; use another router'
)


# Functions that compute logits.


def jittered(
  module: contract.Router, x: Float[Array, 'G S M'], jitter: float, train: bool
) -> Float32[Array, 'G S M']:
  """The input x in float32, in training with noise of the rng 'router'.

  The noise multiplies each number by a factor that is drawn uniformly from
  [1 - jitter, 1 + jitter]; 0.0: no noise.
  """
  x = x.astype(jnp.float32)
  if train and jitter > 0:
    low, high = 1.0 - jitter, 1.0 + jitter
    key = module.make_rng(contract.NOISE)
    x = x * jax.random.uniform(key, x.shape, x.dtype, low, high)
  return x


def linear_logits(
  module: contract.Router,
  x: Float32[Array, 'G S M'],
  use_bias: bool,
  init: Initializer | None = None,
  rounded: Callable[[Array], Array] = ROUNDINGS['float32'],
) -> Float32[Array, 'G S E']:
  """The logits x times `w`, plus `b` if there is a bias.

  Args:
    module: The router, which makes the parameters `w` and `b`.
    x: The input in float32, with noise if it has any.
    use_bias: Whether there is a bias.
    init: The initialiser of the kernel. Default: the model's.
    rounded: Function that rounds input, kernel and logits, one of `ROUNDINGS`.
  """
  E = module.sizes.num_experts
  init = init or parameters.kernel(module.shared, AXES, role=ROLE)
  logits = product(module, 'w', init, x, E, rounded)
  if use_bias:
    init = parameters.bias(AXES[1:], role=ROLE)
    logits = logits + module.param('b', init, (E,), jnp.float32)[None, None]
  return rounded(logits)


def product(
  module: contract.Router,
  name: str,
  init: Initializer,
  x: Float32[Array, 'G S M'],
  size: int,
  rounded: Callable[[Array], Array] = ROUNDINGS['float32'],
) -> Float32[Array, 'G S E']:
  """The product of x with a kernel [M, size], which the module makes as `name`.

  E is `size`. Both factors are rounded by `rounded`, one of `ROUNDINGS`, before
  they are multiplied; `init` is the initialiser of the kernel.
  """
  G, S, M = x.shape
  w = module.param(name, init, (M, size), jnp.float32)
  x = rounded(x.reshape(G * S, M))
  logits = rows_matmul(x, rounded(w), jax.lax.Precision.HIGHEST)
  return logits.reshape(G, S, -1)


# Functions that choose experts, and that give their slots to the choices.


def largest(
  scores: Float32[Array, 'G S E'], count: int
) -> Int32[Array, 'G S N']:
  """Each token's N = `count` experts of the largest scores, the largest first.

  Ties go to the expert of the lower index.
  """
  # Each device chooses for its own groups: a compiler would not split the top-K
  # of a sharded array, but gather all groups on every device.
  choose = functools.partial(routing.choose, num_selected=count)
  return on_each_device(choose, (scores,))


def chosen_experts(
  scores: Float32[Array, 'G S E'], count: int, given: GivenChoices | None
) -> Int32[Array, 'G S K']:
  """The experts of the K = `count` largest scores, or those that are imposed.

  `given`, if not None, imposes choices; where it is below 0, the scores choose.
  """
  index = largest(scores, count)
  return index if given is None else given.in_place_of(index)


def queue_options(module: contract.Router, train: bool) -> dict[str, Any]:
  """The arguments of `routing.choice_slots`, by name, that options decide.

  They are `slot_priority`, the order of slots, `second_policy` for choices
  after the first, with its `second_threshold`, and the `key` from which it
  draws; None where nothing is drawn.
  """
  o, key = module.options, None
  if train and o.second_policy != 'all' and module.sizes.num_selected > 1:
    key = module.make_rng(contract.NOISE)
  return dict(
    slot_priority=o.slot_priority,
    second_policy=o.second_policy,
    second_threshold=o.second_threshold,
    key=key,
  )


def with_linear_gates(
  module: contract.Router,
  logits: Float32[Array, 'G S E'],
  expert_index: Int32[Array, 'G S K'],
  mask: Bool[Array, 'G S'],
  given: GivenChoices | None,
  clean: Float32[Array, 'G S E'] | None = None,
  **queue: Any,
) -> tuple[routing.Routing, routing.MoeAux]:
  """The routing of choices with gates by logits, its losses and statistics.

  Args:
    module: The router. Its option `gates` names the function from logits to
      gates, and `balance_choices` the choices that the balance loss counts.
    logits: The logits that make the gates, with their noise if they have any.
    expert_index: The choices.
    mask: False for padding.
    given: Choices that are imposed instead of `expert_index`, or None.
    clean: The logits without noise, of which losses and statistics are
      computed. Default: `logits`.
    **queue: Arguments of `routing.token_choice`, such as `queue_options` makes.
  """
  o, clean = module.options, logits if clean is None else clean
  if given is not None:
    expert_index = given.in_place_of(expert_index)
  chosen = routing.token_choice(
    logits,
    num_selected=module.sizes.num_selected,
    capacity=module.sizes.slots(mask.shape[1]),
    mask=mask,
    gates=o.gates,
    expert_index=expert_index,
    given=given,
    **queue,
  )
  gate = routing.choice_gates(logits, expert_index, o.gates)
  losses = choice_losses(clean, expert_index, gate, mask, o.balance_choices)
  return chosen, choice_aux(module, losses, chosen, clean, mask)


def with_equal_gates(
  module: contract.Router,
  expert_index: Int32[Array, 'G S K'],
  mask: Bool[Array, 'G S'],
  given: GivenChoices | None = None,
) -> tuple[routing.Routing, routing.MoeAux]:
  """The routing of choices without logits: gates of 1/K, and no losses.

  Args:
    module: The router, whose options have `slot_priority`.
    expert_index: The choices.
    mask: False for padding.
    given: Choices that are imposed instead of `expert_index`, or None.
  """
  if given is not None:
    expert_index = given.in_place_of(expert_index)
  chosen = routing.even_choice(
    expert_index,
    num_experts=module.sizes.num_experts,
    capacity=module.sizes.slots(mask.shape[1]),
    mask=mask,
    slot_priority=module.options.slot_priority,
    given=given,
  )
  return chosen, choice_aux(module, {}, chosen, None, mask)


def gate_problems(
  sizes: contract.Sizes, gates: str, second_policy: str = 'all'
) -> Iterator[str]:
  """The reasons why gates and second policy do not fit E and K, as texts."""
  yield from choice_problems(
    num_experts=sizes.num_experts,
    num_selected=sizes.num_selected,
    gates=gates,
    second_policy=second_policy,
  )


def threshold_problems(options: Any) -> Iterator[str]:
  """Yields a text if `second_threshold` is set and has no effect."""
  if options.second_policy != 'threshold':
    reason = "unless second_policy is 'threshold'"
    yield from options.in_vain(reason, 'second_threshold')


def drop_problems(sizes: contract.Sizes) -> Iterator[str]:
  """Yields a text if the capacity binds, for routers by sentence or by task.

  All tokens of a sentence or a task choose the same experts, so that most of
  them would be dropped.
  """
  if sizes.capacity.binds:
    yield (
      f'capacity.kind={CAPACITIES.name_of(sizes.capacity)!r} can drop most '
      'tokens of a sentence or a task, which all choose the same experts; '
      "use 'all'"
    )


# Functions that compute losses and statistics, sums over real tokens.


def choice_aux(
  module: contract.Router,
  losses: dict[str, Array],
  chosen: routing.AnyRouting,
  logits: Float32[Array, 'G S E'] | None,
  mask: Bool[Array, 'G S'],
) -> routing.MoeAux:
  """The losses, with the statistics of a routing and of its logits.

  Args:
    module: The router, which also keeps the logits for analysis.
    losses: The losses by name, sums over real tokens.
    chosen: The routing.
    logits: The logits without noise; None for a router without logits.
    mask: False for padding.
  """
  if logits is not None:
    module.sow(contract.SOWN, contract.LOGITS, logits)
  stats = routing.routing_stats(chosen, logits, mask, module.sizes.num_selected)
  return routing.MoeAux(losses, stats, routing.no_exchange())


def slot_aux(
  module: contract.Router,
  chosen: routing.Routing,
  logits: Float32[Array, 'G S E'],
  mask: Bool[Array, 'G S'],
) -> routing.MoeAux:
  """The losses and statistics of a router whose experts choose tokens.

  The losses are z-loss and importance loss. The logits have no noise; the mask
  is False for padding.
  """
  importance = cv_squared(chosen.gate.sum(-1))
  losses = {
    'z_loss': over_groups(routing.z_loss(logits, mask), mask),
    'importance_loss': over_groups(importance, mask),
  }
  return choice_aux(module, losses, chosen, logits, mask)


def scope_losses(
  module: contract.Router,
  logits: Float32[Array, 'G S E'],
  expert_index: Int32[Array, 'G S K'],
  mask: Bool[Array, 'G S'],
) -> dict[str, Float32[Array, '']]:
  """The balance losses of sequences, of sets of sequences, and of the batch.

  The result has 'sequence_balance_loss', of each sequence (row of the batch) by
  itself, 'batch_balance_loss', of each `batch_balance_rows` consecutive
  sequences, and 'global_balance_loss', of all: sums over sets, each times its
  number of real tokens.

  Args:
    module: The router, whose options weigh the losses; a loss whose weight is 0
      is 0.
    logits: The logits without noise.
    expert_index: The choices that the losses count.
    mask: False for padding.
  """
  o, (G, S) = module.options, mask.shape
  T = module.sizes.row_length or S
  rows = {
    'sequence_balance_loss': 1,
    'batch_balance_loss': o.batch_balance_rows,
    'global_balance_loss': -(-G * S // T),
  }
  losses, weights = dict.fromkeys(rows, jnp.float32(0)), o.loss_weights()
  rows = {name: count for name, count in rows.items() if weights[name]}
  if not rows:
    return losses
  probs, choices = balance_probs(logits, o.balance_scores), o.balance_choices
  return losses | balance_of_rows(probs, expert_index, mask, T, rows, choices)


def scope_problems(options: Any, sizes: contract.Sizes) -> Iterator[str]:
  """Yields a text if a microbatch lacks sequences that a balance loss needs."""
  weight, batch_rows = options.global_balance_weight, options.batch_balance_rows
  if weight and sizes.microbatches > 1:
    yield (
      f'router: global_balance_weight={weight} with '
      f'microbatches={sizes.microbatches}: a microbatch does not show the '
      'loads of the batch; use batch_balance_weight with batch_balance_rows, '
      'or microbatches=1'
    )
  elif options.batch_balance_weight and sizes.rows % batch_rows:
    yield (
      f'router: batch_balance_rows={batch_rows} does not divide the '
      f'{sizes.rows} rows of a microbatch'
    )
