"""The parts of a training step, from the scopes of its instructions.

A scope is the name of a linen module, or a name from `jax.named_scope`.
"""

import collections
import dataclasses
import re
from collections.abc import Mapping

from moe_jax.analysis import compiled

# The part of the step that each scope belongs to, in the order of the table.
PARTS = {
  'router': 'router',
  'index': 'slots and indices',
  'dispatch': 'dispatch',
  'experts': 'experts',
  'combine': 'combine',
  'shared_expert': 'shared expert',
  'exchange': 'exchange between devices',
  'moe': 'rest of sparse layers',
  'attention': 'attention',
  'relative_positions': 'attention',
  'cross_attention': 'cross-attention',
  'ffn': 'dense feed-forward',
  'extra_ffn': 'dense feed-forward',
  'attention_norm': 'norms',
  'cross_attention_norm': 'norms',
  'ffn_norm': 'norms',
  'extra_ffn_norm': 'norms',
  'final_norm': 'norms',
  'embedding': 'embedding',
  'logits': 'logits and loss',
  'loss': 'logits and loss',
  'optimizer': 'optimizer',
}
# Instructions that are differentiated and in none of these scopes.
AROUND = 'residual stream, loops'
OTHER = 'all other instructions'
INPUT = 'waiting for the batch'
ROWS = tuple(dict.fromkeys([*PARTS.values(), AROUND, OTHER, INPUT]))
# 'transpose(jvp(experts))' is the scope 'experts', transformed.
_WRAPPED = re.compile(r'(?:[\w.]+\()*([\w.]*)\)*')

# Seconds by part, and by whether they are those of the backward pass.
Times = dict[tuple[str, bool], float]


@dataclasses.dataclass(frozen=True)
class Share:
  """One part of a step, with its time.

  Attributes:
    part: Name of the part, one of `ROWS`.
    forward: Seconds of a step that it takes in the forward pass.
    backward: Seconds of a step that it takes in the backward pass.
  """

  part: str
  forward: float
  backward: float

  @property
  def seconds(self) -> float:
    """Seconds of a step that the part takes in both passes."""
    return self.forward + self.backward


def part_of(op_name: str) -> str:
  """The part that an instruction belongs to.

  Args:
    op_name: Scopes of the instruction, from the outermost to the innermost, and
      the primitive that it was traced from. The innermost scope of `PARTS`
      counts.
  """
  scopes = op_name.split(';')[0].split('/')[:-1]
  for scope in reversed(scopes):
    name = _WRAPPED.fullmatch(scope)
    if name and name[1] in PARTS:
      return PARTS[name[1]]
  return AROUND if 'jvp(' in op_name else OTHER


def is_backward(op_name: str) -> bool:
  """Whether an instruction is in the backward pass, recomputed or not."""
  return 'transpose(' in op_name


def by_part(
  program: compiled.Program, seconds: Mapping[str, float]
) -> tuple[Times, float]:
  """The executed time of each part, and the sum of all parts.

  Args:
    program: The compiled program.
    seconds: Time of each instruction as profiled; that of a loop includes the
      time of its body. Instructions that the program lacks belong to `OTHER`.
  """
  op_names = compiled.op_name_of(program)
  leaf_names = compiled.leaves(program, set(seconds))
  leaf_names |= {name for name in seconds if name not in program}
  times: dict[tuple[str, bool], float] = collections.defaultdict(float)
  for name in leaf_names:
    op_name = op_names.get(name, '')
    times[part_of(op_name), is_backward(op_name)] += seconds[name]
  return dict(times), sum(times.values())


def shares_of_step(
  times: Times, busy: float, step_seconds: float, wait: float
) -> tuple[Share, ...]:
  """Splits the time of a step over its parts, in the order of `ROWS`.

  Args:
    times: Executed time of each part.
    busy: The sum of `times`, which is longer than the step where several
      threads work at once.
    step_seconds: Seconds of the step, from asking for the batch to the end.
    wait: Seconds of the step in which it waits for the batch.
  """
  scale = max(step_seconds - wait, 0.0) / busy if busy else 0.0
  rows = [
    Share(
      row,
      scale * times.get((row, False), 0.0),
      scale * times.get((row, True), 0.0),
    )
    for row in ROWS
    if row != INPUT
  ]
  rows = [row for row in rows if row.seconds or row.part == OTHER]
  return (*rows, Share(INPUT, wait, 0.0))
