"""The text, the memory and the instructions of a compiled program."""

import collections
import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jax.stages import Compiled

from moe_jax.errors import InputError

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


def text_of(compiled: Compiled) -> str:
  """The text of a program.

  Raises:
    ValueError: The platform does not give the text.
  """
  text = compiled.as_text()
  if text is None:
    raise InputError('this platform does not give the text of a program')
  return text


def memory_of(compiled: Compiled) -> Any:
  """The sizes of a program's arrays in bytes, as XLA counts them.

  Raises:
    ValueError: The platform does not count the bytes.
  """
  memory = compiled.memory_analysis()
  if memory is None:
    raise InputError('this platform does not say what memory a program needs')
  return memory


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction of a compiled program.

  Attributes:
    name: Name of the instruction, unique in the program, by which profiles
      name it too.
    computation: Name of the computation that the instruction stands in.
    type: Text of the type of its result, which may be a tuple in parentheses.
    opcode: Name of the operation, such as 'all-gather'.
    op_name: The scopes and the primitive that the instruction was traced from;
      '' for instructions that the compiler made.
    operands: Names of the instructions whose results it reads, in order.
    calls: Names of the computations that the instruction runs, such as the body
      of a loop.
    text: Text of the instruction behind its opcode: operands and attributes.
  """

  name: str
  computation: str
  type: str
  opcode: str
  op_name: str
  operands: tuple[str, ...]
  calls: tuple[str, ...]
  text: str = dataclasses.field(repr=False)


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
    elif start := _INSTRUCTION.match(line):
      name = start[1]
      program[name] = _instruction(name, computation, line[start.end() :])
  return program


def _instruction(name: str, computation: str, text: str) -> Instruction:
  """Parses text like '(f32[4], f32[8]) all-gather(%x, %y), dimensions={0}'."""
  type_, rest = _split(text)
  opcode = rest.partition('(')[0]
  rest = rest.removeprefix(opcode)
  operands, _ = _split(rest)
  op_name = _OP_NAME.search(rest)
  calls = _CALLS.findall(rest)
  for names in _CALL_LISTS.findall(rest):
    calls += re.findall(r'[\w.\-]+', names)
  return Instruction(
    name=name,
    computation=computation,
    type=type_,
    opcode=opcode,
    op_name=op_name[1] if op_name else '',
    operands=tuple(re.findall(r'%([\w.\-]+)', operands)),
    calls=tuple(dict.fromkeys(calls)),
    text=rest,
  )


def _split(text: str) -> tuple[str, str]:
  """Splits a text behind its first word, or behind its first parentheses."""
  if not text.startswith('('):
    front, _, rest = text.partition(' ')
    return front, rest
  depth = 0
  for i, letter in enumerate(text):
    depth += (letter == '(') - (letter == ')')
    if not depth:
      return text[: i + 1], text[i + 1 :].lstrip()
  return text, ''


def op_name_of(program: Program) -> dict[str, str]:
  """The `op_name` of each instruction, also of those that the compiler made.

  An instruction without an `op_name` takes the most frequent one of the
  instructions in the computations that it calls; else of those that read its
  result; else of those whose results it reads; else of the loops or calls that
  run its computation; else ''. Each rule is repeated until it names nothing.
  """
  bodies = _by_computation(program)
  readers = collections.defaultdict(list)
  callers = collections.defaultdict(list)
  for name, instruction in program.items():
    for operand in instruction.operands:
      readers[operand].append(name)
    for computation in instruction.calls:
      callers[computation].append(name)
  op_names = {name: i.op_name for name, i in program.items()}
  for neighbours in (
    lambda i: [other for c in i.calls for other in bodies[c]],
    lambda i: readers[i.name],
    lambda i: i.operands,
    lambda i: callers[i.computation],
  ):
    found = {'': ''}
    while found:
      unnamed = [i for i in program.values() if not op_names[i.name]]
      pairs = ((i.name, _commonest(op_names, neighbours(i))) for i in unnamed)
      found = {name: op_name for name, op_name in pairs if op_name}
      op_names |= found
  return op_names


def leaves(program: Program, executed: set[str]) -> set[str]:
  """The executed instructions whose times may be summed.

  A loop, a call or a conditional lasts as long as the instructions that it
  runs, so it is left out where the profile lists any of these instructions.

  Args:
    program: The program.
    executed: Names of the instructions that a profile lists.
  """
  busy = {program[name].computation for name in executed if name in program}
  bodies = _by_computation(program)

  @functools.cache
  def runs_executed(computation: str) -> bool:
    return computation in busy or any(
      runs_executed(callee)
      for name in bodies[computation]
      for callee in program[name].calls
    )

  return {
    name
    for name in executed
    if name in program
    and not any(runs_executed(callee) for callee in program[name].calls)
  }


def _by_computation(program: Program) -> dict[str, list[str]]:
  """The names of the instructions that stand in each computation."""
  bodies = collections.defaultdict(list)
  for name, instruction in program.items():
    bodies[instruction.computation].append(name)
  return bodies


def _commonest(op_names: Mapping[str, str], names: Iterable[str]) -> str:
  """The most frequent `op_name` of some instructions; '' if none has one."""
  found = [op_names[name] for name in names if op_names[name]]
  return max(found, key=found.count) if found else ''
