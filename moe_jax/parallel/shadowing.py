"""Dynamic shadowing: experts that go to all devices while their tokens stay.

FasterMoE (He et al., PPoPP 2022, https://doi.org/10.1145/3503221.3508418),
section 4.1. The parameters of a shadowed expert go to every device, whose
tokens for it stay, and its gradients go back to the device that has it. This
pays where an expert has so many tokens that all wait for its device.

The seconds of a training step in which nothing is shadowed, Lat_imbl, are those
of the products of the device with the most rows, three times, and of its four
exchanges. The seconds with r shadowed experts, Lat_shadow (equation 8), are
those of the same products, of sending parameters once and of summing gradients
once; the exchange of the other experts' rows is left out, as in the paper. All
devices have the same bandwidth.

The algorithm is greedy, and stops at the first expert that does not pay. On 200
draws of loads of 2 to 8 experts, its choice is the best of all subsets in 70 %;
a step takes 4.3 % longer than with the best subset in the mean, and 41 % longer
at most.

The numbers of rows in a step decide which experts are shadowed in that step.
Their parameters reach all devices by a sum over devices, to which only the
devices that have the parameters add numbers other than zero; so the gradients
are summed to the same devices, and the optimizer steps there alone. Nothing is
kept between steps. Devices that hold copies of the experts, along the axes
`data` and `fsdp`, choose for themselves, by the numbers of rows of the devices
that they exchange rows with.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import Options, option
from moe_jax.errors import InputError
from moe_jax.parallel.cost_model import Sizes, owners
from moe_jax.parallel.layout import Layout, own_blocks
from moe_jax.routing import AnyRouting, ExchangeStats, no_exchange
from moe_jax.routing.rows import decided
from moe_jax.shapes import Array, Float, Int, Int32, Leaf


@dataclasses.dataclass(frozen=True)
class Speeds:
  """The speeds of equal devices, in the units of FasterMoE's Algorithm 1.

  Attributes:
    flops: P, FLOPs per second of a device.
    elements: beta_net, elements per second that a device sends or receives.
  """

  flops: float
  elements: float

  @classmethod
  def of_bytes(
    cls, flops: float, bytes_per_second: float, sizes: Sizes
  ) -> 'Speeds':
    """The speeds of devices whose bandwidth is given in bytes per second.

    `flops` are FLOPs per second, and `sizes` tell the bytes of an element.
    """
    return cls(flops, bytes_per_second / sizes.bytes_per_element)


def seconds_by_number(
  counts: Any, sizes: Sizes, speeds: Speeds, most: int
) -> tuple[Any, Any]:
  """The seconds of a training step by the number of shadowed experts.

  Args:
    counts: The number of rows of each device that choose each expert, [E, W],
      of numpy or of JAX.
    sizes: The sizes of the experts.
    speeds: The speeds of the devices.
    most: R, the largest number of shadowed experts.

  Returns:
    The R experts with the most rows, of equals the lower index first, [R]; and
    the seconds with none to R of them shadowed, Lat_imbl first, [R + 1].

  Raises:
    ValueError: The experts cannot be divided over the devices, or `most` is not
      in [0, E].
  """
  E, W = counts.shape
  if not 0 <= most <= E:
    raise InputError(f'most={most} not in [0, num_experts={E}]')
  xp = counts.__array_namespace__()
  totals = counts.sum(1)
  experts = xp.argsort(-totals, stable=True)[:most]
  is_owner = owners(E, W)[:, None] == xp.arange(W)[None]  # [E, W]
  owned = is_owner * totals[:, None]
  # If an expert is shadowed, the device that has it loses all of the expert's
  # rows, and every device keeps the rows that its own tokens send there.
  changes = xp.concatenate([owned.sum(0)[None], (counts - owned)[experts]])
  rows = xp.cumsum(changes, 0).max(1)  # of the slowest device, [R + 1]
  numbers = xp.arange(most + 1)
  exchange = 4 * sizes.M / speeds.elements * rows[0]
  comm = 2 * numbers * (sizes.expert_rows / speeds.elements)
  comp = 3 * sizes.row_flops / speeds.flops * rows
  return experts, comp + xp.where(numbers == 0, exchange, comm)


def choose(counts: Any, sizes: Sizes, speeds: Speeds, *, most: int) -> Any:
  """Chooses the experts to shadow by Algorithm 1 of FasterMoE.

  Experts are shadowed in the order of their number of tokens, as long as each
  one shortens the step. Where two experts have equally many tokens, the lower
  index comes first. With more experts than devices, E = c W, device w has the c
  experts from c w on; in the paper, and for c = 1, each device has one expert.
  The function also runs inside a compiled step, where seconds are float32: if
  the seconds of two choices agree to seven digits, the choice there may be
  another than for counts of numpy.

  Args:
    counts: The number of rows of each device that choose each expert, [E, W].
    sizes: The sizes of the experts.
    speeds: The speeds of the devices.
    most: R, the largest number of shadowed experts.

  Returns:
    The indices of the shadowed experts, [R]; E where a place is unused.

  Raises:
    ValueError: W does not divide E, or `most` is not in [0, E].
  """
  experts, seconds = seconds_by_number(counts, sizes, speeds, most)
  xp = counts.__array_namespace__()
  number = xp.cumprod(seconds[1:] < seconds[:-1]).sum()
  return xp.where(xp.arange(most) < number, experts, len(counts))


def least_rows(
  number: int | float | Int[np.ndarray, ' N'], sizes: Sizes
) -> float | Float[np.ndarray, ' N']:
  """The number r F of rows in n_max > r F, the threshold that FasterMoE prints.

  If n_max, the number of rows of the busiest device, is larger, the 4 n_max M
  elements of rows in Lat_imbl are more than the 4 r M F of parameters and
  gradients in Lat_shadow. (An expert of three kernels has half as many
  parameters again, and F counts for 3/2.) If also no device has more rows than
  n_max afterwards, shadowing pays whatever the speeds are.

  Args:
    number: r, the number of shadowed experts: of one case, of each of N cases,
      or a mean.
    sizes: The sizes of the experts.
  """
  return number * sizes.expert_rows / (2 * sizes.M)


@dataclasses.dataclass(frozen=True)
class Shadowing(Options):
  """Options of how many experts, and which, are sent to all devices."""

  experts: int = option(
    0,
    'Largest number R of experts that a layer sends to all devices in a step; '
    'buffers have room for as many. 0 sends tokens alone.',
    minimum=0,
  )
  teraflops: float = option(
    11.5,
    'Speed of a device in 10^12 FLOPs per second, by which Algorithm 1 '
    'decides; the default is that of the public code.',
    above=0,
  )
  gigabytes: float = option(
    6.25,
    'Bandwidth of a device in 10^9 bytes per second each way, by which '
    'Algorithm 1 decides; the default is that of the public code.',
    above=0,
  )

  def choose(
    self, layout: Layout, counts: Int32[Array, ' E'], sizes: Sizes | None
  ) -> Int32[Array, ' R']:
    """The indices of the R shadowed experts; called under `shard_map`.

    A place without an expert has the index E. If no rows are exchanged between
    devices, no expert is shadowed, and R = 0.

    Args:
      layout: The layout of groups and experts.
      counts: The number of this device's rows of each expert.
      sizes: The sizes of an expert; None if none can be shadowed.

    Raises:
      ValueError: Experts are split over axes that groups are not split over.
    """
    E = len(counts)
    if not self.experts or not layout.exchanged or sizes is None:
      return jnp.zeros(0, jnp.int32)
    if layout.expert_only:
      raise InputError(
        f'shadowing.experts={self.experts} needs experts that are split over '
        f'axes of groups alone; they are split over {layout.experts}, groups '
        f'over {layout.groups}'
      )
    counts = jax.lax.all_gather(counts, layout.exchanged).reshape(-1, E).T
    # A device has a part of each expert where the hidden width is split.
    sizes = sizes._replace(F=sizes.F // layout.devices(layout.hidden))
    speeds = Speeds.of_bytes(self.teraflops * 1e12, self.gigabytes * 1e9, sizes)
    most = min(self.experts, E)
    chosen = choose(counts, sizes, speeds, most=most)
    # The choice is saved, so that the backward pass cannot choose otherwise.
    return decided(chosen.astype(jnp.int32))


def split(
  routing: AnyRouting, shadowed: Int32[Array, ' R']
) -> tuple[AnyRouting, AnyRouting | None]:
  """The choices of a device whose rows travel, and those whose rows stay.

  Args:
    routing: The routing of the device's groups.
    shadowed: The indices of the shadowed experts; E where a place is unused.

  Returns:
    The choices of all experts but the shadowed ones, and those of the R
    shadowed experts, under the indices 0 to R - 1; None if no expert can be
    shadowed.
  """
  E, R = routing.num_experts, len(shadowed)
  if not R:
    return routing, None
  number = jnp.full(E, R, jnp.int32)
  number = number.at[shadowed].set(jnp.arange(R, dtype=jnp.int32), mode='drop')
  experts = jnp.arange(E, dtype=jnp.int32)
  sent = routing.of_experts(jnp.where(number < R, E, experts), E)
  return sent, routing.of_experts(number, R)


def gathered(
  layout: Layout, p: Mapping[str, Leaf], shadowed: Int32[Array, ' R']
) -> dict[str, Array]:
  """The parameters of shadowed experts, [R, ...], on every device.

  The function is called under `shard_map`. It sums over the devices that rows
  travel between. The parameters are zeros where `shadowed` is E.

  Args:
    layout: The layout of groups and experts.
    p: The parameters of the experts of this device, [J, ...].
    shadowed: The indices of the shadowed experts; E where a place is unused.
  """

  def sum_over_devices(x):
    J = len(x)
    first = J * jax.lax.axis_index(layout.exchanged)
    index = shadowed - first
    is_local = (index >= 0) & (index < J)
    local = x[jnp.where(is_local, index, 0)]
    local = jnp.where(is_local.reshape(-1, *[1] * (x.ndim - 1)), local, 0)
    return jax.lax.psum(local, layout.exchanged)

  with jax.named_scope('shadow'):
    return {name: sum_over_devices(x) for name, x in p.items()}


def moved_rows(
  layout: Layout,
  counts: Int32[Array, ' E'],
  sent: Int32[Array, ' E'],
  shadowed: Int32[Array, ' R'],
  overflow: Leaf,
) -> ExchangeStats:
  """The counts of rows that one device sends, under `shard_map`.

  Args:
    layout: The layout of groups and experts.
    counts: The number of this device's rows of each expert.
    sent: The number of this device's rows of each expert, 0 for shadowed
      experts.
    shadowed: The indices of the shadowed experts; E where a place is unused.
    overflow: The number of this device's rows for which the exchange had no
      room; where `expert_only` axes split the experts, only rows for experts of
      this device's part are counted.
  """
  if not layout.exchanged:
    return no_exchange()

  def away(counts):
    """How many of the rows in `counts` [E] have an expert elsewhere."""
    blocks = own_blocks(layout, counts).sum(1)  # [X]
    return blocks.sum() - blocks[jax.lax.axis_index(layout.exchanged)]

  values = [away(counts), away(sent), overflow]
  # Along the axes `expert_only`, each device has counted the rows of its own
  # part of the experts.
  if layout.expert_only:
    values = jax.lax.psum(values, layout.expert_only)
  # All devices that exchange rows with each other have chosen the same experts,
  # so that each counts a share of them.
  share = 1.0 / layout.devices(layout.exchanged)
  chosen = share * (shadowed < len(counts)).sum()
  values = (*values[:2], chosen, share, values[2])
  return ExchangeStats(*(jnp.asarray(x, jnp.float32) for x in values))
