"""The topology-aware gate: few tokens leave the node that they are on.

FasterMoE (He et al., PPoPP 2022, https://doi.org/10.1145/3503221.3508418). The
devices and nodes are those that the options describe, whatever devices a run
has, so that no result depends on the mesh. The G groups of a batch, or of a
microbatch, lie on the W devices in order, in even parts, and so do the experts,
E / W on each device. The rule is `moe_jax.routing.limited_rules`.

Unlike the paper, which limits how many tokens of a device leave their node,
each group has a limit in proportion to its size, so that groups stay
independent. With one group for each device both limits are the same.
"""

import dataclasses
import fractions
import functools
from typing import ClassVar

import jax.numpy as jnp

from moe_jax.config import option
from moe_jax.layers.routers import contract, shared_options, steps
from moe_jax.partitioning import on_each_device
from moe_jax.routing import limited_rules
from moe_jax.shapes import Array, Int32


@dataclasses.dataclass(frozen=True)
class TopologyAware(contract.RouterOptions):
  """The options of the topology-aware gate.

  The losses count the choices that tokens make under the limit on tokens that
  leave; the loss of FastMoE's gate counts first choices without the limit.

  Tokens that stay on the node of their group fill only the experts of that
  node, one of Q nodes, so that a capacity, which holds for an expert in a
  group, drops more of them. Where the capacity binds, a factor Q times as large
  drops as little as without a limit.

  The parameters are those of token choice, which is this router without a
  limit, so that an evaluation can set the router's kind to token choice.
  Experts cannot be merged, as the index of a logit tells the device of its
  expert, and a merged expert has several logits.
  """

  takes_choices: ClassVar[bool] = True

  second_policy: str = shared_options.SECOND_POLICY
  gates: str = shared_options.GATES
  slot_priority: str = shared_options.SLOT_PRIORITY
  second_threshold: float = shared_options.SECOND_THRESHOLD
  jitter: float = shared_options.JITTER
  use_bias: bool = shared_options.USE_BIAS
  balance_weight: float = shared_options.BALANCE_WEIGHT
  balance_choices: str = shared_options.BALANCE_CHOICES
  z_weight: float = shared_options.Z_WEIGHT
  importance_weight: float = shared_options.IMPORTANCE_WEIGHT
  devices: int = option(
    2,
    'Number W of devices on which experts, and the groups of a batch, lie in '
    'order; those of the network that is described, which a run need not have.',
    minimum=1,
  )
  per_node: int = option(
    1, 'Number m of devices in each node, a divisor of devices.', minimum=1
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
    yield from steps.threshold_problems(self)
    devices, m = self.devices, self.per_node
    if devices % m:
      yield f'devices={devices} is not divisible by per_node={m}'

  def problems_with(self, sizes):
    yield from steps.gate_problems(sizes, self.gates, self.second_policy)
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
    if sizes.groups % self.devices:
      yield (
        f'group_size: {sizes.groups} groups in a microbatch do not divide by '
        f"the devices={self.devices} of router.kind='topology'"
      )

  @property
  def num_nodes(self) -> int:
    """Q, the number of nodes."""
    return self.devices // self.per_node

  def limit(self, group_size: int) -> int:
    """L, the number of tokens of a group of this size that may leave its node.

    Padding counts among the tokens of a group, as it does in capacities.
    """
    # The product is computed exactly, since in floating point 0.29 * 100 is
    # below 29, so that one token too few would be allowed to leave.
    return int(fractions.Fraction(str(self.outgoing_fraction)) * group_size)

  @property
  def limits(self) -> bool:
    """Whether the limit on tokens that leave their node can change a choice."""
    return self.num_nodes > 1 and self.outgoing_fraction < 1

  def nodes(self, groups: int) -> Int32[Array, ' G']:
    """The node of each of G = `groups` groups, which lie on devices in order.

    If the number of devices does not divide that of groups, some devices have
    one group more than others.
    """
    device = jnp.arange(groups, dtype=jnp.int32) * self.devices // groups
    return device // self.per_node

  def module(self, sizes, shared, name=None):
    return TopologyAwareRouter(self, sizes, shared, name=name)

  def causality(self, sizes):
    """Later tokens change earlier outputs, as they compete to leave the node.

    They do not if `outgoing_fraction` is 0 or 1, or if there is one node.
    Groups so small that their limit rounds to 0 count as if tokens could leave,
    as the size of groups is not known here.
    """
    queues = contract.Causality.of_queues(sizes, self.slot_priority)
    if not self.limits:
      return queues
    reason = (
      'the topology router chooses the tokens that leave their node in a '
      "whole group, and takes a group's node from its place in the batch; "
      "the same parameters decode with the router 'token_choice'"
    )
    queues = queues._replace(undecodable=reason)
    if self.outgoing_fraction == 0:
      return queues
    leak = (
      "router.kind='topology' lets the tokens with the highest scores of a "
      'group leave their node, so that later tokens change earlier outputs; '
      "use 'token_choice', or an outgoing_fraction of 0"
    )
    return queues._replace(leak=leak)

  def shrunk(self):
    """The options for a small model: at most two nodes, of one device each."""
    small = min(self.num_nodes, 2)
    return dataclasses.replace(self, devices=small, per_node=1)


class TopologyAwareRouter(contract.Router):
  """A linear router that lets few tokens choose experts of other nodes."""

  options: TopologyAware

  def route(self, x, mask, train, token_info, layer, given=None):
    o, sizes = self.options, self.sizes
    K, S = sizes.num_selected, mask.shape[1]
    x = steps.jittered(self, x, o.jitter, train)
    logits = steps.linear_logits(self, x, o.use_bias)
    if o.limits:
      numbers = dict(num_selected=K, num_nodes=o.num_nodes, limit=o.limit(S))
      rule = functools.partial(limited_rules.limited_choice, **numbers)
      # Each device limits its own groups: a compiler would not split the sort
      # of a sharded array, but gather all groups on every device.
      index = on_each_device(rule, (logits, o.nodes(len(mask)), mask))
    else:
      index = steps.largest(logits, K)
    queue = steps.queue_options(self, train)
    return steps.with_linear_gates(self, logits, index, mask, given, **queue)
