"""The bytes that one device of a mesh holds and sends in a training step.

They are read from the compiled step.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled
from jaxtyping import Bool

from moe_jax.analysis import collectives as collectives_lib
from moe_jax.analysis.compiled import memory_of, text_of
from moe_jax.memory_room import in_bytes
from moe_jax.models import flat_trees
from moe_jax.training.programs import Programs


@dataclasses.dataclass(frozen=True)
class Sharded:
  """The bytes of one device, and the collectives of a step.

  Attributes:
    mesh: Size of each axis of the mesh.
    param_bytes: Bytes of the parameters.
    optimizer_bytes: Bytes of the state of the optimizer.
    argument_bytes: Bytes of the arguments: train state and batch.
    output_bytes: Bytes of the results: new train state and metrics.
    alias_bytes: Bytes of the results that take the place of an argument.
    temp_bytes: Bytes that are allocated while a step runs: activations,
      gradients, gathered parameters, rows that are exchanged.
    code_bytes: Bytes of the program; 0 where it is not in the device's memory.
    collectives: The collectives in which the device sends to others in a step.
  """

  mesh: Mapping[str, int]
  param_bytes: int
  optimizer_bytes: int
  argument_bytes: int
  output_bytes: int
  alias_bytes: int
  temp_bytes: int
  code_bytes: int
  collectives: collectives_lib.Collectives

  @property
  def needed_bytes(self) -> int:
    """Bytes that a device must have free for a step."""
    live_bytes = self.argument_bytes + self.output_bytes - self.alias_bytes
    return live_bytes + self.temp_bytes + self.code_bytes

  def describe(self) -> str:
    """The two lines that a run on several devices prints at its start."""
    return '\n'.join(
      [
        f'each device holds {in_bytes(self.param_bytes)} of parameters and '
        f'{in_bytes(self.optimizer_bytes)} of optimizer state; a step takes '
        f'{in_bytes(self.temp_bytes)} more for activations, gradients and rows '
        'that are exchanged',
        f'each device sends in a step: {describe_traffic(self.collectives)}',
      ]
    )


def describe_traffic(collectives: collectives_lib.Collectives) -> str:
  """The collectives as text: '12 all-gather (1.5 GB)', or 'nothing'."""
  phrases = [
    f'{traffic.count} {kind} ({in_bytes(traffic.num_bytes)})'
    for kind, traffic in sorted(collectives.by_kind.items())
  ]
  return ', '.join(phrases) or 'nothing'


def read(compiled: Compiled, state: Any, mesh: Mesh) -> Sharded:
  """Reads a compiled training step.

  Args:
    compiled: The step.
    state: The train state that it takes, as arrays or as shapes with shardings.
    mesh: The devices that it was compiled for.
  """
  memory = memory_of(compiled)
  return Sharded(
    mesh=dict(mesh.shape),
    param_bytes=device_bytes(state.params),
    optimizer_bytes=device_bytes(state.opt_state),
    argument_bytes=memory.argument_size_in_bytes,
    output_bytes=memory.output_size_in_bytes,
    alias_bytes=memory.alias_size_in_bytes,
    temp_bytes=memory.temp_size_in_bytes,
    code_bytes=memory.generated_code_size_in_bytes,
    collectives=collectives_lib.read(text_of(compiled)),
  )


def device_bytes(tree: Any) -> int:
  """Bytes that one device holds of a tree of arrays.

  Args:
    tree: Arrays, or shapes with shardings.
  """
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def held_by_evaluations(programs: Programs) -> int:
  """Bytes that one device holds before a batch of an evaluation is there.

  They are those of the train state, and of kernels with merged adapters.
  """
  state = programs.abstract_state
  params, kernels = flat_trees.flatten(state.params), programs.adapters.kernels
  return device_bytes((state, [params[path] for path in kernels]))


def holders(
  x: jax.Array | jax.ShapeDtypeStruct, axis: int
) -> tuple[list[jax.Device], Bool[np.ndarray, 'D N']]:
  """A table of the entries of one dimension that each device holds.

  Args:
    x: An array of N entries along the dimension, or its shape with a sharding.
    axis: Number of the dimension, such as that of experts.

  Returns:
    The D devices in the order of their ids, and whether each holds an entry.
  """
  indices = x.sharding.devices_indices_map(x.shape)
  devices = sorted(indices, key=lambda device: device.id)
  holds = np.zeros((len(devices), x.shape[axis]), bool)
  for row, device in zip(holds, devices):
    row[indices[device][axis]] = True
  return devices, holds
