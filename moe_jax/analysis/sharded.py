"""Reads a compiled step: what a device holds, and what it sends to others.

Collectives are found in the text of the program. Those in the body of a loop
count once for each of its rounds, or once if their number is not known.
"""

import collections
import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax.stages import Compiled
from jaxtyping import Bool

from moe_jax.devices import in_bytes
from moe_jax.models.trees import flatten
from moe_jax.training.averages import kept_by_optimizer
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
_COMPUTATION = re.compile(r'(?:ENTRY )?%?([\w.\-]+) \(.*\{$')
# '%both = (f32[4], f32[8]) all-gather(%x, %y), dimensions={0}': name, type,
# opcode, the text behind it, and the operands in that text.
_INSTRUCTION = re.compile(
  r'\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)(\((.*?)\)(?:, .*)?)$'
)
_CALLS = re.compile(
  r'(?:calls|to_apply|body|condition|\w+_computations?)='
  r'(\{[^}]*\}|[%\w.\-]+)'
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


class Instruction(NamedTuple):
  """One instruction of a compiled program.

  Attributes:
    computation: Name of the computation that the instruction stands in.
    type: Text of the type of its result, which may be a tuple in parentheses.
    opcode: Name of the operation, such as 'all-gather'.
    operands: Names of the instructions whose results it reads, in order.
    calls: Names of the computations that the instruction runs, such as the body
      of a loop.
    text: Text of the instruction behind its opcode: operands and attributes.
  """

  computation: str
  type: str
  opcode: str
  operands: tuple[str, ...]
  calls: tuple[str, ...]
  text: str


Program = Mapping[str, Instruction]


def parse(text: str) -> Program:
  """The instructions of a program, by name.

  Args:
    text: The program, as `compiled.as_text()` writes it.
  """
  program, computation = {}, ''
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      computation = header[1]
    elif parts := _INSTRUCTION.match(line):
      name, type_, opcode, rest, operands = parts.groups()
      callees = re.findall(r'[\w.\-]+', ' '.join(_CALLS.findall(rest)))
      program[name] = Instruction(
        computation,
        type_,
        opcode,
        tuple(re.findall(r'%([\w.\-]+)', operands)),
        tuple(dict.fromkeys(callees)),
        rest,
      )
  return program


class Traffic(NamedTuple):
  """The collectives of one kind in a step.

  Attributes:
    count: Number of collectives that a device takes part in.
    num_bytes: Bytes that a device sends in these collectives if the devices
      form a ring. In a ragged-all-to-all the load of the experts decides; there
      the number is a bound of the mean over devices, since no device sends more
      than it has or receives more than it has room for.
  """

  count: int = 0
  num_bytes: int = 0


class Collectives(NamedTuple):
  """The collectives of a program.

  Attributes:
    by_kind: The traffic of each of `KINDS` that occurs in the program.
    unknown_loops: Number of loops whose length depends on the data; collectives
      in such loops count once.
  """

  by_kind: Mapping[str, Traffic]
  unknown_loops: int


class Sharded(NamedTuple):
  """The bytes of one device, and the collectives of a step.

  Attributes:
    param_bytes: Bytes of the parameters.
    optimizer_bytes: Bytes of the state of the optimizer.
    memory: Sizes in bytes of the step's arrays, as XLA counts them: arguments
      (train state and batch), outputs (new train state and metrics), outputs
      that take the place of an argument (alias), arrays that are allocated
      while a step runs (temp: activations, gradients, gathered parameters, rows
      that are exchanged), and generated code, 0 where it is not in the device's
      memory.
    collectives: The collectives of a step in which the device sends to other
      devices.
  """

  param_bytes: int
  optimizer_bytes: int
  memory: Any
  collectives: Collectives

  @property
  def needed_bytes(self) -> int:
    """Bytes that a device must have free for a step."""
    m = self.memory
    live_bytes = m.argument_size_in_bytes + m.output_size_in_bytes
    own_bytes = m.temp_size_in_bytes + m.generated_code_size_in_bytes
    return live_bytes - m.alias_size_in_bytes + own_bytes

  def describe(self) -> str:
    """Two lines: what each device holds and needs, and what it sends in a step.

    A run on several devices prints them at its start.
    """
    sent = [
      f'{traffic.count} {kind} ({in_bytes(traffic.num_bytes)})'
      for kind, traffic in sorted(self.collectives.by_kind.items())
    ]
    return (
      f'each device holds {in_bytes(self.param_bytes)} of parameters and '
      f'{in_bytes(self.optimizer_bytes)} of optimizer state; a step takes '
      f'{in_bytes(self.memory.temp_size_in_bytes)} more for activations, '
      'gradients and rows that are exchanged\n'
      f'each device sends in a step: {", ".join(sent) or "nothing"}'
    )


def read(compiled: Compiled, state: Any) -> Sharded:
  """Reads a compiled training step.

  Args:
    compiled: The step.
    state: The train state that it takes, as arrays or as shapes with shardings.
  """
  return Sharded(
    device_bytes(state.params),
    device_bytes(kept_by_optimizer(state)),
    compiled.memory_analysis(),
    read_collectives(cast(str, compiled.as_text())),
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
  """Bytes that one device holds in an evaluation, apart from its batches.

  They are the train state, and kernels into which adapters have been merged.
  """
  return device_bytes(programs.abstract_state) + merged_bytes(programs)


def merged_bytes(programs: Programs) -> int:
  """Bytes that one device holds of kernels with their adapters added."""
  params = flatten(programs.abstract_state.params)
  return device_bytes([params[path] for path in programs.adapters.kernels])


def holders(
  x: jax.Array | jax.ShapeDtypeStruct, axis: int
) -> tuple[list[jax.Device], Bool[np.ndarray, 'D N']]:
  """A table of which device holds which index of a dimension.

  Args:
    x: An array of size N along the dimension, or its shape with a sharding.
    axis: Index of the dimension, such as the dimension of experts.

  Returns:
    The D devices in the order of their ids, and bool [D, N], whether each
    device holds each index.
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
  partitions = _PARTITIONS.search(text)
  num_devices = int(partitions[1]) if partitions else 1
  rounds = {
    name: _trips(program, instruction)
    for name, instruction in program.items()
    if instruction.opcode == 'while'
  }
  runs = _executions(program, rounds)
  by_kind: dict[str, Traffic] = collections.defaultdict(Traffic)
  for instruction in program.values():
    kind = instruction.opcode.removesuffix('-start')
    if kind not in KINDS:
      continue
    if instruction.computation.startswith(_FUSED_SCATTER):
      kind = 'reduce-scatter'
    sent = _sent_bytes(program, instruction, kind, num_devices)
    n, so_far = runs[instruction.computation], by_kind[kind]
    by_kind[kind] = Traffic(so_far.count + n, so_far.num_bytes + n * sent)
  return Collectives(dict(by_kind), list(rounds.values()).count(None))


def _executions(
  program: Program, rounds: Mapping[str, int | None]
) -> dict[str, int]:
  """The number of times that each computation of a program runs in a step.

  `rounds` has the number of rounds of each loop, by the name of its
  instruction; None counts as one.
  """
  callers: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
  for name, instruction in program.items():
    if instruction.opcode.endswith(('-done', '-update')):
      continue  # Its '-start' ran the computation that it names.
    times = rounds.get(name)
    for callee in instruction.calls:
      site = instruction.computation, 1 if times is None else times
      callers[callee].append(site)

  @functools.cache
  def runs(computation: str) -> int:
    if not (call_sites := callers[computation]):
      return 1
    return sum(times * runs(caller) for caller, times in call_sites)

  return {i.computation: runs(i.computation) for i in program.values()}


def _trips(program: Program, loop: Instruction) -> int | None:
  """The number of rounds of a loop; None where the compiler does not know it.

  The compiler for TPUs does not note the number of rounds. There the condition
  of the loop, `i < 32`, is read, and `i` is taken to rise by one, as in every
  loop of JAX.
  """
  if rounds := _TRIPS.search(loop.text):
    return int(rounds[1])
  condition = ''.join(re.findall(r'condition=%([\w.\-]+)', loop.text))
  inside = (i for i in program.values() if i.computation == condition)
  roots = [i for i in inside if i.opcode == 'compare']
  if len(roots) != 1 or 'direction=LT' not in roots[0].text:
    return None
  counter, limit = _operands(program, roots[0])
  end = _constant(program, limit)
  element = re.search(r'index=(\d+)', counter.text)
  if end is None or counter.opcode != 'get-tuple-element' or not element:
    return None
  (state,) = _operands(program, loop)
  start = _constant(program, _operands(program, state)[int(element[1])])
  return None if start is None else max(end - start, 0)


def _constant(program: Program, instruction: Instruction) -> int | None:
  """The value of an instruction that is a constant or its copy, else None."""
  while instruction.opcode in ('copy', 'copy-start', 'copy-done'):
    (instruction,) = _operands(program, instruction)
  value = re.match(r'\((-?\d+)\)', instruction.text)
  return int(value[1]) if instruction.opcode == 'constant' and value else None


def _operands(program: Program, instruction: Instruction) -> list[Instruction]:
  return [program[name] for name in instruction.operands]


def _sent_bytes(
  program: Program, instruction: Instruction, kind: str, num_devices: int
) -> int:
  """Bytes that a device sends in one collective, of a `kind` in `KINDS`.

  `num_devices` is the number of all devices.
  """
  operands = [_type_bytes(x.type) for x in _operands(program, instruction)]
  operand_bytes = sum(operands)
  if kind == 'ragged-all-to-all':
    return min(operands[:2])  # rows to send, and the buffer for received rows
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
  """Bytes of all arrays in the text of a type, such as '(f32[4], f32[8])'."""
  total = 0
  for dtype, shape in _ARRAY.findall(text):
    size = math.prod(int(n.lstrip('<=')) for n in shape.split(',') if n)
    # The bits of a number: 'f32', 'bf16', 'f8e4m3fn' or 's4'.
    bits = {'pred': 8, 'token': 0}.get(dtype)
    if bits is None:
      bits = int(re.sub(r'[a-z]+(\d+).*', r'\1', dtype))
    total += size * bits // 8
  return total
