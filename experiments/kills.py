"""Does SIGKILL lose anything? Kills four kinds of work, 200 times by default.

    python -m experiments.kills --kills=200

Half of the kills hit training on a mixture: one process or two, on one of two
meshes, with one checkpoint kept in half of the runs. The others hit preparing
text (by a pool of one or two processes, and by Apache Beam where it is
installed), importing a checkpoint and compressing a run. A kill comes at a
random time, or when a process is about to rename a file: so it also falls
between a checkpoint's arrays and its manifest, and between the manifest and the
name of the checkpoint. The same command then starts again, until after some
kills it is left alone. Its result has to be that of a run that was never
killed: every batch once and the last arrays bit for bit for training, every
byte for prepared text, every array of a new run, which is never read before it
is whole. The exit status is 1 if anything was lost, doubled or read half.
"""

import collections
import contextlib
import dataclasses
import hashlib
import importlib.util
import itertools
import os
import pathlib
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.benchmarks import random_checkpoint, random_reads
from experiments.launching.processes import Processes, start
from experiments.soaking import soak_disturbances, soak_evidence, soak_run
from experiments.soaking.soak_disturbances import FATAL
from experiments.soaking.soak_evidence import Tally
from moe_jax import cli
from moe_jax.compression import whole_run
from moe_jax.errors import InputError

STEPS, MOST_KILLS_OF_A_RUN = 75, 10
MESHES = dict(data=2, expert=1), dict(data=1, expert=2)


@dataclasses.dataclass
class Work:
  """One kind of work that is killed.

  Attributes:
    name: Name in what is printed.
    folder: Folder of all that it does.
    start: Starts the work in a folder; it gets the number of the start and of
      the rename that is fatal (0: none).
    result: What has to be equal, of a folder whose work has ended.
    is_read_half: Whether `result` is asked of a half folder, too, and refuses.
    seconds: Duration of the work when it is left alone.
    renames: Number of files that its first process renames.
    expected: The result of the work when it is left alone.
  """

  name: str
  folder: pathlib.Path
  start: Callable[[pathlib.Path, int, int], Processes]
  result: Callable[[pathlib.Path], Any]
  is_read_half: bool = False
  seconds: float = 0.0
  renames: int = 0
  expected: Any = None

  def measure(self) -> None:
    """Does the work without a kill, twice: the first time, it compiles."""
    for folder in self.folder / 'warm', self.folder / 'reference':
      began = time.monotonic()
      processes = self.start(folder, 1, 0)
      if not processes.wait(600) or any(p.returncode for p in processes.all):
        raise SystemExit(f'{self.name} failed; see {folder}')
      self.seconds = time.monotonic() - began
      self.renames = int((folder / 'log_0.txt').read_text().split()[-1])
    self.expected = self.result(folder)
    counts = f'{self.seconds:.1f} s, {self.renames} renames'
    print(f'{self.name}: {counts}', flush=True)

  def disturb(
    self, folder: pathlib.Path, draw: random.Random, tally: Tally
  ) -> list[tuple[int, float]]:
    """Does the work with kills; returns the starts that were killed, and when.

    Args:
      folder: New folder of the work.
      draw: Source of random numbers.
      tally: Counts and faults, which are added to.
    """
    kills: list[tuple[int, float]] = []
    most = draw.randint(1, MOST_KILLS_OF_A_RUN)
    for attempt in range(1, 100):
      alone = len(kills) == most
      by_rename = not alone and draw.random() < 0.5
      fatal = draw.randint(1, self.renames // 2) if by_rename else 0
      processes = self.start(folder, attempt, fatal)
      seconds = draw.uniform(0.1, 1) * self.seconds
      deadline = time.monotonic() + (600 if alone or by_rename else seconds)
      count = len(processes.all)
      while len(processes.running()) == count and time.monotonic() < deadline:
        time.sleep(0.005)
      codes = [process.poll() for process in processes.all]
      if None in codes and not by_rename and not alone:
        victims = draw.choice([processes.all, [draw.choice(processes.all)]])
        kill = draw.choice([os.killpg, os.kill])  # with its children, or alone
        for process in victims:
          with contextlib.suppress(ProcessLookupError):
            kill(process.pid, signal.SIGKILL)
      elif by_rename and draw.random() < 0.5 and -signal.SIGKILL in codes:
        processes.send(signal.SIGKILL)
      killed_at = time.time()
      if not processes.wait(soak_disturbances.HANG_SECONDS):
        tally.fault(f'{self.name}: others hang after a kill')
      codes = [process.returncode for process in processes.all]
      if -signal.SIGKILL in codes:
        kills.append((attempt, killed_at))
        tally.counts[self.name] += 1
        # A half folder is refused, or else it has to be whole.
        with contextlib.suppress(InputError):
          if self.is_read_half and self.result(folder) != self.expected:
            tally.fault(f'{self.name}: a half run is read in {folder}')
        continue
      if any(codes):
        tally.fault(f'{self.name}: ended with {codes} in {folder}')
      elif self.result(folder) != self.expected:
        tally.fault(f'{self.name}: another result in {folder}')
      return kills
    raise SystemExit(f'{self.name} does not end in {folder}')


def training(
  folder: pathlib.Path, count: int, mesh: Mapping[str, int], keep: int
) -> Work:
  """Training by one process or two, whose witnesses see every batch."""
  spec = dict(seed=0, total_steps=STEPS, gradients=False, keep_newest=keep)
  spec['mesh'] = dict(fsdp=1, tensor=1, **mesh)

  def start_training(workdir, attempt, fatal):
    program = ['-c', FATAL, str(fatal), 'experiments.soaking.soak_run']
    own = {**spec, 'attempt': attempt}
    return soak_disturbances.start_run(workdir, own, count, program=program)

  def result(workdir):
    end = soak_evidence.outcome(workdir)
    return {name: end[name] for name in ('batches', 'arrays', 'losses')}

  name = f'training, {count} processes, {dict(mesh)}, {keep} kept'
  return Work(name, folder, start_training, result)


def command(
  name: str,
  folder: pathlib.Path,
  module: str,
  words: Sequence[str],
  result: Callable[[pathlib.Path], Any],
  is_read_half: bool = True,
) -> Work:
  """A command of moe_jax; '{}' in its words stands for the folder `out`."""

  def begin(workdir, attempt, fatal):
    del attempt
    program = [sys.executable, '-c', FATAL, str(fatal), module]
    arguments = [word.replace('{}', str(workdir / 'out')) for word in words]
    log, on_cpu = workdir / 'log_0.txt', {'JAX_PLATFORMS': 'cpu'}
    return Processes([start([*program, *arguments], log, on_cpu)])

  return Work(name, folder, begin, result, is_read_half)


def files_of(folder: pathlib.Path) -> dict[str, str]:
  """Digests of all files of prepared text but unfinished ones."""
  (tokens,) = (folder / 'out' / 'tokens').glob('[!.]*')
  return {
    str(path.relative_to(tokens)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(tokens.rglob('*'))
    if path.is_file()
  }


def arrays_of(folder: pathlib.Path) -> dict[str, str]:
  """Digests of the arrays of a run that a command has made."""
  return soak_run.digests(whole_run.read(folder / 'out').variables)


def kinds_of_work(folder: pathlib.Path) -> tuple[list[Work], list[Work]]:
  """Ways of training, and other work, each measured when it is left alone."""
  ways = itertools.product((1, 2), MESHES)
  trained = [
    training(folder / f'training_{i}', *way, keep=1 if i % 3 else 3)
    for i, way in enumerate(ways)
  ]
  engines = [['--processes=1'], ['--processes=2']]
  if importlib.util.find_spec('apache_beam'):
    engines.append(['--runner=FnApiRunner', '--', '--direct_num_workers=1'])
  else:
    print('Apache Beam is not installed: only pools prepare text', flush=True)
  text, imported = folder / 'text', folder / 'imported'
  random_reads.write(text, 12_000_000)
  random_checkpoint.write(imported, random_checkpoint.TINY, file_bytes=1e6)
  source = f'--run={trained[0].folder / "reference"}'
  flags = [
    '--config=moe_jax:tiny_switch',
    '--config.data.cache_dir={}',
    '--config.data.source.kind=files',
    f'--config.data.source.files.pattern={text}/*.jsonl',
    '--config.data.tokenizer.kind=trained',
    '--config.data.tokenizer.trained.vocab_size=400',
  ]
  others = [
    command(
      f'preparing, {" ".join(engine)}',
      folder / f'preparing_{i}',
      'moe_jax.data.prepare',
      [*flags, *engine],
      files_of,
      is_read_half=False,
    )
    for i, engine in enumerate(engines)
  ]
  prune = [source, '--output={}', '--share=0.5', '--batches=1']
  quantize = [source, '--output={}', '--format=int4', '--method=rtn']
  others += [
    command(verb, folder / verb, f'moe_jax.{module}', [verb, *words], arrays_of)
    for module, verb, words in (
      ('interop', 'import', [str(imported), '--workdir={}']),
      ('compression', 'prune', prune),
      ('compression', 'quantize', quantize),
    )
  ]
  for work in (*trained, *others):
    work.measure()
  return trained, others


def kill(folder: pathlib.Path, kills: int, seed: int) -> list[str]:
  """Kills work until there are as many kills; returns a line for each fault.

  Args:
    folder: New folder of all work.
    kills: Number of kills.
    seed: Seed of the times and places of the kills.
  """
  draw, tally, seconds = random.Random(seed), Tally(), []
  kinds = kinds_of_work(folder)
  while tally.counts.total() < kills:
    works = min(kinds, key=lambda ws: sum(tally.counts[w.name] for w in ws))
    work = min(works, key=lambda w: tally.counts[w.name])
    workdir = work.folder / f'run_{len(list(work.folder.glob("run_*")))}'
    killed = work.disturb(workdir, draw, tally)
    if works is kinds[0]:
      batches = Tally(faults=tally.faults)
      soak_evidence.count_batches(workdir, work.expected['batches'], batches)
      steps: dict[int, float] = {}  # the time of each start's first step
      for line in soak_evidence.witnessed(workdir):
        if 'step' in line:
          steps.setdefault(line['attempt'], line['time'])
      seconds += [steps[i + 1] - then for i, then in killed if i + 1 in steps]
    counts = f'{tally.counts.total()} kills, {len(tally.faults)} faults'
    print(f'{counts}; {work.name}: {len(killed)}', flush=True)
  print(f'kills: {soak_evidence.describe(tally)}')
  logs = folder.glob('*/run_*/log_*')
  text = '\n'.join(log.read_text(errors='replace') for log in logs)
  names = re.findall(r'killed before the name (\S+)', text)
  places = collections.Counter(re.sub(r'\d+', '0', name) for name in names)
  print(f'kills before a file was renamed (0: any number): {dict(places)}')
  quartiles = np.quantile(seconds, [0.25, 0.5, 0.75, 1]).round(1).tolist()
  print(f'seconds from a kill to the next step: quartiles, most {quartiles}')
  return tally.faults


@cli.reported()
def main(argv: Sequence[str] | None = None) -> None:
  """Kills work; the exit status is 1 if anything was lost."""
  parser = cli.parser('experiments.kills', __doc__)
  add = parser.add_argument
  add('--kills', type=cli.POSITIVE, default=200, help='number of SIGKILLs')
  add('--seed', type=cli.NOT_NEGATIVE, default=0, help='seed of the kills')
  add('--folder', default='', help="new folder that is kept; '': temporary")
  options = parser.parse_args(argv)
  with soak_evidence.judged('kills', options.folder) as (folder, faults):
    faults += kill(folder, options.kills, options.seed)


if __name__ == '__main__':
  main()
