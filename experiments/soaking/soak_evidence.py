"""What a disturbed run left behind, and whether anything was lost.

The witnesses' lines (`soak_run.py`) against an undisturbed run's, and against
what one device reads from the checkpoints. Not here: who disturbs
(`experiments/soak.py`).
"""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.soaking import soak_run

TOLERANCE = 1e-5


@dataclasses.dataclass
class Tally:
  """What was done to a run, and what came of it."""

  counts: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )
  faults: list[str] = dataclasses.field(default_factory=list)
  worst: float = 0.0  # difference of a first step's loss or gradient

  def fault(self, text: str) -> None:
    """Notes, and says, that something was lost."""
    self.faults.append(text)
    print(f'FAULT: {text}', flush=True)


def witnessed(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The witnesses' lines; of a last one perhaps only a part was written."""
  lines = []
  for path in sorted(workdir.glob(soak_run.WITNESS)):
    for line in path.read_text().splitlines():
      try:
        lines.append(json.loads(line))
      except ValueError:
        continue
  return sorted(lines, key=lambda line: line['attempt'])


def of_attempt(workdir: pathlib.Path, attempt: int) -> list[dict[str, Any]]:
  """The witnesses' lines of one start of the run."""
  return [x for x in witnessed(workdir) if x['attempt'] == attempt]


def batches_of(lines: Sequence[dict[str, Any]]) -> dict[int, dict[str, str]]:
  """The rows of each step, of all processes."""
  found: dict[int, dict[str, str]] = {}
  for line in lines:
    if 'step' in line:
      found.setdefault(line['step'], {}).update(line['rows'])
  return found


def outcome(workdir: pathlib.Path) -> dict[str, Any]:
  """Of a finished run."""
  lines = witnessed(workdir)
  rows = [
    json.loads(line)
    for line in (workdir / 'metrics.jsonl').read_text().splitlines()
  ]
  key = f'eval/{soak_run.EVAL}/loss'
  times = [
    x['time'] for x in lines if not x['process'] and x.get('step', 0) > 1
  ]
  (end, *_) = [line for line in lines if 'end' in line]
  return {
    'batches': batches_of(lines),
    'arrays': end['arrays'],
    'loss': [row[key] for row in rows if key in row][-1],
    'step_seconds': float(np.median(np.diff(times))),
  }


def check(workdir, expected, lines, tally: Tally) -> None:
  """Whether a restart began with what the checkpoint holds."""
  begun = [line for line in lines if 'begin' in line]
  if not begun:
    return  # ended before its first step
  line = begun[0]
  if line['begin'] != expected['begin']:
    tally.fault(f'began at {line["begin"]}, not {expected["begin"]}')
    return
  for name, found in line['arrays'].items():
    if found != expected['arrays'][name]:
      tally.fault(f'step {line["begin"]}: {name} is not as it was saved')
  path = workdir / f'gradient_{line["begin"]}.npz'
  if 'first' in expected and path.exists():
    with np.load(path) as found:
      for name, want in expected['first'].items():
        difference = float(np.abs(found[name] - want).max())
        tally.worst = max(tally.worst, difference)
        if not difference <= TOLERANCE:  # nor is NaN
          tally.fault(
            f'first step at {line["begin"]}: {name} differs by {difference}'
          )


def count_batches(workdir, reference: dict[int, dict], tally: Tally) -> None:
  """Batches of the steps that led to the end, against the undisturbed run's.

  A restart gives up what came after its checkpoint: those steps are repeated.
  """
  timeline, taken = {}, 0
  lines = witnessed(workdir)
  for attempt in sorted({line['attempt'] for line in lines}):
    own = [line for line in lines if line['attempt'] == attempt]
    begin = min([x['begin'] for x in own if 'begin' in x], default=None)
    if begin is None:
      continue
    timeline = {k: v for k, v in timeline.items() if k < begin}
    if begin > 1 and begin - 1 not in timeline:
      tally.fault(f'step {begin - 1} is nowhere')
    steps = batches_of(own)
    taken += len(steps)
    doubled = len(timeline.keys() & steps.keys())
    tally.counts['batches doubled'] += doubled
    timeline |= steps
  lost = reference.keys() - timeline.keys()
  both = reference.keys() & timeline.keys()
  # A row is written down before its step, so none may be missing here.
  other = [step for step in both if timeline[step] != reference[step]]
  tally.counts['batches lost'] += len(lost)
  tally.counts['batches of another step'] += len(other)
  tally.counts['steps repeated'] += taken - len(timeline)
  for name in ('batches doubled', 'batches lost', 'batches of another step'):
    if tally.counts[name]:
      tally.fault(f'{tally.counts[name]} {name}')


def describe(tally: Tally) -> str:
  """A line of counts."""
  killed = tally.counts['kill one'] + tally.counts['kill all']
  stopped = tally.counts['stop one'] + tally.counts['stop all']
  kinds = ('altered', 'cut short', 'without manifest')
  spoilt = sum(tally.counts[f'checkpoints {kind}'] for kind in kinds)
  lost, doubled = tally.counts['batches lost'], tally.counts['batches doubled']
  return (
    f'{killed} SIGKILLs ({tally.counts["kill one"]} to one process), {stopped} '
    f'SIGTERMs ({tally.counts["stop one"]} to one), {spoilt} corruptions, '
    f'{tally.counts["restarts"]} starts, '
    f'{tally.counts["steps repeated"]} steps '
    f'repeated, {lost} batches lost, {doubled} doubled'
  )
