"""The bytes that one device of a mesh holds and sends in a training step.

They are read from the compiled step. The collectives in the body of a loop
count as often as the loop runs, which the compiler notes beside each loop whose
length it knows.
"""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled
from jaxtyping import Bool

from moe_jax.analysis.compiled import (
  Instruction,
  Program,
  memory_of,
  parse,
  text_of,
)
from moe_jax.devices import in_bytes
from moe_jax.models.trees import flatten
from moe_jax.training.programs import Programs

KINDS = (
  'all-gather',
  'all-reduce',
  'all-to-all',
  'collective-broadcast',
  'collective-permute',
  'ragged-all-to-all',
  'reduce-scatter',
)
# The computation of TPUs in which each device keeps its slice of an all-reduce.
_FUSED_SCATTER = 'all-reduce-scatter'
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_PARTITIONS = re.compile(r'^HloModule .*num_partitions=(\d+)', re.MULTILINE)
# Groups of devices are written {{0,1},{2,3}}, or [2,4]<=[8] (2 groups of 4), or
# as axes of a mesh, mesh['x'=2,'y'=4] {'y'}, or a part of an axis, {'y':(1)2}.
_GROUPS = re.compile(r'replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]<=)')
_AXES = re.compile(r'replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}')
_AXIS = re.compile(r"'([^']*)'(?::\(\d+\)(\d+))?")
_ARRAY = re.compile(r'\b(pred|token|[a-z]+\d+\w*)\[([\d,<=]*)\]')
_OPERAND = re.compile(r'%([\w.\-]+)')


class Traffic(NamedTuple):
  """The collectives of one kind in a step.

  Attributes:
    count: Number of collectives that a device takes part in.
    num_bytes: Bytes that a device sends in them where devices form a ring. For
      a ragged-all-to-all, where the load of the experts decides, they are a
      bound of the mean over devices: none sends more than it has, and none
      receives more than it has room for.
  """

  count: int = 0
  num_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Collectives:
  """The collectives of a program.

  Attributes:
    by_kind: The traffic of each kind, of those of `KINDS` that occur.
    unknown_loops: Number of loops whose length depends on the data; the
      collectives in them count once.
  """

  by_kind: Mapping[str, Traffic]
  unknown_loops: int

  def describe(self) -> str:
    """The collectives as text: '12 all-gather (1.5 GB)', or 'nothing'."""
    phrases = [
      f'{traffic.count} {kind} ({in_bytes(traffic.num_bytes)})'
      for kind, traffic in sorted(self.by_kind.items())
    ]
    return ', '.join(phrases) or 'nothing'


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
  collectives: Collectives

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
        f'each device sends in a step: {self.collectives.describe()}',
      ]
    )


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
    collectives=read_collectives(text_of(compiled)),
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
  params, kernels = flatten(state.params), programs.adapters.kernels
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


def read_collectives(text: str) -> Collectives:
  """Counts the collectives of a compiled program.

  All branches of a conditional count, as if each were taken.

  Args:
    text: The program, as `compiled.as_text()` writes it.
  """
  program = parse(text)
  runs = _executions(program)
  partitions = _PARTITIONS.search(text)
  num_devices = int(partitions[1]) if partitions else 1
  by_kind: dict[str, Traffic] = defaultdict(Traffic)
  unknown_loops = 0
  for instruction in program.values():
    code = _opcode(instruction)
    unknown_loops += code == 'while' and _trips(program, instruction) is None
    kind = code.removesuffix('-start')
    if kind not in KINDS:
      continue
    if instruction.computation.startswith(_FUSED_SCATTER):
      kind = 'reduce-scatter'
    sent = _sent_bytes(program, instruction, kind, num_devices)
    n, so_far = runs[instruction.computation], by_kind[kind]
    by_kind[kind] = Traffic(so_far.count + n, so_far.num_bytes + n * sent)
  return Collectives(dict(by_kind), unknown_loops)


def _executions(program: Program) -> dict[str, int]:
  """The number of times that each computation of a program runs in a step."""
  callers: dict[str, list[tuple[str, int]]] = defaultdict(list)
  for instruction in program.values():
    code = _opcode(instruction)
    if code.endswith(('-done', '-update')):
      continue  # it names a computation that its start has run
    times = 1
    if code == 'while' and (rounds := _trips(program, instruction)) is not None:
      times = rounds
    for callee in instruction.calls:
      callers[callee].append((instruction.computation, times))

  @functools.cache
  def runs(computation: str) -> int:
    if not (call_sites := callers[computation]):
      return 1
    return sum(times * runs(caller) for caller, times in call_sites)

  return {i.computation: runs(i.computation) for i in program.values()}


def _trips(program: Program, loop: Instruction) -> int | None:
  """The number of rounds of a loop; None where the compiler does not know it.

  The compiler for TPUs does not note it. There the condition of the loop,
  `i < 32`, is read; `i` is taken to rise by one, as in every loop of jax.
  """
  if rounds := _TRIPS.search(loop.text):
    return int(rounds[1])
  condition = re.search(r'condition=%([\w.\-]+)', loop.text)
  roots = [
    i
    for i in program.values()
    if condition and i.computation == condition[1] and _opcode(i) == 'compare'
  ]
  if len(roots) != 1 or 'direction=LT' not in roots[0].text:
    return None
  counter, *limit = _arguments(program, roots[0])
  end = _constant(program, limit[0]) if limit else None
  element = re.search(r'get-tuple-element\(.*index=(\d+)', counter.text)
  state = _arguments(program, loop)
  if end is None or not element or not state:
    return None
  start = _constant(program, _arguments(program, state[0])[int(element[1])])
  return None if start is None else max(end - start, 0)


def _constant(program: Program, instruction: Instruction) -> int | None:
  """The value of a constant, or of a copy of one; None for all others."""
  while _opcode(instruction) in ('copy', 'copy-start', 'copy-done'):
    (instruction,) = _arguments(program, instruction)
  constant = re.search(r' constant\((-?\d+)\)', instruction.text)
  return int(constant[1]) if constant else None


def _arguments(program: Program, instruction: Instruction) -> list[Instruction]:
  """The instructions that an instruction reads, in order."""
  _, rest = _split(instruction.text)
  inside = _split(rest[rest.find('(') :])[0]
  return [program[name] for name in _OPERAND.findall(inside) if name in program]


def _opcode(instruction: Instruction) -> str:
  """The opcode: 'all-gather' in '(f32[4], f32[8]) all-gather(%x, %y), ...'."""
  _, rest = _split(instruction.text)
  return rest.partition('(')[0]


def _split(text: str) -> tuple[str, str]:
  """The type that an instruction's text begins with, and the rest of it.

  The type may be a tuple in parentheses.
  """
  if not text.startswith('('):
    front, _, rest = text.partition(' ')
    return front, rest
  depth = 0
  for i, letter in enumerate(text):
    depth += (letter == '(') - (letter == ')')
    if not depth:
      return text[: i + 1], text[i + 1 :].lstrip()
  return text, ''


def _sent_bytes(
  program: Program, instruction: Instruction, kind: str, num_devices: int
) -> int:
  """Bytes that a device sends in one collective."""
  operands = [
    _type_bytes(_split(operand.text)[0])
    for operand in _arguments(program, instruction)
  ]
  if kind == 'ragged-all-to-all':
    return min(operands[:2])  # the rows, and the buffer that receives others
  operand_bytes = sum(operands)
  group_size = _group_size(instruction.text, num_devices)
  if kind in ('collective-permute', 'collective-broadcast'):
    return operand_bytes
  if kind == 'all-gather':
    return (group_size - 1) * operand_bytes
  passes = 2 if kind == 'all-reduce' else 1
  return passes * operand_bytes * (group_size - 1) // group_size


def _group_size(text: str, num_devices: int) -> int:
  """The number of devices that take part in a collective.

  Args:
    text: Text of the collective's instruction.
    num_devices: Number of all devices; all take part where no group is named.
  """
  if axes := _AXES.search(text):
    mesh = dict(re.findall(r"'([^']*)'=(\d+)", axes[1]))
    return math.prod(
      int(part or mesh[name]) for name, part in _AXIS.findall(axes[2])
    )
  groups = _GROUPS.search(text)
  if not groups:
    return num_devices
  return int(groups[2]) if groups[2] else groups[1].count(',') + 1


def _type_bytes(text: str) -> int:
  """Bytes of all arrays in the text of a type."""
  return sum(
    math.prod(int(n.lstrip('<=')) for n in shape.split(',') if n)
    * _bits(dtype)
    // 8
    for dtype, shape in _ARRAY.findall(text)
  )


def _bits(dtype: str) -> int:
  """Bits of a number of a type: 'f32', 'bf16', 'f8e4m3fn' or 's4'."""
  if dtype in ('pred', 'token'):
    return 8 if dtype == 'pred' else 0
  return int(re.sub(r'[a-z]+(\d+).*', r'\1', dtype))
