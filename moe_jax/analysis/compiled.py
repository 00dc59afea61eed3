"""What a compiled program says of itself: its counts, and its instructions.

Not here: time (`roofline`, `explain_cost`), or counts from a config (`cost`).
"""

import dataclasses
import re
from collections.abc import Mapping

from jax.stages import Compiled

_COMPUTATION = re.compile(r'(?:ENTRY )?%?([\w.\-]+) \(.*\{$')
_INSTRUCTION = re.compile(r'\s+(?:ROOT )?%?([\w.\-]+) = ')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLS = re.compile(
  r'(?:calls|to_apply|body|condition|true_computation|false_computation)='
  r'%?([\w.\-]+)'
)
_CALL_LISTS = re.compile(
  r'(?:branch_computations|called_computations|calls)=\{([^}]*)\}'
)


@dataclasses.dataclass(frozen=True)
class Counts:
  """What XLA counts in a program; the body of a loop counts once.

  Attributes:
    flops: Two a multiply-add, and one an elementwise operation. With a loop of
      dynamic trip count this is not the program's work.
    bytes_accessed: Read and written by its instructions, caches unknown.
    argument_bytes: Of the arguments.
    output_bytes: Of the results, gradients included.
    temp_bytes: Allocated while it runs, besides arguments and results.
  """

  flops: float
  bytes_accessed: float
  argument_bytes: int
  output_bytes: int
  temp_bytes: int


def counts(compiled: Compiled) -> Counts:
  """The program's own numbers; NaN where the platform gives none."""
  cost = compiled.cost_analysis() or {}
  memory = compiled.memory_analysis()
  return Counts(
    flops=float(cost.get('flops', float('nan'))),
    bytes_accessed=float(cost.get('bytes accessed', float('nan'))),
    argument_bytes=memory.argument_size_in_bytes,
    output_bytes=memory.output_size_in_bytes,
    temp_bytes=memory.temp_size_in_bytes,
  )


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction of a compiled program.

  Attributes:
    name: Unique in the program; profiles name it.
    computation: The computation it stands in.
    op_name: The scopes and the primitive it was traced from, '' if none.
    operands: Names of the instructions it reads.
    calls: Names of the computations it runs: a loop's, a fusion's.
    text: What stands behind its name: type, opcode, operands, attributes.
  """

  name: str
  computation: str
  op_name: str
  operands: tuple[str, ...]
  calls: tuple[str, ...]
  text: str = dataclasses.field(default='', repr=False)


Program = Mapping[str, Instruction]


def parse(text: str) -> Program:
  """The instructions of `compiled.as_text()`, by name."""
  program, computation = {}, ''
  for line in text.splitlines():
    if header := _COMPUTATION.match(line):
      computation = header[1]
    elif found := _INSTRUCTION.match(line):
      program[found[1]] = _instruction(
        found[1], computation, line[found.end() :]
      )
  return program


def _instruction(name: str, computation: str, rest: str) -> Instruction:
  op_name = _OP_NAME.search(rest)
  calls = _CALLS.findall(rest)
  for names in _CALL_LISTS.findall(rest):
    calls += re.findall(r'[\w.\-]+', names)
  # Computations are also written with a percent sign.
  read = set(re.findall(r'%([\w.\-]+)', rest)) - set(calls)
  return Instruction(
    name=name,
    computation=computation,
    op_name=op_name[1] if op_name else '',
    operands=tuple(sorted(read)),
    calls=tuple(dict.fromkeys(calls)),
    text=rest,
  )


def op_name_of(program: Program) -> dict[str, str]:
  """A scope for every instruction, also for those the compiler made.

  One without a scope has that of the computations it calls, else that of an
  instruction that reads it, else of one that it reads, over any number of
  steps, else that of the loop or call it is in; '' where there is none.
  """
  known = {name: i.op_name for name, i in program.items()}
  bodies = _by_computation(program)
  readers: dict[str, list[str]] = {name: [] for name in program}
  callers: dict[str, list[str]] = {name: [] for name in bodies}
  for name, instruction in program.items():
    for operand in instruction.operands:
      if operand in readers:
        readers[operand].append(name)
    for computation in instruction.calls:
      callers.setdefault(computation, []).append(name)
  for name, instruction in program.items():
    if not known[name]:
      inside = [
        known[other]
        for computation in instruction.calls
        for other in bodies.get(computation, [])
      ]
      known[name] = _commonest(inside)
  for neighbours in (
    readers,
    {name: i.operands for name, i in program.items()},
    {name: callers[i.computation] for name, i in program.items()},
  ):
    _spread(known, neighbours)
  return known


def _spread(known: dict[str, str], neighbours) -> None:
  """Gives unnamed instructions a neighbour's name, until nothing changes."""
  unnamed = [name for name, op_name in known.items() if not op_name]
  while unnamed:
    found = {
      name: _commonest([known.get(other, '') for other in neighbours[name]])
      for name in unnamed
    }
    known.update({name: value for name, value in found.items() if value})
    left = [name for name in unnamed if not known[name]]
    if len(left) == len(unnamed):
      return
    unnamed = left


def leaves(program: Program, executed: set[str]) -> set[str]:
  """Those of `executed` that ran no other of them: what may be summed.

  A loop, a call or a conditional lasts as long as what it runs, which the
  profile lists too; where it does not, the caller is all there is.
  """
  busy = {program[name].computation for name in executed if name in program}
  bodies = _by_computation(program)
  memo: dict[str, bool] = {}

  def runs_executed(computation: str) -> bool:
    if computation not in memo:
      memo[computation] = False  # computations do not recurse
      memo[computation] = computation in busy or any(
        runs_executed(called)
        for name in bodies.get(computation, [])
        for called in program[name].calls
      )
    return memo[computation]

  return {
    name
    for name in executed
    if name in program
    and not any(runs_executed(called) for called in program[name].calls)
  }


def _by_computation(program: Program) -> dict[str, list[str]]:
  bodies: dict[str, list[str]] = {}
  for name, instruction in program.items():
    bodies.setdefault(instruction.computation, []).append(name)
  return bodies


def _commonest(names: list[str]) -> str:
  named = [name for name in names if name]
  return max(named, key=named.count) if named else ''
