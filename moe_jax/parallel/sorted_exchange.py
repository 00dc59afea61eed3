"""Applies experts without slots over a mesh: sorted rows travel and return.

Each device sorts its own tokens' rows by expert, no more rows than are needed.
Where experts are split over devices, the rows travel to them (`ragged.py`), are
sorted again there, and travel back. Where the hidden width F is split, outputs
are summed over the devices that have a part of F.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe_jax.parallel.cost_model import Sizes
from moe_jax.parallel.layout import Layout
from moe_jax.parallel.ragged import RaggedExchange
from moe_jax.parallel.shadowing import Shadowing, gathered, moved_rows, split
from moe_jax.routing import AnyRouting, ExchangeStats
from moe_jax.routing.dispatch import sorted_rows
from moe_jax.shapes import Array, Float, PRNGKey


class SortedExperts(NamedTuple):
  """Experts that multiply rows sorted by expert.

  Attributes:
    compute: The function (params [J, ...], rows [N, M], sizes [J], key) ->
      rows, where sizes are the numbers of rows of J experts, and the key is
      that of dropout, or None.
    params: The parameters, [E, ...], by name.
    axes: The logical axes of each parameter, by name.
    sizes: The sizes of an expert, from which shadowing computes costs.
  """

  compute: Callable[..., Array]
  params: Mapping[str, Array]
  axes: Mapping[str, tuple[str | None, ...]]
  sizes: Sizes

  def summed(
    self,
    params: Mapping[str, Array],
    x: Float[Array, 'G S M'],
    routing: AnyRouting,
    key: PRNGKey | None,
  ) -> Float[Array, 'G S M']:
    """The gated sums of outputs, on a device that has all experts of a routing.

    Args:
      params: The parameters of the experts of the routing.
      x: The groups of tokens.
      routing: The routing of the groups.
      key: The key of dropout; None: nothing is dropped.
    """
    with jax.named_scope('dispatch'):
      rows = sorted_rows.dispatch(x, routing)
    rows = self.compute(params, rows, routing.rows_per_expert(), key)
    with jax.named_scope('combine'):
      return sorted_rows.combine(rows, routing)


def exchange_sorted(
  experts: SortedExperts,
  x: Float[Array, 'G S M'],
  routing: AnyRouting,
  *,
  layout: Layout,
  exchange: RaggedExchange,
  shadowing: Shadowing,
  key: PRNGKey | None,
) -> tuple[Float[Array, 'G S M'], ExchangeStats]:
  """The gated sums of experts' outputs on a mesh, and counts of moved rows.

  Args:
    experts: The experts.
    x: The groups of tokens.
    routing: The routing of all groups.
    layout: The layout of groups and experts on the mesh.
    exchange: The exchange by which rows travel.
    shadowing: The options of which experts are sent to all devices.
    key: The key of dropout; None: nothing is dropped.

  Raises:
    ValueError: Experts are shadowed, but split over axes that groups are not.
  """

  def of_device(x, routing, params, key):
    """The output for one device's groups x, and counts of the rows it sends.

    A device holds some of the experts, or a part of the hidden width F of all,
    and so has these `params`. The key is that of dropout, or None.
    """
    # Devices that differ in rows, experts or part of F get different keys, so
    # that their dropout differs; devices with copies of all three get the same.
    names = sorted({*layout.groups, *layout.experts, *layout.hidden})
    key = folded(key, *map(jax.lax.axis_index, names))
    counts = routing.rows_per_expert()
    shadowed = shadowing.choose(layout, counts, experts.sizes)
    sent, staying = split(routing, shadowed)
    with jax.named_scope('dispatch'):
      rows = sorted_rows.dispatch(x, sent)
    sent_counts = sent.rows_per_expert()

    def compute(rows, sizes):
      return experts.compute(params, rows, sizes, folded(key, 1))

    if layout.experts:
      rows, overflow = exchange.exchange_rows(
        layout, rows, sent_counts, compute
      )
    else:
      rows, overflow = compute(rows, sent_counts), jnp.int32(0)
    with jax.named_scope('combine'):
      y = sorted_rows.combine(rows, sent)
    if staying is not None:
      copies = gathered(layout, params, shadowed)
      y = y + experts.summed(copies, x, staying, folded(key, 0))
    # Each device has only summed over its part of F, or over its experts.
    partial_axes = (*layout.hidden, *layout.expert_only)
    y = jax.lax.psum(y, partial_axes) if partial_axes else y
    stats = moved_rows(layout, counts, sent_counts, shadowed, overflow)
    return y, jax.tree.map(lambda leaf: leaf[None], stats)

  groups = layout.spec(layout.groups)
  specs = layout.parameter_specs(experts.axes)
  y, stats = layout.on_each_device(
    of_device, (groups, groups, specs, PartitionSpec()), groups
  )(x, routing, experts.params, key)
  return y, jax.tree.map(lambda leaf: leaf.sum(), stats)


def folded(key: PRNGKey | None, *numbers: Any) -> PRNGKey | None:
  """The key with each number folded in; None if there is no key."""
  for number in numbers:
    key = None if key is None else jax.random.fold_in(key, number)
  return key
