"""Do kills cost a run steps where its evaluations take long? Kills it 20 times.

    python -m experiments.soaking.long_evaluations

The evaluations of a run of 300 steps take at least five times as long as the
steps between them, and it is killed 20 times at random moments: by SIGKILL, and
in a second folder by SIGTERM with a SIGKILL 10 s later. A kill may cost the
steps since the checkpoint before it, and none if the run has ended by itself
after SIGTERM; no step may be lost; and the arrays at the end and all rows of
evaluations must equal those of a run that was left alone. The exit status is 1
otherwise. The temporary folder of the runs is kept.
"""

import itertools
import pathlib
import random
import signal
import tempfile
import time
from typing import Any

import numpy as np

from experiments.soaking.soak_disturbances import Processes, start_run
from experiments.soaking.soak_evidence import (
  Tally,
  count_batches,
  of_attempt,
  outcome,
  witnessed,
)
from experiments.soaking.soak_run import SAVE_EVERY
from moe_jax.runs.metrics import FILE_NAME, read_metrics

STEPS, KILLS, GRACE_SECONDS = 300, 20, 10
# An evaluation follows each checkpoint; a batch of it takes over a third of a
# step.
EVALUATION = dict(
  every_steps=SAVE_EVERY, num_batches=5 * 3 * SAVE_EVERY, split='train'
)
SPEC = dict(
  seed=0,
  total_steps=STEPS,
  mesh=dict(data=1, fsdp=1, expert=1, tensor=1),
  gradients=False,
  evaluation=EVALUATION,
)


def start(workdir: pathlib.Path, attempt: int) -> Processes:
  """Starts the run, or goes on with it."""
  return start_run(workdir, {**SPEC, 'attempt': attempt}, 1)


def end(workdir: pathlib.Path, attempt: int) -> dict[str, Any]:
  """The outcome of the run and its rows, once it has come to its end."""
  run = start(workdir, attempt)
  if not run.wait(3600) or run.all[0].returncode:
    raise SystemExit(f'the run failed; see {workdir}/log_0.txt')
  rows = [
    row
    for row in read_metrics(workdir / FILE_NAME)
    if any(key.startswith('eval/') for key in row)
  ]
  return {**outcome(workdir), 'rows': rows}


def seconds_of_evaluation(workdir: pathlib.Path) -> float:
  """The median time of an evaluation of an undisturbed run."""
  pairs = itertools.pairwise(witnessed(workdir))
  times = [b['time'] - a['time'] for a, b in pairs if 'evaluating' in a]
  return float(np.median(times))


def kill(
  workdir: pathlib.Path, longest: float, gently: bool, draw: random.Random
) -> Tally:
  """Starts the run 20 times, and kills it.

  Half of the kills come at one of its first steps, few enough for a run that
  loses none to have steps left at the end; the others come in the first
  evaluation, or soon after it.

  Args:
    workdir: Folder of the run.
    longest: Most seconds between the start of an evaluation and the kill.
    gently: Whether SIGTERM comes before SIGKILL.
    draw: Source of random numbers.
  """
  tally = Tally()
  for attempt in range(1, KILLS + 1):
    run = start(workdir, attempt)
    event, number = draw.choice(
      (('step', draw.randint(1, SAVE_EVERY // 2)), ('evaluating', 1))
    )
    while run.running() and number > sum(
      event in line for line in of_attempt(workdir, attempt)
    ):
      time.sleep(0.02)
    time.sleep(draw.uniform(0, longest) if event == 'evaluating' else 0)
    tally.counts['kills'] += len(run.running())
    if gently:
      run.send(signal.SIGTERM, run.all)
      in_time = run.wait(GRACE_SECONDS)
      tally.counts[f'ended {attempt}'] = in_time
      tally.counts['ended'] += in_time
    run.send(signal.SIGKILL, run.running())
    run.wait(GRACE_SECONDS)
    last = of_attempt(workdir, attempt)[-1:]
    tally.counts['in evaluations'] += any('evaluating' in x for x in last)
  return tally


def costs(workdir: pathlib.Path) -> dict[int, int]:
  """The number of steps that were computed again, by the killed attempt."""
  computed_again, last, killed = {}, 0, 0
  for attempt in range(1, KILLS + 2):
    steps = [x['step'] for x in of_attempt(workdir, attempt) if 'step' in x]
    if steps:
      computed_again[killed] = last + 1 - steps[0]
      last, killed = steps[-1], attempt
  return computed_again


def compare(workdir: pathlib.Path, calm: dict[str, Any], tally: Tally) -> None:
  """Lets the run come to its end, and records what differs or is lost."""
  result = end(workdir, KILLS + 1)
  again = costs(workdir)
  for attempt, cost in again.items():
    if cost > SAVE_EVERY * (not tally.counts[f'ended {attempt}']):
      tally.fault(f'kill {attempt} cost {cost} steps')
  count_batches(workdir, calm['batches'], tally)
  for name in ('arrays', 'rows'):
    if result[name] != calm[name]:
      tally.fault(f'the {name} at the end are others')
  count = tally.counts
  print(
    f'{workdir.name}: {count["kills"]} kills ({count["in evaluations"]} in '
    f'evaluations, {count["ended"]} ended by themselves), '
    f'{count["steps repeated"]} steps computed twice ({max(again.values())} at '
    f'most a kill), {count["batches lost"]} lost; last loss '
    f'{result["loss"]:.6f}, undisturbed {calm["loss"]:.6f}; '
    f'{len(tally.faults)} faults',
    flush=True,
  )


def main() -> None:
  """Makes all runs, in a temporary folder."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix='long-evaluations-'))
  calm = end(folder / 'calm', 1)
  steps = STEPS * calm['step_seconds']
  seconds = seconds_of_evaluation(folder / 'calm')
  evaluations = STEPS // SAVE_EVERY * seconds
  print(f'{steps:.1f} s of steps, {evaluations:.1f} s of evaluations')
  draw, faults = random.Random(0), []
  for name in ('SIGKILL', 'SIGTERM'):
    tally = kill(folder / name, 2 * seconds, name == 'SIGTERM', draw)
    compare(folder / name, calm, tally)
    faults += tally.faults
  if faults:
    raise SystemExit(f'what happened is in {folder}')


if __name__ == '__main__':
  main()
