"""Does a run lose nothing? Trains, kills, corrupts, restarts, and compares.

    python -m experiments.soak --minutes=10

Three undisturbed runs of two processes, of as many seeds, are the measure. Then
one run on the same mesh and one whose mesh and number of processes change at
every restart are disturbed at random moments: SIGKILL or SIGTERM to one process
or to both, and the newest checkpoint altered, cut short or left without its
manifest. On the same mesh the parameters at the end must be the undisturbed
run's bit for bit. After a change of mesh every array must be what the
checkpoint holds, the batches those that follow, and the first step's loss and
gradient those of one device. What is disturbed is `soak_run.py`.
"""

import argparse
import collections
import dataclasses
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

from experiments import soak_run
from experiments.local_runs import free_port
from moe_jax.training.setup import begin, set_up
from moe_jax.training.workdir import CHECKPOINTS

SEEDS = (0, 1, 2)
SAME = (2, dict(data=1, fsdp=1, expert=2, tensor=1))
# Processes, and a mesh of as many devices or twice or four times as many.
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
TOLERANCE = 1e-5
MOST_STEPS = 2000


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


class Processes:
  """The processes of one run."""

  def __init__(self, workdir: pathlib.Path, spec: dict[str, Any], count: int):
    """Starts them; each has its share of the mesh's devices."""
    devices = int(np.prod(list(spec['mesh'].values()))) // count
    env = os.environ | {
      'JAX_PLATFORMS': 'cpu',
      'JAX_NUM_CPU_DEVICES': str(devices),
    }
    where = [f'127.0.0.1:{free_port()}', str(count)]
    workdir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, '-m', 'experiments.soak_run', str(workdir)]
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
    """Those that have not ended."""
    return [process for process in self.all if process.poll() is None]

  def send(self, number: int, some: Sequence[subprocess.Popen]) -> None:
    """Sends a signal."""
    for process in some:
      if process.poll() is None:
        process.send_signal(number)

  def wait(self, seconds: float) -> bool:
    """Whether all have ended in time; else they are killed."""
    deadline = time.monotonic() + seconds
    while self.left() and time.monotonic() < deadline:
      time.sleep(0.05)
    in_time = not self.left()
    self.send(signal.SIGKILL, self.left())
    for process in self.all:
      process.wait()
    return in_time


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


def undisturbed(workdir: pathlib.Path, seed: int, total_steps: int) -> dict:
  """Runs to the end; its batches, last digests and last loss."""
  count, mesh = SAME
  spec = dict(seed=seed, total_steps=total_steps, mesh=mesh)
  spec |= dict(gradients=False, attempt=0)
  processes = Processes(workdir, spec, count)
  if not processes.wait(3600) or any(p.returncode for p in processes.all):
    raise SystemExit(f'the undisturbed run failed; see {workdir}/log_0.txt')
  return outcome(workdir)


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


def read_on_one_device(workdir: pathlib.Path, spec: dict) -> dict[str, Any]:
  """What the newest good checkpoint holds, and the step that follows it."""
  config = soak_run.make_config(
    spec['seed'], spec['total_steps'], dict(data=1, fsdp=1, expert=1, tensor=1)
  )
  run = set_up(config, workdir, resume=True, devices=jax.devices()[:1])
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
  """Runs to the end, with disturbances for so many seconds."""
  tally, deadline, attempt = Tally(), time.monotonic() + seconds, 0
  while True:
    count, mesh = next(meshes)
    expected = read_on_one_device(workdir, spec)
    if expected['begin'] > spec['total_steps']:
      return tally
    attempt += 1
    processes = Processes(
      workdir, {**spec, 'mesh': mesh, 'attempt': attempt}, count
    )
    if time.monotonic() > deadline:
      processes.wait(3600)
    else:
      disturb(processes, workdir, attempt, tally, draw)
    tally.counts['restarts'] += 1
    check(workdir, expected, of_attempt(workdir, attempt), tally)
    codes = [process.returncode for process in processes.all]
    if time.monotonic() > deadline and any(codes):
      tally.fault(f'left alone, the processes ended with {codes}')
      return tally
    if time.monotonic() < deadline and draw.random() < 0.4:
      corrupt(workdir / CHECKPOINTS, tally, draw)


def disturb(processes, workdir, attempt, tally, draw) -> None:
  """Waits for a random moment, and sends a signal."""
  starting = draw.random() < 0.15
  while processes.left() and not starting:
    if any('step' in line for line in of_attempt(workdir, attempt)):
      break
    time.sleep(0.1)
  moment = time.monotonic() + draw.uniform(0, 6)
  while processes.left() and time.monotonic() < moment:
    time.sleep(0.02)
  if not processes.left():
    return  # it was at its end
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
    if tally.worst > TOLERANCE:
      tally.fault(f'first step at {line["begin"]} differs by {tally.worst}')


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
  other = [step for step in both if not _agree(timeline[step], reference[step])]
  tally.counts['batches lost'] += len(lost)
  tally.counts['batches of another step'] += len(other)
  tally.counts['steps repeated'] += taken - len(timeline)
  for name in ('batches doubled', 'batches lost', 'batches of another step'):
    if tally.counts[name]:
      tally.fault(f'{tally.counts[name]} {name}')


def _agree(found: dict[str, str], whole: dict[str, str]) -> bool:
  """A process killed before it wrote its last line leaves rows unseen."""
  return all(whole.get(row) == value for row, value in found.items())


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


def paced(folder: pathlib.Path, minutes: float) -> int:
  """How many steps an undisturbed run does in a twentieth of the time."""
  trial = undisturbed(folder / 'trial', SEEDS[0], 100)
  steps = int(3 * minutes / trial['step_seconds'])
  return min(max(100, steps // 25 * 25), MOST_STEPS)


def soak(folder: pathlib.Path, minutes: float, seed: int) -> list[str]:
  """The whole; returns what was lost."""
  began = time.monotonic()
  draw = random.Random(seed)
  total_steps = paced(folder, minutes)
  spec = dict(seed=SEEDS[0], total_steps=total_steps)
  print(f'{total_steps} steps; undisturbed, seeds {SEEDS}', flush=True)
  calm = [undisturbed(folder / f'calm_{s}', s, total_steps) for s in SEEDS]
  losses = np.array([run['loss'] for run in calm])
  mean, spread = losses.mean(), losses.std(ddof=1)
  print(f'undisturbed: last losses {np.round(losses, 4)}', flush=True)
  left = 60 * minutes - (time.monotonic() - began)
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
  """Meshes, each another than the one before."""
  last = None
  while True:
    last = draw.choice([mesh for mesh in MESHES if mesh is not last])
    yield last


def main(argv: Sequence[str] | None = None) -> None:
  """Exits with 1 if anything was lost."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.soak', description=__doc__.split('\n')[0]
  )
  parser.add_argument('--minutes', type=float, default=10.0)
  parser.add_argument('--seed', type=int, default=0, help='of disturbances')
  parser.add_argument('--folder', default='', help="kept; '': a temporary one")
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
