"""The topology-aware gate: few tokens leave the node that they are on.

FasterMoE (He et al., PPoPP 2022, https://doi.org/10.1145/3503221.3508418). The
devices are those of the options, whatever devices a run has, so that no result
depends on the mesh. The G groups of a batch, or of a microbatch, lie on the W
devices in order, as even parts of a batch do, and E / W experts on each. The
rule is `moe_jax.routing.topology_rule`.

Unlike the paper, whose limit is that of a device's tokens, each group has a
limit in proportion to its size, so that groups stay independent. With one group
for each device both are the same.
"""

import dataclasses
import fractions
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from moe_jax.errors import InputError
from moe_jax.layers.routers.balancing import BalanceLoss, ImportanceLoss, ZLoss
from moe_jax.layers.routers.by_token import (
  ByLogits,
  gates_of,
  logits_aux,
  serve,
)
from moe_jax.layers.routers.contract import Router
from moe_jax.layers.routers.linear_gate import (
  LinearGate,
  jittered,
  linear_logits,
)
from moe_jax.options import above, at_least, one_of, option, within
from moe_jax.partitioning import on_each_device
from moe_jax.routing import topology_rule
from moe_jax.shapes import Array, Int32

# The name under which the router keeps counts for analysis.
_LEAVING = 'leaving'


@dataclasses.dataclass(frozen=True)
class TopologyAware(ImportanceLoss, ZLoss, BalanceLoss, LinearGate, ByLogits):
  """The options of the topology-aware gate.

  Its losses count the choices that tokens make under the limit; unlike them,
  that of FastMoE's gate counts first choices before it. A capacity is that of
  an expert in a group, and a group whose tokens stay fills the experts of its
  node alone: where it binds, Q times the factor drops as little as without a
  limit. The parameters are those of token choice, which is the same without a
  limit: an evaluation can override the router's kind.
  """

  # A column tied to another's expert would no longer tell its device.
  has_columns: ClassVar[bool] = False
  takes_choices: ClassVar[bool] = True

  variant: str = option(
    'published',
    'Rule for the tokens that leave their node: where more tokens want to '
    "than may, 'published' lets those with the highest scores keep all of "
    "their choices (FasterMoE); 'fastmoe' is the gate that FastMoE ships, for "
    "num_selected=2 and gates='renormalized', which limits first choices "
    "alone and puts a remote one in a token's second place.",
    one_of('published', 'fastmoe'),
  )
  devices: int = option(
    2,
    'Number W of devices on which experts, and the groups of a batch, lie in '
    'order; those of the network that is described, which a run need not have.',
    at_least(1),
  )
  per_node: int = option(
    1,
    'Number m of devices in each node, a divisor of devices.',
    at_least(1),
  )
  limit_by: str = option(
    'fraction',
    "Quantity from which the limit L of each group is computed: 'fraction', a "
    "share of its tokens; 'bandwidth', the share with which the links of "
    'nodes take as long as those of devices.',
    one_of('fraction', 'bandwidth'),
  )
  outgoing_fraction: float = option(
    0.14,
    'Share of the tokens of a group that may leave their node, rounded down to '
    'whole tokens (0.14 in FastMoE); 0.0 lets none leave, 1.0 all.',
    within('[0, 1]'),
    when={'limit_by': ('fraction',)},
  )
  network_gb_per_second: float = option(
    6.25,
    "Bandwidth of a node's link to other nodes, in GB/s (6.25 is 50 Gb/s).",
    above(0),
    when={'limit_by': ('bandwidth',)},
  )
  local_gb_per_second: float = option(
    15.75,
    "Bandwidth of a device's link to the others of its node, in GB/s (15.75 is "
    'PCIe 3.0 with 16 lanes).',
    above(0),
    when={'limit_by': ('bandwidth',)},
  )

  def problems(self):
    """The problems of a node's size, and of gates that FastMoE has not."""
    if self.devices % self.per_node:
      yield (
        f'devices={self.devices} is not divisible by per_node={self.per_node}'
      )
    if self.variant == 'fastmoe' and self.gates != 'renormalized':
      yield (
        f"gates={self.gates!r} with variant='fastmoe', whose gates are the "
        "softmax over the chosen logits; use gates='renormalized'"
      )

  def problems_with(self, sizes):
    """The problems of gates, and of experts that devices do not divide."""
    yield from super().problems_with(sizes)
    E, K, Q = sizes.num_experts, sizes.num_selected, self.num_nodes
    if self.variant == 'fastmoe' and K != 2:
      yield f"num_selected={K}, but variant='fastmoe' is defined for 2"
    if E % self.devices:
      yield (
        f'num_experts={E} is not divisible by the devices={self.devices} of '
        "router.kind='topology'"
      )
    elif K > E // Q:
      yield (
        f'num_selected={K} is more than the {E // Q} experts of a node, '
        f'num_experts={E} on {Q} nodes, among which a token that stays chooses'
      )

  def problem_of_groups(self, groups):
    """The reason why devices do not divide the groups."""
    if not groups % self.devices:
      return None
    return (
      f'{groups} groups in a microbatch do not divide by the '
      f"devices={self.devices} of router.kind='topology'"
    )

  @property
  def num_nodes(self) -> int:
    """Q, the number of nodes."""
    return self.devices // self.per_node

  @property
  def fraction(self) -> float:
    """The share of a group's tokens that may leave their node.

    Source: FasterMoE's L = beta_net / (m * beta_local) * n for n tokens.
    """
    if self.limit_by == 'fraction':
      return self.outgoing_fraction
    node_gb_per_second = self.per_node * self.local_gb_per_second
    return min(1.0, self.network_gb_per_second / node_gb_per_second)

  def limit(self, group_size: int) -> int:
    """L, the number of tokens that may leave a group of that many.

    Padding counts among the tokens of a group, as it does in capacities.
    """
    # Exact: 0.29 * 100 in floating point is below 29, a token too few.
    return int(fractions.Fraction(str(self.fraction)) * group_size)

  @property
  def limits(self) -> bool:
    """Whether a token's choice is ever not its own."""
    unlimited = self.variant == 'published' and self.fraction >= 1
    return self.num_nodes > 1 and not unlimited

  def nodes(self, groups: int) -> Int32[Array, ' G']:
    """The node of each of the groups.

    Where devices do not divide them, parts are as even as can be.
    """
    device = jnp.arange(groups, dtype=jnp.int32) * self.devices // groups
    return device // self.per_node

  def module(self, sizes, shared, name=None):
    """The router's linen module."""
    return TopologyAwareRouter(self, sizes, shared, name=name)

  def leak(self, sizes):
    """The reason why a limit leaks the future, and then that of slots.

    Whether a token may leave depends on the scores of later ones. Where no
    token may leave, nothing depends on later ones. A group so small that the
    limit is 0 is not known here.
    """
    if self.limits and self.fraction > 0:
      return (
        "router.kind='topology' lets the tokens with the highest scores of a "
        'group leave their node, so that later tokens change earlier outputs; '
        "use 'token_choice', or an outgoing_fraction of 0"
      )
    return super().leak(sizes)

  def decodes(self, sizes):
    """The reason why a limit is not that of tokens which come one by one."""
    del sizes
    if not self.limits:
      return None
    return (
      'the topology router chooses the tokens that leave their node in a whole '
      "group, and takes a group's node from its place in the batch; the same "
      "parameters decode with the router 'token_choice'"
    )

  def shrunk(self):
    """See `Options.shrunk`: two nodes of one device, or one."""
    small = min(self.num_nodes, 2)
    return dataclasses.replace(self, devices=small, per_node=1)


class TopologyAwareRouter(Router):
  """A linear layer, then choices under a limit; see `Router`."""

  options: TopologyAware

  def route(self, x, mask, train, router_ids, layer, given=None):
    """Routes each group by itself; see `Router`."""
    del router_ids
    o = self.options
    logits = linear_logits(self, jittered(self, x, train))
    node = o.nodes(len(mask))
    if o.limits:
      limit, Q = o.limit(mask.shape[1]), o.num_nodes
      if o.variant == 'fastmoe':
        rule = topology_rule.fastmoe_choice
      else:
        K = self.sizes.num_selected
        rule = functools.partial(topology_rule.limited_choice, num_selected=K)
      rule = functools.partial(rule, num_nodes=Q, limit=limit)
      # It runs on each device, as no compiler splits a sort over groups.
      index = on_each_device(rule, (logits, node, mask))
    else:
      index = None
    chosen, _ = serve(
      self, logits, mask, train, layer, expert_index=index, given=given
    )
    leaving = functools.partial(topology_rule.leaving, num_nodes=o.num_nodes)
    counts = on_each_device(leaving, (logits, chosen.expert_index, node, mask))
    # For analysis alone, if the caller makes 'intermediates' mutable.
    self.sow('intermediates', _LEAVING, counts)
    gate = gates_of(self, logits, chosen)
    return chosen, logits_aux(self, chosen, logits, gate, mask, layer)


def sown_leaving(layer: Mapping[str, Any]) -> topology_rule.Leaving:
  """The counts of tokens that leave, which a layer's router kept for analysis.

  Args:
    layer: The variables of one layer in the collection 'intermediates'.

  Raises:
    ValueError: The layer's router is another one, and kept none.
  """
  flat: dict[tuple[str, ...], Any] = flatten_dict(layer)
  for path, value in flat.items():
    if path[-1] == _LEAVING:
      return value[0]  # flax keeps what is sown in tuples
  raise InputError('the layer has a router that kept no counts of who leaves')
