"""The report of `compile_ahead`: a compiled run's numbers, and the verdicts."""

import dataclasses
from typing import NamedTuple

from rich.table import Table

from moe_jax.analysis import cost, roofline, sharded


class Evaluation(NamedTuple):
  """An evaluation, by name, and the bytes that a device needs while it runs."""

  name: str
  needed_bytes: int


@dataclasses.dataclass(frozen=True)
class Report:
  """Memory, communication and cost of a compiled run.

  Attributes:
    step: Memory and communication of the compiled step.
    evaluation: The evaluation that needs most memory; 'none' and 0 for none.
    seconds: Time of tracing, lowering and compiling.
    host_bytes: Peak host memory of this process so far.
  """

  step: sharded.Sharded
  evaluation: Evaluation
  seconds: float
  host_bytes: int

  @property
  def needed_bytes(self) -> int:
    """Bytes that a device must have free for the whole run."""
    return max(self.step.needed_bytes, self.evaluation.needed_bytes)


def table(report: Report, formula: float) -> Table:
  """Table of the step's numbers on one device, a row for each."""
  step, (name, num_bytes) = report.step, report.evaluation
  memory = step.memory
  rows = [
    ('parameters', cost.in_bytes(step.param_bytes)),
    ('optimizer state', cost.in_bytes(step.optimizer_bytes)),
    (
      'arguments (state and batch)',
      cost.in_bytes(memory.argument_size_in_bytes),
    ),
    ('results', cost.in_bytes(memory.output_size_in_bytes)),
    (
      'of them in the place of arguments',
      cost.in_bytes(memory.alias_size_in_bytes),
    ),
    ('temporaries', cost.in_bytes(memory.temp_size_in_bytes)),
    ('program', cost.in_bytes(memory.generated_code_size_in_bytes)),
    ('needed in all', cost.in_bytes(step.needed_bytes)),
    (f'needed in the largest evaluation, {name}', cost.in_bytes(num_bytes)),
    ('FLOPs by formula, nothing twice', f'{formula:.3g}'),
  ]
  for kind, traffic in sorted(step.collectives.by_kind.items()):
    sent = f'{traffic.count}, {cost.in_bytes(traffic.num_bytes)}'
    rows.append((f'{kind}: count, bytes sent', sent))
  result = Table(title='a step, by device', caption=_caption(report))
  result.add_column('what')
  result.add_column('', justify='right')
  for row in rows:
    result.add_row(*row)
  return result


def _caption(report: Report) -> str:
  loops = report.step.collectives.unknown_loops
  text = (
    f'Compiled in {report.seconds:.0f} s; at most '
    f'{cost.in_bytes(report.host_bytes)} of host memory.'
  )
  if loops:
    text += (
      f' {loops} loops are as long as the data asks: what is in them counts '
      'once, in collectives and in what XLA counts.'
    )
  return text


def verdicts(topology: str, device: str, needed_bytes: int) -> dict[str, bool]:
  """Lines that say whether a run fits, and the answer of each.

  Args:
    topology: Topology that the run was compiled for.
    device: Name of the device whose memory is compared; '' takes the
      topology's device, or where that is a CPU every known device.
    needed_bytes: Bytes that the run needs on a device.

  Raises:
    ValueError: The device is unknown.
  """
  kind = topology.partition(':')[0]
  names = [device] if device else [kind] if kind in roofline.DEVICES else []
  if not names:
    names = [name for name in roofline.DEVICES if name != roofline.HERE]
  lines = {}
  for name in names:
    candidate = roofline.device_of(name)
    fits = needed_bytes <= candidate.num_bytes
    lines[
      f'{"fits" if fits else "DOES NOT FIT"} {candidate.name}: '
      f'{cost.in_bytes(needed_bytes)} of {cost.in_bytes(candidate.num_bytes)} '
      f'({needed_bytes / max(candidate.num_bytes, 1):.0%})'
    ] = fits
  return lines
