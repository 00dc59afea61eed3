"""Balance losses of other parts of a batch than its routing groups.

Loads can be even in each sequence, on each device, or in a whole batch; the
wider the scope, the more an expert may specialise (arXiv:2501.11873). Several
losses count at once, each with its own weight. The loss of each routing group,
`balance_weight`, is in `balancing.py`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from moe_jax.config import option
from moe_jax.layers.routers.balancing import BalanceLoss, loss_weight
from moe_jax.layers.routers.by_token import largest
from moe_jax.layers.routers.contract import Router
from moe_jax.routing.aux_losses import balance_of_parts, balance_sums
from moe_jax.routing.balance_bias import SCORES
from moe_jax.shapes import Array, Bool, Float32, Int32


@dataclasses.dataclass(frozen=True)
class ScopedBalanceLoss(BalanceLoss):
  """The options of a router with balance losses of several scopes."""

  sequence_balance_weight: float = loss_weight(
    0.0,
    'balance loss of each row of the batch by itself, whatever the groups are '
    '(Eq. 12 of arXiv:2401.06066, DeepSeekMoE; Eq. 17 of arXiv:2412.19437, '
    'V3). With a balancing bias, this loss and those of other scopes count the '
    'K best experts without bias and groups of experts (Eq. 18 there)',
  )
  batch_balance_weight: float = loss_weight(
    0.0,
    'balance loss of every batch_balance_rows consecutive rows, such as those '
    'of one device',
  )
  batch_balance_rows: int = option(
    8,
    'Number of consecutive rows of the batch over which batch_balance_weight '
    'counts loads and probabilities, whatever devices a run has.',
    minimum=1,
    same_function=True,
  )
  global_balance_weight: float = loss_weight(
    0.0,
    'balance loss of the whole batch of a step, over all devices '
    '(arXiv:2501.11873); the batch must not be split into microbatches',
  )
  balance_scores: str = option(
    'softmax',
    'Probabilities of all balance losses, that of balance_weight too: the '
    "'softmax' of the logits, or each 'sigmoid' divided by the sum of all of "
    "the token's (Eq. 19 of arXiv:2412.19437, DeepSeek-V3).",
    choices=SCORES,
    same_function=True,
  )

  def balance_probs(self, logits):
    """The probabilities by `balance_scores`; see `BalanceLoss`."""
    if self.balance_scores == 'sigmoid':
      logits = jax.nn.log_sigmoid(logits)
    return super().balance_probs(logits)

  def problem_of_rows(self, rows, microbatches):
    """The reason why microbatches do not show what a loss counts."""
    if self.global_balance_weight and microbatches > 1:
      return (
        f'global_balance_weight={self.global_balance_weight} with '
        f'microbatches={microbatches}: a microbatch does not show the loads of '
        'the batch; use batch_balance_weight with batch_balance_rows, or '
        'microbatches=1'
      )
    remainder = self.batch_balance_weight and rows % self.batch_balance_rows
    if not remainder:
      return None
    return (
      f'batch_balance_rows={self.batch_balance_rows} does not divide the '
      f'{rows} rows of a microbatch'
    )


def scoped_losses(
  module: Router,
  logits: Float32[Array, 'G S E'],
  expert_index: Int32[Array, 'G S K'] | None,
  mask: Bool[Array, 'G S'],
) -> dict[str, Float32[Array, '']]:
  """The losses of `ScopedBalanceLoss` by name; those without weight are 0.

  They are totals, as those of `MoeAux`.

  Args:
    module: The router.
    logits: The logits without noise.
    expert_index: The experts that tokens chose; None: losses count the K
      largest logits of a token instead, as Eq. 18 of arXiv:2412.19437 does.
    mask: False for padding.
  """
  o, (G, S) = module.options, mask.shape
  T = module.sizes.row_length or S
  rows = {
    'sequence_balance': 1,
    'batch_balance': o.batch_balance_rows,
    'global_balance': -(-G * S // T),
  }
  zero = jnp.zeros((), jnp.float32)
  losses = {f'{name}_loss': zero for name in rows}
  rows = {name: n for name, n in rows.items() if getattr(o, f'{name}_weight')}
  if not rows:
    return losses
  if expert_index is None:
    expert_index = largest(logits, module.sizes.num_selected)
  # Rows and groups are cut into parts that lie in one of each.
  unit = math.gcd(S, T)
  sums = balance_sums(
    o.balance_probs(logits), expert_index, mask, unit, o.balance_choices
  )
  return losses | {
    f'{name}_loss': balance_of_parts(sums, n * T // unit)
    for name, n in rows.items()
  }
