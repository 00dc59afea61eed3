"""Expert parallelism that gathers tokens instead of exchanging rows.

Every device gathers the tokens of all devices that share the experts with it,
applies its own experts to them, and the outputs are summed on the way back. No
token is left behind whatever the loads are, and both collectives are those of
fully sharded data parallelism. X devices send (X - 1) M numbers a token each
way, where rows that travel are K (X - 1) / X of M numbers: for K >= X this is
the cheaper way.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe_jax.parallel.layout import Layout
from moe_jax.parallel.shadowing import moved_rows
from moe_jax.parallel.sorted_exchange import folded
from moe_jax.routing import AnyRouting, ExchangeStats
from moe_jax.shapes import Array, Float, PRNGKey


def exchange_tokens(
  summed: Callable[[Any, Array, AnyRouting, PRNGKey | None], Array],
  params: Mapping[str, Array],
  axes: Mapping[str, tuple[str | None, ...]],
  x: Float[Array, 'G S M'],
  routing: AnyRouting,
  *,
  layout: Layout,
  key: PRNGKey | None,
) -> tuple[Float[Array, 'G S M'], ExchangeStats]:
  """The gated sums of experts' outputs on a mesh, and counts of rows.

  The counts are of the rows whose experts are on other devices, as with other
  exchanges, although here all tokens travel.

  Args:
    summed: The function (params [J, ...], groups, routing, key of dropout) ->
      gated sums, for these groups, of outputs of the J experts of one device.
    params: The parameters of all experts, [E, ...], by name.
    axes: The logical axes of each parameter, by name.
    x: The groups of tokens.
    routing: The routing of all groups.
    layout: The layout of groups and experts on the mesh.
    key: The key of dropout; None: nothing is dropped.
  """
  exchanged, E = layout.exchanged, routing.num_experts
  J = E // layout.devices(layout.experts)

  def of_device(x, routing, params, key):
    names = sorted({*layout.groups, *layout.experts, *layout.hidden})
    key = folded(key, *map(jax.lax.axis_index, names))
    counts, none = routing.rows_per_expert(), jnp.zeros(0, jnp.int32)
    stats = moved_rows(layout, counts, counts, none, 0)
    with jax.named_scope('exchange'):
      x, routing = jax.tree.map(
        lambda leaf: jax.lax.all_gather(leaf, exchanged, tiled=True),
        (x, routing),
      )
    first = J * jax.lax.axis_index(layout.experts)
    number = jnp.arange(E, dtype=jnp.int32) - first
    own = routing.of_experts(jnp.where(number < 0, J, number), J)
    y = summed(params, x, own, key)
    with jax.named_scope('exchange'):
      y = jax.lax.psum_scatter(y, exchanged, tiled=True)
      partial_axes = (*layout.hidden, *layout.expert_only)
      y = jax.lax.psum(y, partial_axes) if partial_axes else y
    return y, jax.tree.map(lambda leaf: leaf[None], stats)

  groups = layout.spec(layout.groups)
  specs = layout.parameter_specs(axes)
  y, stats = layout.on_each_device(
    of_device, (groups, groups, specs, PartitionSpec()), groups
  )(x, routing, params, key)
  return y, jax.tree.map(lambda leaf: leaf.sum(), stats)
