"""The mesh of devices, built from the sizes of its axes."""

import collections
import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from moe_jax.errors import InputError
from moe_jax.options import Check, Options, at_least, option, unknown

MESH_AXES = ('data', 'fsdp', 'expert', 'tensor')
DCN = 'dcn_'  # prefix of an axis' name in the option for the slices it spans
_WHOLE_OR_REST = Check(
  'must be at least 1, or -1', lambda size: size >= 1 or size == -1
)


def _size(axis: str, default: int = 1) -> Any:
  return option(
    default,
    f"Number of devices along the mesh axis '{axis}' within a slice, whose "
    'network is fast; -1 takes all devices that the other axes leave.',
    _WHOLE_OR_REST,
  )


def _slices_of(axis: str) -> Any:
  return option(
    1,
    f"Number of slices that the mesh axis '{axis}' spans, over the slower "
    'network between slices; 1 stays within a slice.',
    at_least(1),
  )


@dataclasses.dataclass(frozen=True)
class MeshOptions(Options):
  """Sizes of the axes of the mesh of devices."""

  data: int = _size('data', -1)
  fsdp: int = _size('fsdp')
  expert: int = _size('expert')
  tensor: int = _size('tensor')
  dcn_data: int = _slices_of('data')
  dcn_fsdp: int = _slices_of('fsdp')
  dcn_expert: int = _slices_of('expert')
  dcn_tensor: int = _slices_of('tensor')

  def problems(self):
    """At most one axis may have the size -1."""
    open_axes = [name for name in MESH_AXES if getattr(self, name) == -1]
    for name in open_axes[1:]:
      yield f'{name}=-1, and {open_axes[0]}=-1 takes what is left already'

  @classmethod
  def for_experts(cls, num_experts: int, num_devices: int) -> 'MeshOptions':
    """The mesh that splits the experts over as many devices as divide them.

    The axis 'data' has the devices that are left. Experts are split evenly, so
    6 experts on 8 devices make an axis 'expert' of 2.

    Args:
      num_experts: Number of experts of a layer; 0, for a model without, puts
        all devices on the axis 'data'.
      num_devices: Number of devices, all in one slice.

    Raises:
      ValueError: The number of devices is below 1, or that of experts below 0.
    """
    if num_experts < 0 or num_devices < 1:
      raise InputError(
        f'num_experts={num_experts} must be at least 0, and num_devices='
        f'{num_devices} at least 1'
      )
    expert = math.gcd(num_experts, num_devices) if num_experts else 1
    return cls(data=num_devices // expert, expert=expert)

  def make(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of these devices; see `make_mesh`."""
    return make_mesh(dataclasses.asdict(self), devices)

  def shrunk(self) -> 'MeshOptions':
    """The mesh of one device."""
    return MeshOptions(data=1)


def make_mesh(
  sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A mesh of `MESH_AXES`; one size may be -1, which takes what is left.

  `dcn_data=2` makes the axis span two slices, whose network is slower than
  that within one: the axis has 2 * `data` devices, those of a slice next to
  each other. Slices are those of a TPU pod, or the processes of a GPU cluster;
  where all devices are in one slice, they are cut into the slices asked for.

  Raises:
    ValueError: An axis is unknown, a size is neither positive nor -1, two
      are -1, or their product is not the number of devices or of slices; or
      TPUs are in several slices and no dcn_ size says so.
  """
  devices = jax.devices() if devices is None else list(devices)
  axis_names = (*MESH_AXES, *(DCN + name for name in MESH_AXES))
  for name in sizes:
    if name not in axis_names:
      raise unknown('mesh axis', name, axis_names)
  for name, size in sizes.items():
    if not isinstance(size, numbers.Integral) or isinstance(size, bool):
      raise InputError(f'mesh axis {name}={size!r} must be an integer')
  if not devices:
    raise InputError(f'mesh={dict(sizes)} of no devices; give at least one')
  spans = [sizes.get(DCN + name, 1) for name in MESH_AXES]
  if min(spans) < 1:
    raise InputError(f'mesh={dict(sizes)}: {DCN} sizes are positive')
  shape = _filled(sizes, len(devices), math.prod(spans))
  if math.prod(spans) > 1:
    grid = _grid_over_slices(spans, shape, devices)
  elif devices[0].platform == 'tpu' and len(_slices(devices)) > 1:
    raise InputError(
      f'{len(devices)} TPUs are in {len(_slices(devices))} slices, and mesh='
      f'{dict(sizes)} spans one: set {DCN}data={len(_slices(devices))} or more '
      f'of the {DCN} sizes'
    )
  else:
    grid = _grid_in_slice(shape, devices)
  return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _filled(sizes, num_devices: int, num_slices: int) -> list[int]:
  """The sizes of the axes within a slice, with -1 replaced by a number."""
  shape = [sizes.get(name, 1) for name in MESH_AXES]
  if any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1:
    raise InputError(f'mesh={dict(sizes)}: sizes are positive, at most one -1')
  product = math.prod(size for size in shape if size != -1)
  if -1 in shape:
    shape[shape.index(-1)] = num_devices // num_slices // product
  if math.prod(shape) * num_slices != num_devices:
    stated = {name: size for name, size in sizes.items() if size != 1}
    hint = '' if -1 in stated.values() else '; -1 takes what is left of them'
    raise InputError(
      f'mesh={stated}: the sizes given multiply to {product * num_slices}, '
      f'which does not fit {num_devices} devices{hint}'
    )
  return shape


def _grid_in_slice(shape, devices) -> np.ndarray:
  try:
    # An axis may be a side of the torus and a part of another: 8 of 4 x 4 x 4.
    return mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  except NotImplementedError as error:
    sizes = dict(zip(MESH_AXES, shape))
    raise InputError(
      f'mesh={sizes} does not fit the torus of {len(devices)} devices: '
      f'{str(error).splitlines()[0]}'
    ) from error


def _grid_over_slices(spans, shape, devices) -> np.ndarray:
  """The devices of a mesh over slices; those of a slice are neighbours."""
  by_slice = _slices(devices)
  if len(by_slice) == 1:
    by_slice = np.split(np.asarray(devices), math.prod(spans))
  elif len(by_slice) != math.prod(spans):
    raise InputError(
      f'{DCN} sizes {dict(zip(MESH_AXES, spans))} multiply to '
      f'{math.prod(spans)}, and the devices are in {len(by_slice)} slices'
    )
  slice_grids = [_grid_in_slice(shape, list(part)) for part in by_slice]
  # [spans..., shape...] -> each axis' slices before its own devices.
  grid = np.stack(slice_grids).reshape(*spans, *shape)
  n = len(shape)
  grid = grid.transpose(
    [i for pair in zip(range(n), range(n, 2 * n)) for i in pair]
  )
  return grid.reshape([a * b for a, b in zip(spans, shape)])


def _slices(devices) -> list[list]:
  """The devices of each slice: of a TPU slice, or else of a process."""
  slices = collections.defaultdict(list)
  for device in devices:
    # libtpu names no slice where there is one, of however many hosts.
    only = 0 if device.platform == 'tpu' else device.process_index
    slices[getattr(device, 'slice_index', only)].append(device)
  return [slices[key] for key in sorted(slices)]
