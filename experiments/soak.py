"""Does a run lose nothing? Trains, kills, corrupts, restarts, and compares.

    python -m experiments.soak --minutes=10

Three undisturbed runs of two processes, with three seeds, are the reference.
Then two runs are disturbed at random moments, one on the same mesh and one
whose mesh and number of processes change at every restart: one process or all
get SIGKILL or SIGTERM, and the newest checkpoint is altered, cut short or left
without its manifest. On the same mesh the final parameters must equal the
undisturbed run's bit for bit. After a change of mesh every array must equal the
checkpoint's, the batches must be the next ones, and the first step's loss and
gradient must be those of one device. The program of the disturbed processes is
`soaking/soak_run.py`.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from experiments.soaking import soak_run
from experiments.soaking.soak_evidence import (
  Tally,
  check,
  count_batches,
  describe,
  of_attempt,
  outcome,
)
from experiments.study.processes import free_port
from moe_jax.runs.workdir import CHECKPOINTS
from moe_jax.training.begin import begin
from moe_jax.training.setup import set_up

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
DISTURBANCES = ('kill one', 'kill all', 'stop one', 'stop all')
HANG_SECONDS = 90.0
MOST_STEPS = 2000


class Processes:
  """The processes of one run."""

  def __init__(self, workdir: pathlib.Path, spec: dict[str, Any], count: int):
    """Starts the processes; each has an equal share of the mesh's devices.

    Args:
      workdir: Folder of the run.
      spec: Arguments of `soak_run.py`, written as JSON.
      count: Number of processes.
    """
    devices = int(np.prod(list(spec['mesh'].values()))) // count
    env = os.environ | {
      'JAX_PLATFORMS': 'cpu',
      'JAX_NUM_CPU_DEVICES': str(devices),
    }
    where = [f'127.0.0.1:{free_port()}', str(count)]
    workdir.mkdir(parents=True, exist_ok=True)
    command = [
      sys.executable,
      '-m',
      'experiments.soaking.soak_run',
      str(workdir),
    ]
    self.all = []
    for i in range(count):
      with (workdir / f'log_{i}.txt').open('ab') as log:
        process = subprocess.Popen(
          [
            *command,
            json.dumps(spec),
            *([*where, str(i)] if count > 1 else []),
          ],
          env=env,
          stdout=log,
          stderr=subprocess.STDOUT,
        )
      self.all.append(process)

  def left(self) -> list[subprocess.Popen]:
    """The processes that have not ended."""
    return [process for process in self.all if process.poll() is None]

  def send(self, number: int, some: Sequence[subprocess.Popen]) -> None:
    """Sends a signal to those of `some` that have not ended."""
    for process in some:
      if process.poll() is None:
        process.send_signal(number)

  def wait(self, seconds: float) -> bool:
    """Waits for all processes; kills those that have not ended in time.

    Returns:
      Whether all ended in time.
    """
    deadline = time.monotonic() + seconds
    while self.left() and time.monotonic() < deadline:
      time.sleep(0.05)
    in_time = not self.left()
    self.send(signal.SIGKILL, self.left())
    for process in self.all:
      process.wait()
    return in_time


def undisturbed(workdir: pathlib.Path, seed: int, total_steps: int) -> dict:
  """Trains to the end without disturbance; see `outcome` for the result."""
  count, mesh = SAME
  spec = dict(seed=seed, total_steps=total_steps, mesh=mesh)
  spec |= dict(gradients=False, attempt=0)
  processes = Processes(workdir, spec, count)
  if not processes.wait(3600) or any(p.returncode for p in processes.all):
    raise SystemExit(f'the undisturbed run failed; see {workdir}/log_0.txt')
  return outcome(workdir)


def read_on_one_device(workdir: pathlib.Path, spec: dict) -> dict[str, Any]:
  """Reads the newest good checkpoint on one device.

  Returns:
    The number of the step after it, the digests of its arrays, and where the
    spec asks for it, loss and gradient of that step.
  """
  options = soak_run.make_options(
    spec['seed'], spec['total_steps'], dict(data=1, fsdp=1, expert=1, tensor=1)
  )
  run = set_up(options, workdir, resume=True, devices=jax.devices()[:1])
  run.message = lambda text: None
  with run.checkpoints:
    state = begin(run)
  number = int(state.step) + 1
  found = {'begin': number, 'arrays': soak_run.digests(state)}
  if spec['gradients'] and number <= spec['total_steps']:
    batch = next(run.batches(number - 1))
    found['first'] = soak_run.named(soak_run.first_gradient(run, state, batch))
  return found


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
  tally, deadline, attempt = (
    Tally(),
    time.monotonic() + seconds,
    0,
  )
  while True:
    count, mesh = next(meshes)
    expected = read_on_one_device(workdir, spec)
    if expected['begin'] > spec['total_steps']:
      return tally
    attempt, alone = attempt + 1, time.monotonic() > deadline
    processes = Processes(
      workdir, {**spec, 'mesh': mesh, 'attempt': attempt}, count
    )
    if alone:
      processes.wait(3600)
    else:
      disturb(processes, workdir, attempt, tally, draw)
    tally.counts['restarts'] += 1
    check(workdir, expected, of_attempt(workdir, attempt), tally)
    codes = [process.returncode for process in processes.all]
    if alone and any(codes):
      tally.fault(f'left alone, the processes ended with {codes}')
      return tally
    if not alone and draw.random() < 0.4:
      corrupt(workdir / CHECKPOINTS, tally, draw)


def disturb(processes, workdir, attempt, tally, draw) -> None:
  """Sends a random signal to one or all processes at a random moment."""
  starting = draw.random() < 0.15
  while processes.left() and not starting:
    if any('step' in line for line in of_attempt(workdir, attempt)):
      break
    time.sleep(0.1)
  moment = time.monotonic() + draw.uniform(0, 6)
  while processes.left() and time.monotonic() < moment:
    time.sleep(0.02)
  if not processes.left():
    return  # the run finished before the moment came
  what = draw.choice(DISTURBANCES)
  tally.counts[what] += 1
  who = processes.all if what.endswith('all') else [draw.choice(processes.all)]
  processes.send(signal.SIGKILL if 'kill' in what else signal.SIGTERM, who)
  if not processes.wait(HANG_SECONDS):
    tally.fault(f'{what}: others had not ended after {HANG_SECONDS:.0f} s')


def corrupt(folder: pathlib.Path, tally: Tally, draw: random.Random) -> None:
  """Damages the newest checkpoint, if it is not the only one."""
  steps = sorted(int(p.name) for p in folder.glob('*') if p.name.isdigit())
  if len(steps) < 2:
    return
  newest = folder / str(steps[-1])
  files = [p for p in newest.rglob('*') if p.is_file() and p.stat().st_size]
  path = draw.choice(sorted(files))
  content = bytearray(path.read_bytes())
  what = draw.choice(('altered', 'cut short', 'without manifest'))
  if what == 'without manifest':
    (newest / 'manifest.json').unlink(missing_ok=True)
  elif what == 'cut short':
    path.write_bytes(content[: len(content) // 2])
  else:
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
  tally.counts[f'checkpoints {what}'] += 1


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
  mean, spread = losses.mean(), losses.std(ddof=1)
  print(f'undisturbed: last losses {np.round(losses, 4)}', flush=True)
  left = max(60 * minutes - (time.monotonic() - began), 0)
  faults = []
  for name, gradients in (('same mesh', False), ('changing mesh', True)):
    workdir = folder / name.replace(' ', '_')
    meshes = order(draw) if gradients else iter(lambda: SAME, None)
    tally = disturbed(
      workdir, {**spec, 'gradients': gradients}, meshes, left * 0.45, draw
    )
    count_batches(workdir, calm[0]['batches'], tally)
    end = outcome(workdir)
    if gradients:
      off = abs(end['loss'] - mean)
      if off > 3 * spread:
        tally.fault(
          f'last loss {end["loss"]:.4f}, mean {mean:.4f} +- {spread:.4f}'
        )
      verdict = (
        f'first steps within {tally.worst:.1e} of one device; last loss '
        f'{end["loss"]:.4f}, undisturbed {mean:.4f} (std {spread:.4f} of '
        f'{len(SEEDS)} seeds)'
      )
    else:
      differing = [
        k for k, v in end['arrays'].items() if calm[0]['arrays'][k] != v
      ]
      if differing:
        tally.fault(f'not bit for bit: {differing[:4]}')
      same = len(end['arrays']) - len(differing)
      verdict = f'{same} of {len(end["arrays"])} arrays bit for bit'
    print(f'{name}: {describe(tally)}; {verdict}', flush=True)
    faults += [f'{name}: {fault}' for fault in tally.faults]
  took = (time.monotonic() - began) / 60
  print(f'{took:.1f} minutes, {len(faults)} faults', flush=True)
  return faults


def order(draw: random.Random) -> Iterator[tuple[int, dict[str, int]]]:
  """Random meshes without end, each different from the one before."""
  last = None
  while True:
    last = draw.choice([mesh for mesh in MESHES if mesh is not last])
    yield last


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the soak; the exit status is 1 if anything was lost."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.soak', description=__doc__.split('\n')[0]
  )
  add = parser.add_argument
  add('--minutes', type=float, default=10.0, help='approximate duration')
  add('--seed', type=int, default=0, help='seed of the disturbances')
  add(
    '--folder',
    default='',
    help="folder of the runs, which is kept; '': a temporary one",
  )
  options = parser.parse_args(argv)
  if not options.minutes > 0:
    parser.error(f'--minutes={options.minutes} must be positive')
  folder = pathlib.Path(options.folder or tempfile.mkdtemp(prefix='soak-'))
  cache = folder / 'compiled'
  jax.config.update('jax_compilation_cache_dir', str(cache))
  faults = soak(folder, options.minutes, options.seed)
  if faults:
    print(f'what happened is in {folder}')
    raise SystemExit(1)
  if not options.folder:
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == '__main__':
  main()
