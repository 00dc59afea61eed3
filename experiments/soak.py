"""Does a run lose nothing? Trains, kills, corrupts, restarts, and compares.

    python -m experiments.soak --minutes=10

Three undisturbed runs of two processes, with three seeds, are the reference.
Then two runs are disturbed at random moments, one on the same mesh and one
whose mesh and number of processes change at every restart: one process or all
get SIGKILL or SIGTERM while they start, train or evaluate, the newest
checkpoint is altered, cut short or left without its manifest, two jobs start at
once in the same folder, and storage fails at random. On the same mesh the final
parameters must equal the undisturbed run's bit for bit. After a change of mesh
every array must equal the checkpoint's, the batches must be the next ones, and
the first step's loss and gradient must be those of one device. The program of
the processes is `soaking/soak_run.py`, and what disturbs them is
`soaking/soak_disturbances.py`.
"""

import dataclasses
import pathlib
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from experiments.soaking import soak_disturbances, soak_evidence, soak_run
from experiments.soaking.soak_disturbances import start_run
from experiments.soaking.soak_evidence import Tally, describe, outcome
from moe_jax import cli
from moe_jax.runs.workdir import CHECKPOINTS
from moe_jax.training.setup import begin, set_up

SEEDS = (0, 1, 2)
SAME = (2, dict(data=1, fsdp=1, expert=2, tensor=1))
# Pairs (number of processes, mesh); a process has one, two or four devices.
MESHES = (
  SAME,
  (1, dict(data=1, fsdp=1, expert=4, tensor=1)),
  (2, dict(data=1, fsdp=2, expert=1, tensor=2)),
  (1, dict(data=1, fsdp=1, expert=1, tensor=1)),
  (2, dict(data=2, fsdp=1, expert=1, tensor=1)),
  (4, dict(data=2, fsdp=1, expert=2, tensor=1)),
)
MOST_STEPS = 2000


def undisturbed(workdir: pathlib.Path, seed: int, total_steps: int) -> dict:
  """Trains to the end without disturbance; see `outcome` for the result."""
  count, mesh = SAME
  spec = dict(seed=seed, total_steps=total_steps, mesh=mesh, attempt=0)
  processes = start_run(workdir, spec | {'gradients': False}, count)
  if not processes.wait(3600) or any(p.returncode for p in processes.all):
    raise SystemExit(f'the undisturbed run failed; see {workdir}/log_0.txt')
  return outcome(workdir)


def read_on_one_device(workdir: pathlib.Path, spec: dict) -> dict[str, Any]:
  """Reads the newest good checkpoint on one device.

  Returns:
    The number of the step after it, the digests of its arrays, and where the
    spec asks for it, loss and gradient of that step.
  """
  mesh = dict(data=1, fsdp=1, expert=1, tensor=1)
  options = soak_run.make_options(spec['seed'], spec['total_steps'], mesh)
  run = set_up(options, workdir, resume=True, devices=jax.devices()[:1])
  with run.checkpoints:
    run, state, _ = begin(dataclasses.replace(run, message=lambda text: None))
  number = int(state.step) + 1
  checkpoint = {'begin': number, 'arrays': soak_run.digests(state)}
  if spec['gradients'] and number <= spec['total_steps']:
    batch = next(run.batches(number - 1))
    gradient = soak_run.first_gradient(run, state, batch)
    checkpoint['first'] = soak_run.by_path(gradient)
  return checkpoint


def disturbed(
  workdir: pathlib.Path,
  spec: dict[str, Any],
  meshes: Iterator[tuple[int, dict[str, int]]],
  seconds: float,
  draw: random.Random,
) -> Tally:
  """Trains to the end, with disturbances for a number of seconds.

  Args:
    workdir: Folder of the run.
    spec: Arguments of `soak_run.py`, but for the mesh and the attempt.
    meshes: Number of processes and mesh of each start.
    seconds: Seconds after which the run is left alone.
    draw: Source of random numbers.
  """
  tally, deadline, attempt = (Tally(), time.monotonic() + seconds, 0)
  while True:
    count, mesh = next(meshes)
    expected = read_on_one_device(workdir, spec)
    if expected['begin'] > spec['total_steps']:
      # A signal may have ended the run after its last save, in its evaluation.
      if not any('end' in line for line in soak_evidence.witnessed(workdir)):
        last = {**spec, 'mesh': mesh, 'attempt': attempt + 1}
        start_run(workdir, last, count).wait(3600)
      return tally
    attempt, alone = attempt + 1, time.monotonic() > deadline
    attempt_spec = {**spec, 'mesh': mesh, 'attempt': attempt}
    variables = {}
    if not alone and draw.random() < 0.25:
      variables = soak_disturbances.failing_storage(workdir.parent, draw)
      tally.counts['failing storages'] += bool(variables)
    processes = start_run(workdir, attempt_spec, count, variables)
    if not alone and not variables and draw.random() < 0.25:
      second = start_run(workdir, attempt_spec, count, variables)
      processes = soak_disturbances.contest(processes, second, tally)
    if alone:
      processes.wait(3600)
    else:
      soak_disturbances.disturb(processes, workdir, attempt, tally, draw)
    tally.counts['restarts'] += 1
    lines = soak_evidence.of_attempt(workdir, attempt)
    soak_evidence.check(workdir, expected, lines, tally)
    codes = [process.returncode for process in processes.all]
    if alone and any(codes):
      tally.fault(f'left alone, the processes ended with {codes}')
      return tally
    if not alone and draw.random() < 0.4:
      soak_disturbances.corrupt(workdir / CHECKPOINTS, tally, draw)


def paced(folder: pathlib.Path, minutes: float) -> int:
  """Number of steps that an undisturbed run takes in a twentieth of the time.

  It is at least 100 and at most `MOST_STEPS`, and is measured by a trial.
  """
  trial = undisturbed(folder / 'trial', SEEDS[0], 100)
  steps = int(3 * minutes / trial['step_seconds'])
  return min(max(100, steps // 25 * 25), MOST_STEPS)


def soak(folder: pathlib.Path, minutes: float, seed: int) -> list[str]:
  """Makes all runs and comparisons; returns a line for everything lost.

  Args:
    folder: Folder of the runs.
    minutes: Approximate duration.
    seed: Seed of the disturbances.
  """
  began = time.monotonic()
  draw = random.Random(seed)
  total_steps = paced(folder, minutes)
  spec = dict(seed=SEEDS[0], total_steps=total_steps)
  print(f'{total_steps} steps; undisturbed, seeds {SEEDS}', flush=True)
  calm = [undisturbed(folder / f'calm_{s}', s, total_steps) for s in SEEDS]
  losses = np.array([run['loss'] for run in calm])
  mean, deviation = losses.mean(), losses.std(ddof=1)
  print(f'undisturbed: last losses {np.round(losses, 4)}', flush=True)
  seconds_left = max(60 * minutes - (time.monotonic() - began), 0)
  faults = []
  for name, gradients in (('same mesh', False), ('changing mesh', True)):
    workdir = folder / name.replace(' ', '_')
    meshes = order(draw) if gradients else iter(lambda: SAME, None)
    own = {**spec, 'gradients': gradients}
    tally = disturbed(workdir, own, meshes, seconds_left * 0.45, draw)
    if tally.faults:  # the run may not have ended
      print(f'{name}: {describe(tally)}', flush=True)
      faults += [f'{name}: {fault}' for fault in tally.faults]
      continue
    soak_evidence.count_batches(workdir, calm[0]['batches'], tally)
    end = outcome(workdir)
    if gradients:
      distance = abs(end['loss'] - mean)
      if distance > 3 * deviation:
        expected = f'mean {mean:.4f} +- {deviation:.4f}'
        tally.fault(f'last loss {end["loss"]:.4f}, {expected}')
      verdict = (
        f'first steps within {tally.worst:.1e} of one device; last loss '
        f'{end["loss"]:.4f}, undisturbed {mean:.4f} (std {deviation:.4f} of '
        f'{len(SEEDS)} seeds)'
      )
    else:
      arrays, expected = end['arrays'], calm[0]['arrays']
      differing = [k for k, v in arrays.items() if expected[k] != v]
      if differing:
        tally.fault(f'not bit for bit: {differing[:4]}')
      same = len(arrays) - len(differing)
      verdict = f'{same} of {len(arrays)} arrays bit for bit'
    print(f'{name}: {describe(tally)}; {verdict}', flush=True)
    faults += [f'{name}: {fault}' for fault in tally.faults]
  return faults


def order(draw: random.Random) -> Iterator[tuple[int, dict[str, int]]]:
  """Random meshes without end, each different from the one before."""
  last = None
  while True:
    last = draw.choice([mesh for mesh in MESHES if mesh is not last])
    yield last


@cli.reported()
def main(argv: Sequence[str] | None = None) -> None:
  """Runs the soak; the exit status is 1 if anything was lost."""
  parser = cli.parser('experiments.soak', __doc__)
  add, positive = parser.add_argument, cli.number(float, above=0)
  add('--minutes', type=positive, default=10.0, help='approximate duration')
  text = 'seed of the disturbances'
  add('--seed', type=cli.NOT_NEGATIVE, default=0, help=text)
  text = "folder of the runs, which is kept; '': a temporary one"
  add('--folder', default='', help=text)
  options = parser.parse_args(argv)
  with soak_evidence.judged('soak', options.folder) as (folder, faults):
    compiled = str(folder / 'compiled')
    jax.config.update('jax_compilation_cache_dir', compiled)
    faults += soak(folder, options.minutes, options.seed)


if __name__ == '__main__':
  main()
