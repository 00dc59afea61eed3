"""What do metrics, traces and checkpoints add to a training step?

    python -m experiments.bench_overhead
    python -m experiments.bench_overhead --config.data.source.kind=files \
      --config.data.source.files.pattern=shakespeare.txt

Times bursts of the config's training loop, interleaved: the bare loop (batches
and steps), the loop with metrics, with metrics and a trace of every step's
choices of experts, and with metrics and a checkpoint, whose writing is waited
for within the burst. Bursts have 100 steps, so that is a checkpoint every 100
steps. A step that is recorded is another program, in a run of its own. Writes
`table.md` and `results.json` to `results/bench_overhead/<device>`.
"""

import contextlib
import dataclasses
import functools
import io
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from experiments.benchmarks import timing
from experiments.benchmarks.timing import Row
from moe_jax import cli, run_config
from moe_jax.analysis.recording import Traces
from moe_jax.analysis.replay import Replaying
from moe_jax.config import layered, section_of
from moe_jax.devices import keep_freed_memory
from moe_jax.run_config import RunConfig
from moe_jax.training.run_options import TraceOptions
from moe_jax.training.setup import Hook, Run, begin, set_up

NAME = 'bench_overhead'
BARE, METRICS, BOTH = 'bare loop', 'metrics', 'metrics and checkpoint'
TRACES = 'metrics and traces'
# Largest ratio aimed at: a step with metrics and checkpoint over a bare one.
AIM = 1.05


def prepared(config: str, overrides: Sequence[str]) -> RunConfig:
  """The run's options on one device, on the standard library's text as bytes.

  The run is a million steps long, so that no burst reaches its end.

  Args:
    config: Config of the run.
    overrides: Flags that change keys, another text too: '--config.seed=1'.
  """
  text = {'source': {'kind': 'python_stdlib'}, 'tokenizer': {'kind': 'bytes'}}
  mesh = dict(data=1, fsdp=1, expert=1, tensor=1)
  changes = {'total_steps': 10**6, 'data': text, 'mesh': mesh}
  base = layered(RunConfig, cli.load_config(config), changes)
  return run_config.options_of(base, overrides)[0]


@contextlib.contextmanager
def training_loop(
  run: Run, burst: int, hooks: Sequence[Hook] = ()
) -> Iterator[Callable[..., None]]:
  """A function that executes the next steps of a run's training loop.

  Args:
    run: The run.
    burst: Number of steps of a call.
    hooks: Hooks of the run, whose records are written before a call ends.
  """
  with contextlib.ExitStack() as stack:
    stack.enter_context(run.checkpoints)
    run, state, _ = begin(run)
    batches, step = run.batches(0), 0
    stack.enter_context(run.recorder.recording(0))
    for hook in hooks:
      stack.callback(hook.close)
      hook.check(run)
      run = hook.start(run) or run

    def next_burst(records: bool = True, saves: bool = False) -> None:
      """Takes the steps of a burst, and waits for all that belongs to it.

      Args:
        records: Whether every step's metrics are read and their rows written.
        saves: Whether a checkpoint is begun at the burst's first step.
      """
      nonlocal state, step
      for i in range(burst):
        batch, step = next(batches), step + 1
        state, metrics = run.train_step(state, batch)
        if records:
          run.recorder.add(step, metrics, batch)
        if saves and not i:
          with run.recorder.paused('checkpoint'):
            run.checkpoints.save(step, state)
            run.message(f'step {step}: saving a checkpoint')
      if records:
        with run.recorder.paused('checkpoint'):
          run.checkpoints.wait()
      jax.block_until_ready(state)
      for hook in hooks:
        hook.paused()

    yield next_burst


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
    with (
      training_loop(run, burst) as loop,
      training_loop(recorded, burst, hooks) as traced_loop,
    ):
      cases = {
        BARE: functools.partial(loop, records=False),
        METRICS: loop,
        TRACES: traced_loop,
        BOTH: functools.partial(loop, saves=True),
      }
      cpu = {name: list[float]() for name in cases}

      def counted(name):
        begun = time.process_time()  # of all threads
        cases[name]()
        cpu[name].append(time.process_time() - begun)

      counting = {x: functools.partial(counted, x) for x in cases}
      times = timing.interleave(counting, **options)
    checkpoints = pathlib.Path(folder) / 'checkpoints'
    newest = max(checkpoints.glob('[0-9]*'), key=lambda path: int(path.name))
    saved = sum(p.stat().st_size for p in newest.rglob('*') if p.is_file())
  # The first round warms up.
  cpu = {name: seconds[1:] for name, seconds in cpu.items()}
  return [
    {
      'case': case,
      'rounds': len(durations),
      'steps': burst,
      'ms': timing.milliseconds(durations).median / burst,
      'per_bare': timing.ratio(durations, times[BARE]),
      'cpu_per_bare': timing.ratio(cpu[case], cpu[BARE]),
      'checkpoint_bytes': saved if case == BOTH else 0,
    }
    for case, durations in times.items()
  ]


def report(title: str, rows: Sequence[Row], warning: str = '') -> str:
  """The table and the verdict, in Markdown."""
  last = rows[-1]
  columns = {
    'case': '{case}',
    'ms a step': '{ms:.2f}',
    'over the bare loop': '{per_bare:.3f}',
    'CPU time over it': '{cpu_per_bare:.3f}',
    'bursts': '{rounds}',
  }
  verdict = 'reached' if last['per_bare'].median <= AIM else 'missed'
  return (
    f'# What metrics, traces and checkpoints add to a step of {title}\n\n'
    f'{warning}{". " * bool(warning)}{timing.conditions()} One device was '
    f'used. A case is a burst of {last["steps"]} steps. The last case saves '
    f'{last["checkpoint_bytes"] / 2**20:.1f} MiB once a burst and waits for '
    "it. The process's CPU time, of all threads, is what other work on the "
    f'machine changes least.\n\n{timing.table(rows, columns)}\n'
    f'At most {AIM:.2f} is the aim: {verdict}.\n'
  )


@cli.reported()
def main(argv: Sequence[str] | None = None) -> None:
  """Measures all cases and writes the table."""
  parser = timing.parser(NAME, __doc__, peaks=False)
  add = parser.add_argument
  text = 'config to time'
  add('--config', default='configs/shakespeare_switch.py', help=text)
  add('--burst', type=cli.POSITIVE, default=100, help='steps of a burst')
  text = 'time for all cases'
  add('--seconds', type=cli.SECONDS, default=180.0, help=text)
  options, overrides = cli.parse_command(parser, argv)
  keep_freed_memory()
  run_options = prepared(options.config, overrides)
  rows = measure(run_options, burst=options.burst, seconds=options.seconds)
  text = report(options.config, rows, run_options.model.moe.forced)
  metadata = {'config': section_of(run_options).to_dict()}
  timing.write(options.output, NAME, text, rows, metadata)


if __name__ == '__main__':
  main()
