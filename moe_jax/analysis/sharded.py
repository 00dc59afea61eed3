"""What a training step compiled for a mesh holds and sends, a device.

Not here: whether that is fast.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from jax.stages import Compiled

from moe_jax.analysis import collectives as collectives_lib
from moe_jax.analysis.cost import in_bytes


@dataclasses.dataclass(frozen=True)
class Sharded:
  """All bytes are of one device.

  Attributes:
    mesh: The size of every axis.
    param_bytes: Of the parameters.
    optimizer_bytes: Of the optimizer's state.
    argument_bytes: Of state and batch.
    output_bytes: Of the new state and the metrics.
    alias_bytes: Of what is returned in the place of an argument.
    temp_bytes: Allocated while a step runs: activations, gradients, gathered
      parameters, buffers of exchanges.
    code_bytes: Of the program; 0 where it is not the device's.
    collectives: Over a step.
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
    """What a device must have free for a step."""
    held = self.argument_bytes + self.output_bytes - self.alias_bytes
    return held + self.temp_bytes + self.code_bytes

  def describe(self) -> str:
    """The lines that a run on several devices begins with."""
    return '\n'.join(
      [
        f'a device holds {in_bytes(self.param_bytes)} of parameters and '
        f'{in_bytes(self.optimizer_bytes)} of optimizer state; a step takes '
        f'{in_bytes(self.temp_bytes)} more (activations, gradients, buffers)',
        f'a step sends, by device: {describe_traffic(self.collectives)}',
      ]
    )


def describe_traffic(found: collectives_lib.Collectives) -> str:
  """'12 all-gather (1.50 GB), 4 all-to-all (20 MB)', or 'nothing'."""
  parts = [
    f'{traffic.count} {kind} ({in_bytes(traffic.num_bytes)})'
    for kind, traffic in sorted(found.by_kind.items())
  ]
  return ', '.join(parts) or 'nothing'


def read(compiled: Compiled, state: Any, mesh: Mesh) -> Sharded:
  """Of a compiled training step.

  Args:
    compiled: The step.
    state: Its train state, arrays or shapes with shardings.
    mesh: Its devices.
  """
  memory = compiled.memory_analysis()
  return Sharded(
    mesh=dict(mesh.shape),
    param_bytes=device_bytes(state.params),
    optimizer_bytes=device_bytes(state.opt_state),
    argument_bytes=memory.argument_size_in_bytes,
    output_bytes=memory.output_size_in_bytes,
    alias_bytes=memory.alias_size_in_bytes,
    temp_bytes=memory.temp_size_in_bytes,
    code_bytes=memory.generated_code_size_in_bytes,
    collectives=collectives_lib.read(compiled.as_text()),
  )


def device_bytes(tree: Any) -> int:
  """What one device holds of a tree of arrays or shapes with shardings."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )
