"""What do metrics, traces and checkpoints add to a training step?

    python -m experiments.bench_overhead
    python -m experiments.bench_overhead --files=shakespeare.txt

Times bursts of the config's training loop, interleaved: the bare loop (batches
and steps), the loop with metrics, with metrics and a trace of every step's
choices of experts, and with metrics and a checkpoint, whose writing is waited
for within the burst. Bursts have 100 steps, so that is a checkpoint every 100
steps. A step that is recorded is another program, in a run of its own. Writes
`table.md`, `rows.csv` and `results.json` to `results/bench_overhead/<device>`.
"""

import argparse
import contextlib
import dataclasses
import io
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections

from experiments.benchmarks import timing
from experiments.study.tables import markdown_table
from moe_jax import cli, run_config
from moe_jax.analysis.recording import Traces
from moe_jax.analysis.replay import Replaying
from moe_jax.config import layered, section_of
from moe_jax.devices import keep_freed_memory
from moe_jax.run_config import RunConfig
from moe_jax.training.begin import begin
from moe_jax.training.run_options import TraceOptions
from moe_jax.training.setup import Hook, Run, set_up

NAME = 'bench_overhead'
BARE, METRICS, BOTH = 'bare loop', 'metrics', 'metrics and checkpoint'
TRACES = 'metrics and traces'
# Largest ratio aimed at: a step with metrics and checkpoint over a bare one.
AIM = 1.05


def prepared(
  config: ml_collections.ConfigDict, files: str = '', modules: str = ''
) -> RunConfig:
  """The run's options on one device, on the chosen text.

  The run is a million steps long, so that no burst reaches its end.

  Args:
    config: Config of the run.
    files: Pattern of the text files to train on, read as characters; '' takes
      the standard library's text, as bytes.
    modules: Modules of the standard library to train on; '' takes the whole
      embedded corpus.
  """
  source = {'kind': 'python_stdlib', 'python_stdlib': {'modules': modules}}
  tokenizer = 'bytes'
  if files:
    source = {'kind': 'files', 'files': {'pattern': files}}
    tokenizer = 'chars'
  changes = {
    'total_steps': 10**6,
    'data': {'source': source, 'tokenizer': {'kind': tokenizer}},
    'mesh': dict(data=1, fsdp=1, expert=1, tensor=1),
  }
  return run_config.read(layered(RunConfig, config, changes))


class Loop:
  """A run's training loop, executed in bursts of steps; a context manager."""

  def __init__(self, run: Run, burst: int, hooks: Sequence[Hook] = ()):
    self._run = run
    self._burst = burst
    self._hooks = hooks
    self._step = 0

  def __enter__(self) -> 'Loop':
    run = self._run
    with contextlib.ExitStack() as stack:
      stack.enter_context(run.checkpoints)
      run, self._state, _ = begin(run)
      self._batches = run.batches(0)
      stack.enter_context(run.recorder.recording(0))
      for hook in self._hooks:
        stack.callback(hook.close)
        hook.check(run)
        run = hook.start(run) or run
      self._run = run
      self._stack = stack.pop_all()
    return self

  def __exit__(self, *exc) -> None:
    self._stack.close()

  def bare(self) -> None:
    """One burst of batches and steps, without metrics or checkpoints."""
    for _ in range(self._burst):
      self._state, _ = self._take(next(self._batches))
    jax.block_until_ready(self._state)

  def with_metrics(self, saves: bool = False) -> None:
    """One burst that reads every step's metrics and writes their rows.

    Args:
      saves: Whether a checkpoint is begun at the burst's first step.
    """
    run = self._run
    for i in range(self._burst):
      batch = next(self._batches)
      self._state, metrics = self._take(batch)
      run.recorder.add(self._step, metrics, batch)
      if saves and not i:
        with run.recorder.paused('checkpoint'):
          run.checkpoints.save(self._step, self._state)
          run.message(f'step {self._step}: saving a checkpoint')
    with run.recorder.paused('checkpoint'):
      run.checkpoints.wait()
    jax.block_until_ready(self._state)

  def with_traces(self) -> None:
    """One burst with metrics whose records are written before it ends."""
    self.with_metrics()
    for hook in self._hooks:
      hook.paused()

  def with_both(self) -> None:
    """One burst with metrics and a checkpoint.

    The checkpoint is begun at the first step and complete when this returns.
    """
    self.with_metrics(saves=True)

  def _take(self, batch):
    self._step += 1
    return self._run.train_step(self._state, batch)


class Counted:
  """A case that also records the CPU seconds of each run, of all threads."""

  def __init__(self, run: Callable[[], None]):
    self._run = run
    self.seconds: list[float] = []

  def __call__(self) -> None:
    """Runs the case once."""
    begin = time.process_time()
    self._run()
    self.seconds.append(time.process_time() - begin)


def measure(
  run_options: RunConfig, *, burst: int, **options: Any
) -> list[dict[str, Any]]:
  """Times bursts of all cases, interleaved; one row for each case.

  Args:
    run_options: Options of the run; see `prepared`.
    burst: Number of steps of a burst.
    **options: Arguments of `timing.interleave`.
  """
  traced = dataclasses.replace(run_options, trace=TraceOptions(every_steps=1))
  with (
    tempfile.TemporaryDirectory() as folder,
    tempfile.TemporaryDirectory() as other,
    # The progress display is part of what metrics cost: it stays on, unseen.
    contextlib.redirect_stdout(io.StringIO()),
  ):
    one = jax.devices()[:1]
    run = set_up(run_options, folder, devices=one)
    recorded = set_up(traced, other, devices=one)
    hooks = Replaying(), Traces()
    with Loop(run, burst) as loop, Loop(recorded, burst, hooks) as other_loop:
      cases = {
        BARE: Counted(loop.bare),
        METRICS: Counted(loop.with_metrics),
        TRACES: Counted(other_loop.with_traces),
        BOTH: Counted(loop.with_both),
      }
      times = timing.interleave(cases, **options)
    saved = _size(pathlib.Path(folder) / 'checkpoints')
  rows = []
  for case, durations in times.items():
    per_bare = timing.ratio(durations, times[BARE])
    cpu = timing.ratio(cases[case].seconds[1:], cases[BARE].seconds[1:])
    rows.append(
      {
        'case': case,
        'rounds': len(durations),
        'steps': burst,
        'ms': 1e3 * timing.Spread.of(durations).median / burst,
        'per_bare': per_bare.median,
        'per_bare_low': per_bare.low,
        'per_bare_high': per_bare.high,
        'cpu_per_bare': cpu.median,
        'cpu_per_bare_low': cpu.low,
        'cpu_per_bare_high': cpu.high,
        'checkpoint_bytes': saved if case == BOTH else 0,
      }
    )
  return rows


def _size(folder: pathlib.Path) -> int:
  """Size of the newest checkpoint in the folder, in bytes."""
  newest = max(folder.glob('[0-9]*'), key=lambda path: int(path.name))
  return sum(p.stat().st_size for p in newest.rglob('*') if p.is_file())


def report(
  title: str, rows: Sequence[Mapping[str, Any]], warning: str = ''
) -> str:
  """The table and the verdict, in Markdown."""
  f, last = timing.facts(), rows[-1]
  lines = [
    {
      'case': row['case'],
      'ms a step': f'{row["ms"]:.2f}',
      'over the bare loop': f'{row["per_bare"]:.3f} '
      f'({row["per_bare_low"]:.3f}-{row["per_bare_high"]:.3f})',
      'CPU time over it': f'{row["cpu_per_bare"]:.3f} '
      f'({row["cpu_per_bare_low"]:.3f}-{row["cpu_per_bare_high"]:.3f})',
      'bursts': str(row['rounds']),
    }
    for row in rows
  ]
  verdict = 'reached' if last['per_bare'] <= AIM else 'missed'
  return (
    f'# What metrics, traces and checkpoints add to a step of {title}\n\n'
    f'{warning}{". " * bool(warning)}'
    f'{f["device"]} ({f["cores"]} cores, one device used), {f["date"]}, jax '
    f'{f["jax"]}. Bursts of {last["steps"]} steps, interleaved: medians, and '
    'medians of ratios within a round (quartiles in brackets). The last case '
    f'saves {last["checkpoint_bytes"] / 2**20:.1f} MiB once a burst and waits '
    "for it. The process's CPU time, of all threads, is what other work on the "
    'machine changes least.\n\n'
    f'{markdown_table(lines)}\n'
    f'At most {AIM:.2f} is the aim: {verdict}.\n'
  )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = cli.Parser(
    prog=f'python -m experiments.{NAME}', description=__doc__.split('\n')[0]
  )
  add = parser.add_argument
  add(
    '--config', default='configs/shakespeare_switch.py', help='config to time'
  )
  add('--files', default='', help='pattern of text files to train on')
  add('--modules', default='', help='modules of the standard library instead')
  add(
    '--burst',
    type=cli.POSITIVE,
    default=100,
    help='steps of a burst',
  )
  add(
    '--seconds',
    type=cli.SECONDS,
    default=180.0,
    help='time for all cases',
  )
  add('--output', default='results', help='folder of the results')
  return parser.parse_args(argv)


@cli.reported()
def main(argv: Sequence[str] | None = None) -> None:
  """Measures all cases and writes the table."""
  options = parse(argv)
  keep_freed_memory()
  run_options = prepared(
    cli.load_config(options.config), options.files, options.modules
  )
  rows = measure(run_options, burst=options.burst, seconds=options.seconds)
  text = report(options.config, rows, run_options.model.moe.forced)
  metadata = {'config': section_of(run_options).to_dict()}
  folder = timing.write(options.output, NAME, text, rows, metadata)
  print(f'{text}\nwritten: {folder}')


if __name__ == '__main__':
  main()
