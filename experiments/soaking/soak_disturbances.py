"""The processes of a run that `soak.py` disturbs, and the disturbances."""

import errno
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.launching.processes import Processes, free_port, start
from experiments.soaking.soak_evidence import Tally, of_attempt

# Moments at which a run is disturbed: while Python and the run start, at any
# time after the first step, or in an evaluation.
MOMENTS = ('start', 'training', 'training', 'training', 'evaluation')
DISTURBANCES = ('kill one', 'kill all', 'stop one', 'stop all')
HANG_SECONDS = 90.0
# Runs a module that kills itself when it is about to rename its nth file, and
# prints how many files were renamed if it ended by itself.
FATAL = """
import os, runpy, sys
from moe_jax.data.sources import files
files.PIECE_BYTES = 2**18  # so that a small file has many pieces
left, sys.argv = int(sys.argv[1]), sys.argv[2:]
count = 0
def fatal(rename):
  def renamed(source, target, *arguments, **keywords):
    global count
    count += 1
    if count == left:
      print('killed before the name', os.path.basename(target), flush=True)
      os.kill(os.getpid(), 9)
    return rename(source, target, *arguments, **keywords)
  return renamed
os.rename, os.replace = fatal(os.rename), fatal(os.replace)
try:
  runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
finally:
  print('renamed', count, flush=True)
"""


def start_run(
  workdir: pathlib.Path,
  spec: dict[str, Any],
  count: int,
  variables: Mapping[str, str] | None = None,
  program: Sequence[str] = ('-m', 'experiments.soaking.soak_run'),
) -> Processes:
  """Starts a run's processes, on CPUs; each has as many of the mesh's devices.

  Args:
    workdir: Folder of the run.
    spec: Arguments of `soak_run.py`, written as JSON.
    count: Number of processes.
    variables: Further variables of their environment.
    program: Arguments of Python, before those of `soak_run.py`.
  """
  devices = int(np.prod(list(spec['mesh'].values()))) // count
  env = {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': str(devices)}
  env |= variables or {}
  coordination = [f'127.0.0.1:{free_port()}', str(count)]
  command = [sys.executable, *program, str(workdir), json.dumps(spec)]
  processes = []
  for i in range(count):
    words = [*command, *coordination, str(i)] if count > 1 else command
    processes.append(start(words, workdir / f'log_{i}.txt', env))
  return Processes(processes)


def disturb(
  processes: Processes,
  workdir: pathlib.Path,
  attempt: int,
  tally: Tally,
  draw: random.Random,
) -> None:
  """Sends a random signal to one or all processes at a random moment."""
  when = draw.choice(MOMENTS)
  sign = {'training': 'step', 'evaluation': 'evaluating'}.get(when)
  while processes.running() and sign:
    if any(sign in line for line in of_attempt(workdir, attempt)):
      break
    time.sleep(0.02)
  last = 0.1 if when == 'evaluation' else 6
  moment = time.monotonic() + draw.uniform(0, last)
  while processes.running() and time.monotonic() < moment:
    time.sleep(0.02)
  if not processes.running():
    return  # the run finished before the moment came
  disturbance = draw.choice(DISTURBANCES)
  tally.counts[disturbance] += 1
  tally.counts[f'at {when}'] += 1
  everyone = disturbance.endswith('all')
  receivers = processes.all if everyone else [draw.choice(processes.all)]
  number = signal.SIGKILL if 'kill' in disturbance else signal.SIGTERM
  processes.send(number, receivers)
  if not processes.wait(HANG_SECONDS):
    seconds = f'{HANG_SECONDS:.0f} s'
    tally.fault(f'{disturbance}: others had not ended after {seconds}')


def contest(first: Processes, second: Processes, tally: Tally) -> Processes:
  """Waits until one of two who started at once is refused; gives the other."""
  deadline = time.monotonic() + HANG_SECONDS
  pair = (first, second)
  while all(side.running() for side in pair) and time.monotonic() < deadline:
    time.sleep(0.1)
  ended = [side for side in pair if not side.running()]
  refused = [side for side in ended if any(p.returncode for p in side.all)]
  if not ended or len(refused) == 2:
    tally.fault(f'of two who started at once {len(refused)} were refused')
  tally.counts['starters refused'] += len(refused)
  loser = (refused or ended or [second])[0]
  loser.wait(0)
  return first if loser is second else second


def failing_storage(
  folder: pathlib.Path, draw: random.Random
) -> dict[str, str]:
  """Variables that let a process' storage fail at random.

  They are empty where no C compiler is installed.

  Args:
    folder: A folder for the compiled library.
    draw: Source of random numbers.
  """
  source = pathlib.Path(__file__).with_name('failing_storage.c')
  library, compiler = folder / 'failing_storage.so', shutil.which('cc')
  if compiler is None or sys.platform != 'linux':
    return {}
  if not library.exists():
    command = [compiler, '-shared', '-fPIC', '-o', library, source, '-ldl']
    subprocess.run(command, check=True)
  failing = [('fsync', '.saving'), ('pread', '/checkpoints')]
  function, match = draw.choice(failing)
  return {
    'LD_PRELOAD': str(library),
    'FUNCTION': function,
    'MATCH': match,
    'ERROR': str(draw.choice([errno.EIO, errno.ESTALE, errno.ENOSPC])),
    'CHANCE': '6',
    'FAILURES': '99',
  }


def corrupt(folder: pathlib.Path, tally: Tally, draw: random.Random) -> None:
  """Damages the newest checkpoint, if it is not the only one."""
  steps = sorted(int(p.name) for p in folder.glob('*') if p.name.isdigit())
  if len(steps) < 2:
    return
  newest = folder / str(steps[-1])
  files = [p for p in newest.rglob('*') if p.is_file() and p.stat().st_size]
  path = draw.choice(sorted(files))
  content = bytearray(path.read_bytes())
  damage = draw.choice(('altered', 'cut short', 'without manifest'))
  if damage == 'without manifest':
    (newest / 'manifest.json').unlink(missing_ok=True)
  elif damage == 'cut short':
    path.write_bytes(content[: len(content) // 2])
  else:
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
  tally.counts[f'checkpoints {damage}'] += 1
