"""The cost of a layer whose experts are on many devices, from a cost model.

FasterMoE (He et al., PPoPP 2022, https://doi.org/10.1145/3503221.3508418) takes
a layer's computation to last as long as that of its slowest device, and an
exchange as long as its slowest link has bytes to carry. Nothing here is
measured: the seconds are those of a described machine. An expert is two
kernels, of M inputs and F hidden units and back, or three if it is gated.

With the smart schedule (section 4.2) exchange and products overlap: W devices
are g groups on a ring. In step j, group i sends the rows that group (i - j) mod
g has experts for (S_j), multiplies those that it has got from group (i + j) mod
g (C_j), and gives the results back (R_j). A device sends in one stream, S_0 to
S_{g-1}, then shadowed experts, then R_0 to R_{g-1}, and multiplies in another,
C_0 to C_{g-1}, then its rows of shadowed experts. S_j comes before C_j, and C_j
before R_j. A step of the exchange ends for all devices when its slowest link
has carried its bytes.

The backward pass sends gradients of as many bytes, and has two products for
each of the forward pass. The paper does not say in what order it runs. Here it
has the same steps, but shadowed experts first, whose products wait for nothing,
so that their gradients are summed between the S and the R.
"""

from typing import NamedTuple

import numpy as np

from moe_jax.errors import InputError
from moe_jax.parallel.topology import Topology
from moe_jax.shapes import Bool, Float, Int


class Sizes(NamedTuple):
  """The sizes of a layer's experts.

  Attributes:
    M: Width of the model.
    F: Hidden width of an expert.
    bytes_per_element: Bytes of an element of a row that travels.
    kernels: Number of an expert's kernels: 2, 3 if it has a gate, or 4 if two.
    bytes_per_parameter: Bytes of a parameter that travels; 0 stands for
      `bytes_per_element`.
  """

  M: int
  F: int
  bytes_per_element: int = 4
  kernels: int = 2
  bytes_per_parameter: int = 0

  @property
  def row_flops(self) -> int:
    """FLOPs of the forward pass for a row of an expert."""
    return 2 * self.expert_elements

  @property
  def row_bytes(self) -> int:
    """Bytes of a row that travels."""
    return self.M * self.bytes_per_element

  @property
  def expert_bytes(self) -> int:
    """Bytes of an expert's kernels."""
    size = self.bytes_per_parameter or self.bytes_per_element
    return self.expert_elements * size

  @property
  def expert_rows(self) -> float:
    """The number of elements of rows that have as many bytes as an expert."""
    return self.expert_bytes / self.bytes_per_element

  @property
  def expert_elements(self) -> int:
    """Number of values of an expert's kernels."""
    return self.kernels * self.M * self.F


def owners(num_experts: int, num_devices: int) -> Int[np.ndarray, ' E']:
  """The index of the device that has each expert, equally many experts on each.

  Raises:
    ValueError: The experts cannot be divided evenly.
  """
  if num_experts % num_devices:
    raise InputError(
      f'num_experts={num_experts} is not divisible by the {num_devices} devices'
    )
  return np.arange(num_experts) // (num_experts // num_devices)


class Step(NamedTuple):
  """A training step of a layer's experts, as operations of its forward pass.

  The first axis counts N layers, or steps of training, that do not depend on
  each other. In each of the g steps j of the smart schedule, S_j sends rows,
  C_j multiplies them and R_j returns the results. W is the number of devices.

  Attributes:
    send: The seconds of each S_j.
    compute: The seconds of each C_j, on each device.
    give_back: The seconds of each R_j.
    shadow_send: The seconds in which parameters of shadowed experts are sent to
      all devices, or their gradients summed.
    shadow_compute: The seconds of the products of each device's rows of
      shadowed experts.
  """

  send: Float[np.ndarray, 'N g']
  compute: Float[np.ndarray, 'N g W']
  give_back: Float[np.ndarray, 'N g']
  shadow_send: Float[np.ndarray, ' N']
  shadow_compute: Float[np.ndarray, 'N W']

  @property
  def comm(self) -> Float[np.ndarray, ' N']:
    """Seconds of all that is sent in the forward and the backward pass."""
    one_pass = self.send.sum(-1) + self.shadow_send + self.give_back.sum(-1)
    return 2 * one_pass

  @property
  def comp(self) -> Float[np.ndarray, ' N']:
    """Seconds of all products of the slowest device, forward and backward."""
    return 3 * (self.compute.sum(-2) + self.shadow_compute).max(-1)

  @property
  def ratio(self) -> Float[np.ndarray, ' N']:
    """R_CC, computation over communication of a training step.

    The ratio is x in Figure 4 of FasterMoE, a layer's roofline. Both seconds
    are totals of forward and backward pass, so that a step without overlap lies
    on the curve `semi_ideal`. The ratio is infinite where nothing is sent.
    """
    with np.errstate(divide='ignore'):
      return self.comp / self.comm

  @property
  def sequential(self) -> Float[np.ndarray, ' N']:
    """Seconds of the step if nothing overlaps."""
    return self.comm + self.comp

  @property
  def overlapped(self) -> Float[np.ndarray, ' N']:
    """A lower bound of the step's seconds: sending and products fully overlap.

    The bound is that of the paper, max(comm, comp) of the whole step.
    """
    return np.maximum(self.comm, self.comp)

  @property
  def scheduled(self) -> Float[np.ndarray, ' N']:
    """Seconds of the step by the smart schedule."""
    return self.forward_seconds + self.backward_seconds

  @property
  def forward_seconds(self) -> Float[np.ndarray, ' N']:
    """Seconds of a forward pass by the smart schedule, from start to end."""
    sent, products, ready = _send_and_compute(
      self.send, self.compute, np.zeros_like(self.shadow_compute)
    )
    sent = sent + self.shadow_send
    products = np.maximum(products, sent[..., None]) + self.shadow_compute
    returned = _give_back(self.give_back, sent, ready)
    return np.maximum(returned, products.max(-1))

  @property
  def backward_seconds(self) -> Float[np.ndarray, ' N']:
    """Seconds of a backward pass by the smart schedule, from start to end."""
    shadow_compute = 2 * self.shadow_compute
    sent, _, ready = _send_and_compute(
      self.send, 2 * self.compute, shadow_compute
    )
    # Gradients of shadowed experts, if any, are summed over devices once all
    # devices have computed their own.
    slowest = shadow_compute.max(-1)
    summed = np.maximum(sent, slowest) + self.shadow_send
    sent = np.where(self.shadow_send > 0, summed, sent)
    return np.maximum(_give_back(self.give_back, sent, ready), slowest)


def step(
  topology: Topology,
  counts: Int[np.ndarray, 'N E W'],
  sizes: Sizes,
  *,
  num_groups: int = 1,
  shadowed: Bool[np.ndarray, 'N E'] | None = None,
  gathered: Int[np.ndarray, 'N W'] | None = None,
) -> Step:
  """The operations of a training step of a layer, with their seconds.

  Args:
    topology: The machine.
    counts: The number of rows of each device that choose each expert, in each
      of N layers, or steps.
    sizes: The sizes of the experts.
    num_groups: g, the number of groups; with one group an exchange is a single
      all-to-all.
    shadowed: Whether each expert is shadowed, that is, sent to all devices;
      None for no expert.
    gathered: The number of tokens of each device, where all devices gather
      tokens, and sum outputs, in place of rows that travel; None: rows travel.
      There is one group then, and no expert is shadowed.

  Raises:
    ValueError: The counts are not those of the topology's devices, the devices
      cannot be divided into `num_groups` groups, or the experts cannot be
      divided over the devices.
  """
  (N, E, W), g = counts.shape, num_groups
  if topology.num_devices != W:
    raise InputError(
      f'counts of {W} devices; topology {topology.name!r} has '
      f'{topology.num_devices}'
    )
  if g < 1 or W % g:
    raise InputError(
      f'num_groups={g} does not divide the {W} devices of topology '
      f'{topology.name!r}'
    )
  roots = np.eye(W)[owners(E, W)]  # [E, W]
  if shadowed is None:
    shadowed = np.zeros((N, E), bool)
  shadow_counts = np.where(shadowed[..., None], counts, 0)
  # The number of rows that each device (axis 1) gets from each device (axis 2),
  # itself included, in each of the N layers or steps.
  received = (counts - shadow_counts).reshape(N, W, E // W, W).sum(-2)
  step_rows = received[:, None] * _masks(W, g)  # [N, g, W, W]
  row_seconds = sizes.row_flops / topology.flops_per_second
  row_bytes = float(sizes.row_bytes)
  if gathered is None:
    send = topology.all_to_all_seconds(step_rows.swapaxes(-1, -2) * row_bytes)
    give_back = topology.all_to_all_seconds(step_rows * row_bytes)
  else:
    send = give_back = topology.broadcast_seconds(gathered * row_bytes)[:, None]
  return Step(
    send=send,
    compute=step_rows.sum(-1) * row_seconds,
    give_back=give_back,
    shadow_send=topology.broadcast_seconds(
      shadowed @ roots * sizes.expert_bytes
    ),
    shadow_compute=shadow_counts.sum(-2) * row_seconds,
  )


def _masks(W: int, g: int) -> Int[np.ndarray, 'g W W']:
  """For each step of the ring, which devices send rows to which.

  The W devices are g groups of neighbours on a ring. In step j, group i sends
  to group (i - j) mod g. The number [j, k, i] is 1 where device i sends rows to
  device k in step j, and 0 elsewhere.
  """
  group = np.arange(W) // (W // g)
  step = (group[None] - group[:, None]) % g  # the sender's minus the receiver's
  return (step == np.arange(g)[:, None, None]).astype(int)


def _send_and_compute(
  send: np.ndarray, compute: np.ndarray, busy: Float[np.ndarray, 'N W']
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
  """The times at which the sending S_j and the products C_j of a pass end.

  In each of g steps j, S_j starts when S_(j-1) has ended, and C_j on a device
  when S_j has ended for all and C_(j-1) on that device.

  Args:
    send: The seconds of each S_j, [N, g].
    compute: The seconds of each C_j, on each device, [N, g, W].
    busy: The time until which each device computes something else.

  Returns:
    The end of the last S_j, [N]; of the last C_j on each device, [N, W]; and,
    for each C_j, its end on the device that ends last, g times [N].
  """
  arrived = np.cumsum(send, -1)
  ready = []
  for j in range(arrived.shape[-1]):
    busy = np.maximum(busy, arrived[..., j, None]) + compute[..., j, :]
    ready.append(busy.max(-1))
  return arrived[..., -1], busy, ready


def _give_back(
  give_back: np.ndarray, sent: np.ndarray, ready: list[np.ndarray]
) -> Float[np.ndarray, ' N']:
  """The time at which a pass over N layers has given back all results.

  In each of g steps j, R_j gives back the results of the products C_j. It
  starts when C_j has ended on all devices and R_(j-1) has ended.

  Args:
    give_back: The seconds of each R_j, [N, g].
    sent: The time before which no R_j starts, [N].
    ready: The time at which each C_j ends on its last device, g times [N].
  """
  for j, products_end in enumerate(ready):
    sent = np.maximum(sent, products_end) + give_back[..., j]
  return sent


def ideal(
  flops_per_second: float, ratio: Float[np.ndarray, ' N']
) -> Float[np.ndarray, ' N']:
  """A device's FLOPs per second if sending and products overlap in full.

  Args:
    flops_per_second: The FLOPs that a device computes in a second.
    ratio: Computation over communication, as in `Step.ratio`.
  """
  return flops_per_second * np.minimum(1.0, ratio)


def semi_ideal(
  flops_per_second: float, ratio: Float[np.ndarray, ' N']
) -> Float[np.ndarray, ' N']:
  """A device's FLOPs per second if sending and products do not overlap.

  It computes `flops_per_second` between exchanges; `ratio` is of computation to
  communication. The formula holds where devices have equally many rows.
  """
  return flops_per_second / (1.0 + 1.0 / ratio)
