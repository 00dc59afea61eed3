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
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from experiments.soaking import soak_run
from experiments.soaking.soak_disturbances import (
  HANG_SECONDS,
  Processes,
  start,
  start_run,
)
from experiments.soaking.soak_evidence import (
  Tally,
  count_batches,
  outcome,
  witnessed,
)
from moe_jax import cli
from moe_jax.compression import whole_run
from moe_jax.errors import InputError
from moe_jax.runs.metrics import FILE_NAME, read_metrics

STEPS, MOST_KILLS_OF_A_RUN = 75, 10
MESHES = dict(data=2, expert=1), dict(data=1, expert=2)
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


Start = Callable[[pathlib.Path, int, int], Processes]


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
  start: Start
  result: Callable[[pathlib.Path], Any]
  is_read_half: bool = False
  seconds: float = 0.0
  renames: int = 0
  expected: Any = None

  def measure(self) -> None:
    """Does the work without a kill, twice: the first time, it compiles."""
    for name in ('warm', 'reference'):
      began = time.monotonic()
      processes = self.start(self.folder / name, 1, 0)
      if not processes.wait(600) or any(p.returncode for p in processes.all):
        raise SystemExit(f'{self.name} failed; see {self.folder / name}')
      self.seconds = time.monotonic() - began
    log = (self.folder / 'reference' / 'log_0.txt').read_text()
    self.renames = int(log.split()[-1])
    self.expected = self.result(self.folder / 'reference')
    print(
      f'{self.name}: {self.seconds:.1f} s, {self.renames} renames', flush=True
    )

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
      while len(processes.running()) == len(processes.all):
        if time.monotonic() > deadline:
          break
        time.sleep(0.005)
      codes = [process.poll() for process in processes.all]
      if None in codes and not by_rename and not alone:
        victims = draw.choice([processes.all, [draw.choice(processes.all)]])
        kill = draw.choice([os.killpg, os.kill])  # with its children, or alone
        for process in victims:
          with contextlib.suppress(ProcessLookupError):
            kill(process.pid, signal.SIGKILL)
      elif by_rename and draw.random() < 0.5 and -signal.SIGKILL in codes:
        processes.send(signal.SIGKILL, processes.all)
      killed_at = time.time()
      if not processes.wait(HANG_SECONDS):
        tally.fault(f'{self.name}: others hang after a kill')
      codes = [process.returncode for process in processes.all]
      if -signal.SIGKILL in codes:
        kills.append((attempt, killed_at))
        tally.counts[self.name] += 1
        if self.is_read_half and self._is_half(folder):
          tally.fault(f'{self.name}: a half run is read in {folder}')
        continue
      if any(codes):
        tally.fault(f'{self.name}: ended with {codes} in {folder}')
      elif self.result(folder) != self.expected:
        tally.fault(f'{self.name}: another result in {folder}')
      return kills
    raise SystemExit(f'{self.name} does not end in {folder}')

  def _is_half(self, folder: pathlib.Path) -> bool:
    try:
      return self.result(folder) != self.expected
    except InputError:
      return False  # The folder is refused.


def training(
  folder: pathlib.Path, count: int, mesh: Mapping[str, int], keep: int
) -> Work:
  """Training by one process or two, whose witnesses see every batch."""
  spec = dict(seed=0, total_steps=STEPS, gradients=False, keep_newest=keep)
  spec['mesh'] = dict(fsdp=1, tensor=1, **mesh)

  def start_training(workdir, attempt, fatal):
    program = ['-c', FATAL, str(fatal), 'experiments.soaking.soak_run']
    return start_run(
      workdir, {**spec, 'attempt': attempt}, count, None, program
    )

  def result(workdir):
    rows = read_metrics(workdir / FILE_NAME)
    losses = [
      (row['step'], name, row[name])
      for row in rows
      for name in sorted(row)
      if name.endswith('loss')
    ]
    end = outcome(workdir)
    parts = {name: end[name] for name in ('batches', 'arrays')}
    return {**parts, 'losses': sorted(losses)}

  name = f'training, {count} processes, {dict(mesh)}, {keep} kept'
  return Work(name, folder, start_training, result)


def command(module: str, words: Sequence[str]) -> Start:
  """The start of a command of moe_jax; '{}' in a word stands for the folder."""

  def begin(folder, attempt, fatal):
    del attempt
    program = ['-c', FATAL, str(fatal), module]
    arguments = [word.replace('{}', str(folder / 'out')) for word in words]
    log = folder / 'log_0.txt'
    return Processes([start([*program, *arguments], log, {})])

  return begin


def preparing(folder: pathlib.Path, engine: Sequence[str]) -> Work:
  """Tokenizing of a text with a tokenizer that is trained on it."""
  text = folder / 'text.jsonl'
  folder.mkdir(parents=True)
  source = pathlib.Path(subprocess.__file__).read_text(encoding='utf-8') * 4
  draw = random.Random(0)
  with text.open('w') as file:
    while file.tell() < 12_000_000:
      first = draw.randrange(len(source) - 3000)
      part = source[first : first + draw.randrange(3000)]
      file.write(json.dumps({'text': part}) + '\n')
  flags = dict(cache_dir='{}') | {
    'source.kind': 'files',
    'source.files.pattern': text,
    'tokenizer.kind': 'trained',
    'tokenizer.trained.vocab_size': 400,
  }
  words = [f'--config.data.{key}={value}' for key, value in flags.items()]
  words = ['--config=moe_jax:tiny_switch', *words, *engine]
  name = f'preparing, {" ".join(engine)}'
  return Work(name, folder, command('moe_jax.data.prepare', words), files_of)


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


def new_run(folder: pathlib.Path, module: str, words: Sequence[str]) -> Work:
  """A command that makes the folder of a run, which is read after each kill."""
  return Work(words[0], folder, command(module, words), arrays_of, True)


def write_mixtral(folder: pathlib.Path) -> pathlib.Path:
  """Writes a tiny Mixtral of random weights in the files of transformers."""
  width, hidden, experts, vocab, draw = 16, 24, 4, 264, np.random.default_rng(0)
  shapes = {'model.embed_tokens': (vocab, width), 'lm_head': (vocab, width)}
  shapes['model.norm'] = (width,)
  for layer in (f'model.layers.{i}.' for i in range(2)):
    for name in ('input_layernorm', 'post_attention_layernorm'):
      shapes[layer + name] = (width,)
    for name in 'qkvo':
      shapes[f'{layer}self_attn.{name}_proj'] = (width, width)
    sparse = f'{layer}block_sparse_moe.'
    shapes[f'{sparse}gate'] = (experts, width)
    for expert in (f'{sparse}experts.{i}.' for i in range(experts)):
      shapes |= dict.fromkeys([expert + 'w1', expert + 'w3'], (hidden, width))
      shapes[expert + 'w2'] = (width, hidden)
  folder.mkdir(parents=True)
  tensors = {
    f'{name}.weight': draw.normal(size=shape).astype(np.float32)
    for name, shape in shapes.items()
  }
  save_file(tensors, folder / 'model.safetensors')
  config = dict(architectures=['MixtralForCausalLM'], model_type='mixtral')
  config |= dict(hidden_size=width, intermediate_size=hidden)
  config |= dict(num_attention_heads=2, num_key_value_heads=2)
  config |= dict(num_local_experts=experts, num_experts_per_tok=2)
  config |= dict(num_hidden_layers=2, vocab_size=vocab)
  (folder / 'config.json').write_text(json.dumps(config))
  return folder


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
  mixtral = str(write_mixtral(folder / 'mixtral'))
  source = f'--run={trained[0].folder / "reference"}'
  commands = {
    'moe_jax.interop': [['import', mixtral, '--workdir={}']],
    'moe_jax.compression': [
      ['prune', source, '--output={}', '--share=0.5', '--batches=1'],
      ['quantize', source, '--output={}', '--format=int4', '--method=rtn'],
    ],
  }
  others = [
    preparing(folder / f'preparing_{i}', engine)
    for i, engine in enumerate(engines)
  ] + [
    new_run(folder / words[0], module, words)
    for module, lists in commands.items()
    for words in lists
  ]
  for work in (*trained, *others):
    work.measure()
  return trained, others


def next_steps(
  workdir: pathlib.Path, kills: Sequence[tuple[int, float]]
) -> list[float]:
  """Seconds from each kill to the first step of the start that followed it."""
  first: dict[int, float] = {}
  for line in witnessed(workdir):
    if 'step' in line:
      first.setdefault(line['attempt'], line['time'])
  return [
    first[attempt + 1] - killed_at
    for attempt, killed_at in kills
    if attempt + 1 in first
  ]


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
      count_batches(workdir, work.expected['batches'], batches)
      seconds += next_steps(workdir, killed)
    print(
      f'{tally.counts.total()} kills, {len(tally.faults)} faults; {work.name}: '
      f'{len(killed)}',
      flush=True,
    )
  for name, count in tally.counts.items():
    print(f'{count} kills: {name}')
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
  parser = cli.Parser(
    prog='python -m experiments.kills', description=__doc__.split('\n')[0]
  )
  add = parser.add_argument
  add('--kills', type=cli.POSITIVE, default=200, help='number of SIGKILLs')
  add('--seed', type=cli.NOT_NEGATIVE, default=0, help='seed of the kills')
  add('--folder', default='', help="new folder that is kept; '': temporary")
  options = parser.parse_args(argv)
  folder = pathlib.Path(options.folder or tempfile.mkdtemp(prefix='kills-'))
  began = time.monotonic()
  faults = kill(folder, options.kills, options.seed)
  minutes = (time.monotonic() - began) / 60
  print(f'{minutes:.1f} minutes, {len(faults)} faults', flush=True)
  if faults:
    print(f'what happened is in {folder}')
    raise SystemExit(1)
  if not options.folder:
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == '__main__':
  main()
