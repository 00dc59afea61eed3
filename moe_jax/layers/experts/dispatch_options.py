"""Options of dispatches: how tokens move to experts, and how rows multiply.

`experts.apply_experts` does what these options say. Rows in slots are
`[E, R, M]`, R for each expert, filled or empty; sorted rows are `[N, M]`, at
most one for each choice. Where experts are split over the devices of a mesh,
rows travel between devices.
"""

import dataclasses
from typing import Any, ClassVar

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
    exchange: The exchange of rows between devices, an `Exchange` or a
      `RaggedExchange`.
    shadowing: The experts that are sent to all devices, so that their tokens
      need not travel.
    by_slot: Whether every expert has equally many rows, filled or empty.
    by_mask: Whether tokens move by a product with a mask of all slots.
    drops: Whether a capacity that binds may drop choices.
  """

  by_slot: ClassVar[bool] = True
  by_mask: ClassVar[bool] = False
  drops: ClassVar[bool] = True

  exchange: Any
  shadowing: Shadowing


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


@dataclasses.dataclass(frozen=True)
class Sorted(Dropless):
  """The dispatch of sorted rows for routers that drop what exceeds a capacity.

  This dispatch computes what `Gather` does, without empty slots: experts that
  few tokens chose cost little, and experts that no token chose cost nothing.
  """

  drops: ClassVar[bool] = True
