"""Options of dispatches: how tokens move to experts, and how rows multiply.

`experts.apply_experts` does what these options say. Rows in slots are
`[E, R, M]`, R for each expert, filled or not; sorted rows are `[N, M]`, no more
than are needed. Where experts are split over the devices of a mesh, rows travel
between devices.
"""

import dataclasses
from typing import ClassVar

from moe_jax.config import Options, choice, option
from moe_jax.kernels.grouped_products import AUTO, BACKENDS
from moe_jax.parallel.exchange import EXCHANGES, Exchange
from moe_jax.parallel.ragged import RAGGED_EXCHANGES, RaggedExchange
from moe_jax.parallel.shadowing import Shadowing
from moe_jax.routing.dispatch import Dispatcher, einsum, gather

# The name of the experts' module in a sparse layer.
SCOPE = 'experts'
_SHADOWING = option(
  Shadowing(), 'Experts that are sent to all devices, while their tokens stay.'
)


class Dispatch(Options):
  """The base of the options of dispatches.

  Attributes:
    by_slot: Whether every expert has equally many rows, filled or not.
    by_mask: Whether tokens move by a product with a mask of all slots.
    drops: Whether a capacity that binds may drop choices.
  """

  by_slot: ClassVar[bool] = True
  by_mask: ClassVar[bool] = False
  drops: ClassVar[bool] = True

  def leak(self) -> str | None:
    """The reason why later tokens change earlier outputs; None if they do not.

    The text is a clause with the reason and an alternative.
    """
    return None


@dataclasses.dataclass(frozen=True)
class Gather(Dispatch):
  """The dispatch into slots that gathers rows by index, O(S K M) for a group.

  Attributes:
    dispatcher: The movement of tokens to slots and back.
  """

  dispatcher: ClassVar[Dispatcher] = gather

  exchange: Exchange = choice(
    EXCHANGES,
    'constraint',
    'Exchange by which expert rows travel between devices where experts are '
    'split over several; it has no effect on one device.',
  )
  shadowing: Shadowing = _SHADOWING

  def leak(self):
    """The reason why later tokens change earlier outputs, or None.

    They do where the exchange drops rows and experts are shadowed: the choices
    of all tokens decide which experts are shadowed, and so which rows may drop.
    """
    fraction = self.exchange.capacity_fraction
    if fraction == 1.0 or not self.shadowing.experts:
      return None
    return (
      f"the dispatch's exchange.capacity_fraction={fraction} drops rows that "
      f'shadowing.experts={self.shadowing.experts} may spare, as all tokens '
      'decide, so that later tokens change earlier outputs; use '
      'capacity_fraction=1.0'
    )


@dataclasses.dataclass(frozen=True)
class Einsum(Gather):
  """The dispatch by products with one-hot masks: the readable reference."""

  by_mask: ClassVar[bool] = True
  dispatcher: ClassVar[Dispatcher] = einsum


@dataclasses.dataclass(frozen=True)
class Dropless(Dispatch):
  """The dispatch without slots: rows sorted by expert.

  This dispatch is for routers that drop nothing. Source: MegaBlocks,
  arXiv:2211.15841.
  """

  by_slot: ClassVar[bool] = False
  drops: ClassVar[bool] = False

  backend: str = option(
    AUTO,
    "Backend of the products of sorted rows with experts' kernels, from "
    "moe_jax.kernels; 'auto' is the fastest one of the platform.",
    choices=(AUTO, *BACKENDS),
  )
  exchange: RaggedExchange = choice(
    RAGGED_EXCHANGES,
    'all_to_all',
    'Exchange by which rows travel between devices where experts are split '
    'over several; it has no effect on one device.',
  )
  shadowing: Shadowing = _SHADOWING

  def leak(self):
    """The reason why later tokens change earlier outputs, or None.

    They do where the buffers of the exchange are too small for all rows: the
    rows of a device's last experts drop first, whichever tokens they are of.
    """
    fraction = self.exchange.capacity_fraction
    if fraction == 1.0:
      return None
    return (
      f"the dispatch's exchange.capacity_fraction={fraction} drops the rows of "
      'the last experts of a device first, so that later tokens change earlier '
      'outputs; use capacity_fraction=1.0'
    )


@dataclasses.dataclass(frozen=True)
class Sorted(Dropless):
  """The dispatch of sorted rows for routers that drop what exceeds a capacity.

  This dispatch computes what `Gather` does, without empty slots: experts that
  few tokens chose cost little, and experts that no token chose cost nothing.
  """

  drops: ClassVar[bool] = True
