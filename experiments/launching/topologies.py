"""Slices of TPUs and nodes of GPUs by name, and the meshes that fit them.

The facts of TPUs are from https://cloud.google.com/tpu/docs and
https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus.
"""

import math
import re
from typing import NamedTuple

from jax.sharding import AbstractMesh

from moe_jax.errors import InputError
from moe_jax.partitioning import MESH_AXES
from moe_jax.run_config import RunConfig

_FLAT = ('2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBES = (
  *('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8'),
  *('8x8x16', '8x16x16', '16x16x16'),
)
_CHIPS_PER_HOST = 4


class _Tpu(NamedTuple):
  """A generation of TPUs.

  Attributes:
    label: Value of the label cloud.google.com/gke-tpu-accelerator.
    prefix: First part of the accelerator type, 'v5litepod' of 'v5litepod-16'.
    cores: Number that the accelerator type counts for each chip.
    shapes: The slices that accelerator types name, the smallest first.
  """

  label: str
  prefix: str
  cores: int
  shapes: tuple[str, ...]


TPUS = {
  'v4': _Tpu('tpu-v4-podslice', 'v4', 2, _CUBES),
  'v5e': _Tpu('tpu-v5-lite-podslice', 'v5litepod', 1, _FLAT),
  'v5p': _Tpu('tpu-v5p-slice', 'v5p', 2, _CUBES),
  'v6e': _Tpu('tpu-v6e-slice', 'v6e', 1, _FLAT),
}
TPUS['v5litepod'] = TPUS['v5e']
# Values of the label cloud.google.com/gke-accelerator.
GPUS = {
  'a100': 'nvidia-tesla-a100',
  'a100-80gb': 'nvidia-a100-80gb',
  'b200': 'nvidia-b200',
  'h100': 'nvidia-h100-80gb',
  'h200': 'nvidia-h200-141gb',
}
_TPU = re.compile(rf'(?:(\d+)x)?({"|".join(TPUS)})(?:-(\d+)|:(\d+(?:x\d+)+))')
_GPU = re.compile(rf'(?:(\d+)x)?(\d+)x({"|".join(GPUS)})')


class Topology(NamedTuple):
  """The devices of a job.

  Attributes:
    groups: Number of slices of TPUs, or of nodes of GPUs.
    size: Number of devices in a slice or node.
    hosts: Number of machines in a slice or node.
    kind: Accelerator type of a slice, 'v5p-128', or kind of a GPU, 'h100'.
    label: Value of GKE's label of the accelerator.
    shape: Sides of a slice's torus, '4x4x4'; '' for GPUs.
  """

  groups: int
  size: int
  hosts: int
  kind: str
  label: str
  shape: str = ''

  def __str__(self) -> str:
    """The devices in words."""
    hosts, shape = self.groups * self.hosts, self.shape and f' ({self.shape})'
    return (
      f'{self.groups} x {self.size} {"chips" if shape else "GPUs"} of '
      f'{self.kind}{shape} in {hosts} machine{"s" * (hosts > 1)}'
    )


def topology_of(name: str) -> Topology:
  """The topology of a name.

  Args:
    name: '8xh100' and '2x8xh100' are one and two nodes of eight GPUs;
      'v5p-128' is a slice by its accelerator type, which counts two cores a
      chip of v4 and v5p; 'v5p:4x4x4' is the same slice by its torus, and
      '2xv5p-128' are two of them.

  Raises:
    ValueError: There is no such topology.
  """
  if found := _GPU.fullmatch(name):
    groups, size, kind = found.groups()
    return Topology(int(groups or 1), int(size), 1, kind, GPUS[kind])
  found = _TPU.fullmatch(name)
  if not found:
    raise InputError(
      f'--topology={name!r} is no topology; have slices of the TPUs '
      f'{", ".join(TPUS)}, such as v5p-128, v5p:4x4x4 or two, 2xv5p-128, and '
      f'nodes of the GPUs {", ".join(GPUS)}, such as 8xh100 or two, 2x8xh100'
    )
  groups, kind, number, shape = found.groups()
  label, prefix, cores, shapes = TPUS[kind]
  named = {cores * math.prod(_sides(shape)): shape for shape in shapes}
  shape = shape or named.get(int(number), '')
  sides, are_cubes = _sides(shape), shapes is _CUBES
  is_large_cube = are_cubes and len(sides) == 3 and sides == sorted(sides)
  is_large_cube &= not any(side % 4 for side in sides)
  if shape not in shapes and not is_large_cube:
    slices = [f'{kind}-{number}' for number in named] if number else shapes
    text = f'--topology={name}: {kind} has the slices {", ".join(slices)}'
    if are_cubes and not number:
      text += ', and others whose sides divide by 4, the smallest first'
    raise InputError(text)
  chips = math.prod(sides)
  kind, hosts = f'{prefix}-{cores * chips}', chips // _CHIPS_PER_HOST
  return Topology(int(groups or 1), chips, hosts, kind, label, shape)


def _sides(shape: str) -> list[int]:
  return [int(side) for side in shape.split('x') if side]


def mesh_on(options: RunConfig, topology: Topology) -> dict[str, int]:
  """The sizes of the mesh axes of a run on a topology.

  Whether the mesh lies on the torus of a slice is not known here:
  `experiments.compile_ahead` finds out.

  Raises:
    ValueError: The mesh has another number of devices or of slices, or does not
      divide the rows of a batch.
  """
  try:
    shape, spans = options.mesh.sizes_on(topology.groups * topology.size)
  except InputError as error:
    raise InputError(f'{topology}: {error}') from None
  # GPUs need not say which axis crosses from node to node.
  allowed = {topology.groups} if topology.shape else {1, topology.groups}
  if math.prod(spans) not in allowed:
    raise InputError(
      f'{topology}: the dcn_ sizes of mesh={options.mesh.changed} multiply to '
      f'{math.prod(spans)}, not {topology.groups}; set them, such as '
      f'--config.mesh.dcn_data={topology.groups}'
    )
  mesh = AbstractMesh(tuple(a * b for a, b in zip(shape, spans)), MESH_AXES)
  options.check_rows(options.sharding.row_parts(mesh))
  return dict(mesh.shape)
