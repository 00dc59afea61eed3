"""The topology-aware gate: few tokens leave the node that they are on.

FasterMoE (He et al., PPoPP 2022, https://doi.org/10.1145/3503221.3508418). The
devices are those of the options, whatever devices a run has, so that no result
depends on the mesh. The G groups of a batch, or of a microbatch, lie on the W
devices in order, as even parts of a batch do, and E / W experts on each. The
rule is `moe_jax.routing.limited_rules`.

Unlike the paper, whose limit is that of a device's tokens, each group has a
limit in proportion to its size, so that groups stay independent. With one group
for each device both are the same.
"""

import dataclasses
import fractions
import functools
from typing import ClassVar

import jax.numpy as jnp

from moe_jax.config import option
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
from moe_jax.partitioning import on_each_device
from moe_jax.routing import limited_rules
from moe_jax.shapes import Array, Int32


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

  # A column that leads to another's expert would no longer tell its device.
  has_columns: ClassVar[bool] = False
  takes_choices: ClassVar[bool] = True

  devices: int = option(
    2,
    'Number W of devices on which experts, and the groups of a batch, lie in '
    'order; those of the network that is described, which a run need not have.',
    minimum=1,
  )
  per_node: int = option(
    1,
    'Number m of devices in each node, a divisor of devices.',
    minimum=1,
  )
  outgoing_fraction: float = option(
    0.14,
    'Share of the tokens of a group that may leave their node, rounded down to '
    'whole tokens (0.14 in FastMoE); 0.0 lets none leave, 1.0 all. FasterMoE '
    'takes L = beta_net / (m beta_local) n of n tokens, with the bandwidths '
    'beta_net between nodes and beta_local within them.',
    minimum=0,
    maximum=1,
  )

  def problems(self):
    """The problem of a node's size."""
    yield from super().problems()
    if self.devices % self.per_node:
      yield (
        f'devices={self.devices} is not divisible by per_node={self.per_node}'
      )

  def problems_with(self, sizes):
    """The problems of experts that devices do not divide."""
    yield from super().problems_with(sizes)
    E, K, Q = sizes.num_experts, sizes.num_selected, self.num_nodes
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

  def limit(self, group_size: int) -> int:
    """L, the number of tokens that may leave a group of that many.

    Padding counts among the tokens of a group, as it does in capacities.
    """
    # Exact: 0.29 * 100 in floating point is below 29, a token too few.
    return int(fractions.Fraction(str(self.outgoing_fraction)) * group_size)

  @property
  def limits(self) -> bool:
    """Whether a token's choice is ever not its own."""
    return self.num_nodes > 1 and self.outgoing_fraction < 1

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
    if self.limits and self.outgoing_fraction > 0:
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
    """There are two nodes of one device, or one node."""
    small = min(self.num_nodes, 2)
    return dataclasses.replace(self, devices=small, per_node=1)


class TopologyAwareRouter(Router):
  """A linear layer, then choices under a limit; see `Router`."""

  options: TopologyAware

  def route(self, x, mask, train, router_ids, layer, given=None):
    """Routes each group by itself; see `Router`."""
    del router_ids, layer
    o = self.options
    logits = linear_logits(self, jittered(self, x, train))
    index = None
    if o.limits:
      node = o.nodes(len(mask))
      rule = functools.partial(
        limited_rules.limited_choice,
        num_selected=self.sizes.num_selected,
        num_nodes=o.num_nodes,
        limit=o.limit(mask.shape[1]),
      )
      # It runs on each device, as no compiler splits a sort over groups.
      index = on_each_device(rule, (logits, node, mask))
    chosen, _ = serve(
      self, logits, mask, train, expert_index=index, given=given
    )
    gate = gates_of(self, logits, chosen)
    return chosen, logits_aux(self, chosen, logits, gate, mask)
