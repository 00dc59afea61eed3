"""The seconds of a smart schedule, in which exchange and products overlap.

FasterMoE (He et al., PPoPP 2022, https://doi.org/10.1145/3503221.3508418),
section 4.2: W devices are g groups on a ring. In step j, group i sends the rows
that group (i - j) mod g has experts for (S_j), multiplies those that it has got
from group (i + j) mod g (C_j), and gives the results back (R_j). A device sends
in one stream, S_0 to S_{g-1}, then shadowed experts, then R_0 to R_{g-1}, and
multiplies in another, C_0 to C_{g-1}, then its rows of shadowed experts. S_j
comes before C_j, and C_j before R_j.

Nothing here is measured: the seconds are those of a described machine, on
which a step of the exchange ends for all devices when its slowest link has
carried its bytes. The paper does not say in what order the backward pass runs.
Here it has the same steps, but shadowed experts first, whose products wait for
nothing, so that their gradients are summed between the S and the R.

Not here: the schedule itself, and the machine without it (`cost_model.py`).
"""

from typing import NamedTuple

import numpy as np

from moe_jax.errors import InputError
from moe_jax.parallel.cost_model import Sizes, owners, received_rows
from moe_jax.parallel.topology import Topology
from moe_jax.shapes import Bool, Float, Int


class Stages(NamedTuple):
  """The seconds of all operations of one pass of a layer.

  The first axis is of layers, or of steps of training, that are independent.

  Attributes:
    send: The seconds of each S_j.
    compute: The seconds of each C_j, on each device.
    give_back: The seconds of each R_j.
    shadow_send: The seconds in which parameters of shadowed experts are sent to
      all devices, or their gradients summed.
    shadow_compute: The seconds of each device's rows of shadowed experts.
  """

  send: Float[np.ndarray, 'N g']
  compute: Float[np.ndarray, 'N g W']
  give_back: Float[np.ndarray, 'N g']
  shadow_send: Float[np.ndarray, ' N']
  shadow_compute: Float[np.ndarray, 'N W']

  @property
  def comm(self) -> Float[np.ndarray, ' N']:
    """Seconds of all that is sent."""
    return self.send.sum(-1) + self.shadow_send + self.give_back.sum(-1)

  @property
  def comp(self) -> Float[np.ndarray, ' N']:
    """Seconds of all products of the slowest device."""
    return (self.compute.sum(-2) + self.shadow_compute).max(-1)

  @property
  def sequential(self) -> Float[np.ndarray, ' N']:
    """Seconds of the pass if nothing overlaps."""
    return self.comm + self.comp

  @property
  def overlapped(self) -> Float[np.ndarray, ' N']:
    """Seconds of the pass if all that can overlap does: a lower bound."""
    return np.maximum(self.comm, self.comp)


class Step(NamedTuple):
  """The two passes of a training step."""

  forward: Stages
  backward: Stages

  @property
  def comm(self) -> Float[np.ndarray, ' N']:
    """Seconds of all that is sent."""
    return self.forward.comm + self.backward.comm

  @property
  def comp(self) -> Float[np.ndarray, ' N']:
    """Seconds of all products of the slowest device."""
    return self.forward.comp + self.backward.comp

  @property
  def sequential(self) -> Float[np.ndarray, ' N']:
    """Seconds of the step if nothing overlaps."""
    return self.comm + self.comp

  @property
  def overlapped(self) -> Float[np.ndarray, ' N']:
    """Seconds of the step if all that can overlap does: a lower bound.

    It is that of the paper, max(comm, comp) of the whole step.
    """
    return np.maximum(self.comm, self.comp)

  @property
  def scheduled(self) -> Float[np.ndarray, ' N']:
    """Seconds of the step by the schedule."""
    return forward_seconds(self.forward) + backward_seconds(self.backward)


def step(
  topology: Topology,
  counts: Int[np.ndarray, 'N E W'],
  sizes: Sizes,
  *,
  num_groups: int = 1,
  shadowed: Bool[np.ndarray, 'N E'] | None = None,
) -> Step:
  """The operations of a training step of a layer.

  The backward pass sends gradients of as many bytes, and has two products for
  each of the forward pass.

  Args:
    topology: The machine.
    counts: The number of rows of each device that choose each expert, in each
      of N layers, or steps.
    sizes: The sizes of the experts.
    num_groups: g, the number of groups; with one group an exchange is a single
      all-to-all.
    shadowed: Whether each expert is shadowed; None for no expert.

  Raises:
    ValueError: The counts are not those of the topology's devices, or these
      cannot be divided into as many groups.
  """
  E, W = counts.shape[1:]
  if topology.num_devices != W:
    raise InputError(
      f'counts of {W} devices; topology {topology.name!r} has '
      f'{topology.num_devices}'
    )
  if num_groups < 1 or W % num_groups:
    raise InputError(
      f'num_groups={num_groups} does not divide the {W} devices of topology '
      f'{topology.name!r}'
    )
  if shadowed is None:
    shadowed = np.zeros(counts.shape[:-1], bool)
  received = received_rows(np.where(shadowed[..., None], 0, counts))
  masks = _masks(W, num_groups)  # [g, W, W]
  step_rows = received[..., None, :, :] * masks
  row_seconds = sizes.row_flops / topology.flops_per_second
  roots = np.eye(W)[owners(E, W)]  # [E, W]
  forward = Stages(
    send=topology.all_to_all_seconds(
      np.swapaxes(step_rows, -1, -2) * float(sizes.row_bytes)
    ),
    compute=step_rows.sum(-1) * row_seconds,
    give_back=topology.all_to_all_seconds(step_rows * float(sizes.row_bytes)),
    shadow_send=topology.broadcast_seconds(
      shadowed @ roots * sizes.expert_bytes
    ),
    shadow_compute=np.where(shadowed[..., None], counts, 0).sum(-2)
    * row_seconds,
  )
  backward = forward._replace(
    compute=2 * forward.compute, shadow_compute=2 * forward.shadow_compute
  )
  return Step(forward, backward)


def _masks(W: int, g: int) -> Int[np.ndarray, 'g W W']:
  """Whether rows of a device (columns) for another (rows) are of step j."""
  group = np.arange(W) // (W // g)
  step = (group[None] - group[:, None]) % g  # the sender's minus the receiver's
  return (step == np.arange(g)[:, None, None]).astype(int)


def forward_seconds(stages: Stages) -> Float[np.ndarray, ' N']:
  """The time from the first operation of a forward pass to its last."""
  sent, products, ready = _send_and_compute(
    stages, np.zeros_like(stages.shadow_compute)
  )
  sent = sent + stages.shadow_send
  products = np.maximum(products, sent[..., None]) + stages.shadow_compute
  returned = _give_back(stages, sent, ready)
  return np.maximum(returned, products.max(-1))


def backward_seconds(stages: Stages) -> Float[np.ndarray, ' N']:
  """The time from the first operation of a backward pass to its last."""
  sent, _, ready = _send_and_compute(stages, stages.shadow_compute)
  # No device sums gradients before all have theirs, if there are any.
  slowest = stages.shadow_compute.max(-1)
  summed = np.maximum(sent, slowest) + stages.shadow_send
  sent = np.where(stages.shadow_send > 0, summed, sent)
  return np.maximum(_give_back(stages, sent, ready), slowest)


def _send_and_compute(
  stages: Stages, busy: Float[np.ndarray, 'N W']
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
  """The ends of the last S, of the last C by device, and of each C for all."""
  arrived = np.cumsum(stages.send, -1)
  ready = []
  for j in range(arrived.shape[-1]):
    busy = np.maximum(busy, arrived[..., j, None]) + stages.compute[..., j, :]
    ready.append(busy.max(-1))
  return arrived[..., -1], busy, ready


def _give_back(
  stages: Stages, sent: np.ndarray, ready: list[np.ndarray]
) -> Float[np.ndarray, ' N']:
  """The end of the last R, which follow `sent` in the stream."""
  for j, products_end in enumerate(ready):
    sent = np.maximum(sent, products_end) + stages.give_back[..., j]
  return sent
