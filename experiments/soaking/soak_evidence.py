"""Checks from the traces of a disturbed run whether anything was lost.

Compares the lines of its witnesses (`soak_run.py`) with those of an undisturbed
run, and with what one device reads from the checkpoints.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from experiments.soaking import soak_run
from moe_jax.runs import metrics

# Largest difference allowed between a mesh's and one device's first step.
TOLERANCE = 1e-5


@dataclasses.dataclass
class Tally:
  """Counts of the disturbances of a run, and the faults that were found.

  Attributes:
    counts: Numbers of disturbances, restarts, steps and batches, by kind.
    faults: A line for everything that was lost.
    worst: Largest difference of a first step's loss or gradient to that of one
      device.
  """

  counts: Counter = dataclasses.field(default_factory=Counter)
  faults: list[str] = dataclasses.field(default_factory=list)
  worst: float = 0.0

  def fault(self, text: str) -> None:
    """Records and prints that something was lost."""
    self.faults.append(text)
    print(f'FAULT: {text}', flush=True)


def witnessed(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The lines of all witnesses, in the order of attempts.

  A line that was cut off by a kill is left out.
  """
  lines = []
  for path in sorted(workdir.glob(soak_run.WITNESS)):
    for line in path.read_text().splitlines():
      try:
        lines.append(json.loads(line))
      except ValueError:
        continue
  return sorted(lines, key=lambda line: line['attempt'])


def of_attempt(workdir: pathlib.Path, attempt: int) -> list[dict[str, Any]]:
  """The lines of all witnesses of one start of the run."""
  return [x for x in witnessed(workdir) if x['attempt'] == attempt]


def batches_of(lines: Sequence[dict[str, Any]]) -> dict[int, dict[str, str]]:
  """The row digests of each step's batch, from the lines of all processes."""
  batches: dict[int, dict[str, str]] = {}
  for line in lines:
    if 'step' in line:
      batches.setdefault(line['step'], {}).update(line['rows'])
  return batches


def outcome(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns what a finished run has computed, by name.

  Returns:
    - batches: The digests of each batch's rows; see `batches_of`.
    - arrays: The digests of the arrays of the final state.
    - losses: All losses as (step, name, loss), sorted.
    - loss: The evaluation's last loss.
    - step_seconds: The median time of a step.
  """
  lines = witnessed(workdir)
  losses = [
    (row['step'], name, value)
    for row in metrics.read_metrics(workdir / metrics.FILE_NAME)
    for name, value in row.items()
    if name.endswith('loss')
  ]
  key = f'eval/{soak_run.EVAL}/loss'
  first = [x for x in lines if not x['process']]
  times = [x['time'] for x in first if x.get('step', 0) > 1]
  (end, *_) = [line for line in lines if 'end' in line]
  return {
    'batches': batches_of(lines),
    'arrays': end['arrays'],
    'losses': sorted(losses),
    'loss': [loss for _, name, loss in losses if name == key][-1],
    'step_seconds': float(np.median(np.diff(times))),
  }


def check(workdir, expected, lines, tally: Tally) -> None:
  """Records a fault where a restart did not continue from the checkpoint.

  Args:
    workdir: Folder of the run.
    expected: The checkpoint as one device reads it; see
      `soak.read_on_one_device`.
    lines: Witnesses' lines of the restart.
    tally: Counts and faults, which are added to.
  """
  starts = [line for line in lines if 'begin' in line]
  if not starts:
    return  # the processes ended before their first step
  line = starts[0]
  if line['begin'] != expected['begin']:
    tally.fault(f'began at {line["begin"]}, not {expected["begin"]}')
    return
  for name, digest in line['arrays'].items():
    if digest != expected['arrays'][name]:
      tally.fault(f'step {line["begin"]}: {name} is not as it was saved')
  path = workdir / f'gradient_{line["begin"]}.npz'
  if 'first' in expected and path.exists():
    with np.load(path) as first_step:
      for name, expected_value in expected['first'].items():
        difference = float(np.abs(first_step[name] - expected_value).max())
        tally.worst = max(tally.worst, difference)
        if not difference <= TOLERANCE:  # NaN is a fault too
          step = f'first step at {line["begin"]}'
          tally.fault(f'{step}: {name} differs by {difference}')


def count_batches(workdir, reference: dict[int, dict], tally: Tally) -> None:
  """Compares the batches that led to the final state with the reference's.

  A restart discards the steps after its checkpoint, which are then repeated.

  Args:
    workdir: Folder of the disturbed run.
    reference: Row digests of the undisturbed run's batches, by step.
    tally: Counts and faults, which are added to.
  """
  timeline, num_steps = {}, 0
  lines = witnessed(workdir)
  for attempt in sorted({line['attempt'] for line in lines}):
    attempt_lines = [line for line in lines if line['attempt'] == attempt]
    begins = [line['begin'] for line in attempt_lines if 'begin' in line]
    if not begins:
      continue
    begin = min(begins)
    timeline = {k: v for k, v in timeline.items() if k < begin}
    if begin > 1 and begin - 1 not in timeline:
      tally.fault(f'step {begin - 1} is nowhere')
    steps = batches_of(attempt_lines)
    num_steps += len(steps)
    tally.counts['batches doubled'] += len(timeline.keys() & steps.keys())
    timeline |= steps
  lost = reference.keys() - timeline.keys()
  common = reference.keys() & timeline.keys()
  # The witness writes a batch's rows before its step, so none may be missing.
  differing = [step for step in common if timeline[step] != reference[step]]
  tally.counts['batches lost'] += len(lost)
  tally.counts['batches of another step'] += len(differing)
  tally.counts['steps repeated'] += num_steps - len(timeline)
  for name in ('batches doubled', 'batches lost', 'batches of another step'):
    if tally.counts[name]:
      tally.fault(f'{tally.counts[name]} {name}')


@contextlib.contextmanager
def judged(name: str, folder: str) -> Iterator[tuple[pathlib.Path, list[str]]]:
  """A folder for a command's runs, and a list for a line of each fault.

  Once the command's runs are over, prints the time that they took and the
  number of faults. A temporary folder is removed if there is none.

  Args:
    name: Name of the command.
    folder: The folder, which is kept; '' makes a temporary one.

  Raises:
    SystemExit: There are faults; the exit status is 1.
  """
  path = pathlib.Path(folder or tempfile.mkdtemp(prefix=f'{name}-'))
  began = time.monotonic()
  faults: list[str] = []
  yield path, faults
  minutes = (time.monotonic() - began) / 60
  print(f'{minutes:.1f} minutes, {len(faults)} faults', flush=True)
  if faults:
    print(f'what happened is in {path}')
    raise SystemExit(1)
  if not folder:
    shutil.rmtree(path, ignore_errors=True)


def describe(tally: Tally) -> str:
  """All counts in one line of text."""
  return ', '.join(f'{n} {what}' for what, n in sorted(tally.counts.items()))
