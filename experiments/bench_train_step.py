"""What does a training step of a sparse model cost, against its dense twin?

    python -m experiments.bench_train_step --preset=quick
    python -m experiments.bench_train_step --preset=quick --peer
    python -m experiments.bench_train_step --preset=quick --against=OLD

Times the config's own training step with its dispatch, dropless, as its dense
twin, and with each kind of rematerialisation, all interleaved; and compiles
models of few and of many layers, since compile time must not grow with depth.
`--peer` times transformers' step of a Switch encoder-decoder against ours, in
place of all that, and `--peer=nanogpt` PyTorch's of nanoGPT's model against
those of `shakespeare_dense` and `shakespeare_switch`; `--against` times the
sparse step and its twin's of another checkout of this project against those
here. Writes `table.md`, `rows.csv`, `results.json` and `steps.png` to
`results/bench_train_step/<device>`; with `--peer` or `--against` no plot, and
to `results/bench_train_step_transformers`, `_nanogpt` or `_against`.
"""

import dataclasses
import functools
import types
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from experiments.benchmarks import (
  checkouts,
  nanogpt_steps,
  peer_steps,
  timing,
)
from experiments.benchmarks.roofline import Peaks, measure_peaks
from experiments.benchmarks.train_step_programs import (
  compile_step,
  prepared,
  random_batch,
)
from experiments.benchmarks.turns import PAUSE, turns
from moe_jax import cli
from moe_jax.config import merge
from moe_jax.devices import keep_freed_memory
from moe_jax.models.stack import REMATS
from moe_jax.routing.rules_without_logits import FORCED

NAME = 'bench_train_step'
TWIN, SPARSE = 'dense twin', 'sparse'
PEERS = {'transformers': peer_steps, 'nanogpt': nanogpt_steps}
# Approximate seconds for all steps together.
PRESETS = {'quick': 40.0, 'full': 300.0}
# Numbers of layers of the models that are only compiled, few and many.
DEPTHS = (4, 24)


def variants() -> dict[str, dict[str, Any]]:
  """Overrides of the config's `model`, by case; the dense twin comes first."""
  dropless = {'dispatch': {'kind': 'dropless'}, 'capacity': {'kind': 'all'}}
  overrides = {
    TWIN: {'moe': {'num_experts': 0}},
    SPARSE: {},
    f'{SPARSE}, dropless': {'moe': dropless},
  }
  for remat in REMATS:
    if remat != 'none':
      overrides[f'{SPARSE}, remat {remat}'] = {'remat': remat}
  return overrides


def measure_steps(
  config: ml_collections.ConfigDict, seconds: float, peaks: Peaks
) -> list[dict[str, Any]]:
  """Times the steps of all variants, interleaved; one row for each."""
  steps = {
    name: compile_step(prepared(config, overrides))
    for name, overrides in variants().items()
  }
  times, peaks_by_round = timing.with_probes(
    {name: step.run for name, step in steps.items()}, peaks, seconds=seconds
  )
  return [
    {
      'case': name,
      'rounds': len(times[name]),
      'ms': timing.milliseconds(times[name]),
      'per_twin': timing.ratio(times[name], times[TWIN]),
      **timing.reached(times[name], step.work, peaks_by_round),
      **step.numbers,
    }
    for name, step in steps.items()
  ]


def measure_peer(
  peers: types.ModuleType, seconds: float, peaks: Peaks
) -> list[dict[str, Any]]:
  """Times our steps and a peer's, in turns; one row for each."""
  config = peers.config()
  steps = {
    name: compile_step(prepared(config, overrides))
    for name, overrides in peers.cases().items()
  }
  options = prepared(config, {})
  programs = functools.partial(peers.programs, options, random_batch(options))
  with turns(programs, *peers.LIBRARIES) as peer_runs:
    runs = {name: step.run for name, step in steps.items()} | dict(peer_runs)
    times, rounds = timing.with_probes(runs, peaks, seconds=seconds)
  times.pop(PAUSE)
  work = next(iter(steps.values())).work
  limits = [work.flops / p.flops_per_second for p in rounds]
  return [
    {
      'case': name,
      'rounds': len(durations),
      'ms': timing.milliseconds(durations).median,
      'faster': timing.ratio(times[peers.NAME], durations),
      'limit_ms': timing.milliseconds(limits).median,
      'limit_share': timing.ratio(limits, durations).median,
    }
    for name, durations in times.items()
  ]


def measure_compilation(
  config: ml_collections.ConfigDict, depths: Sequence[int]
) -> list[dict[str, Any]]:
  """Compiles the scanned model; one row for each variant and depth.

  Nothing is executed.
  """
  rows = []
  for name in (SPARSE, f'{SPARSE}, dropless'):
    first = None
    for depth in depths:
      # The pattern is stated, as 'last 2' would make one period of L layers.
      moe = {'layers': 'every 2', **variants()[name].get('moe', {})}
      overrides = {'num_layers': depth, 'scan_layers': True, 'moe': moe}
      numbers = compile_step(prepared(config, overrides)).numbers
      seconds = numbers['compile_seconds']
      first = first or seconds
      rows.append(
        {
          'case': name,
          'layers': depth,
          'compile_seconds': seconds,
          'ratio': seconds / first,
          'temp_bytes': numbers['temp_bytes'],
        }
      )
  return rows


def report(
  title: str,
  peaks: Peaks,
  rows: Sequence[Mapping[str, Any]],
  depths: Sequence[Mapping[str, Any]],
  warning: str = '',
) -> str:
  """Both tables and the meaning of their columns, in Markdown."""
  step_table = timing.table(
    rows,
    {
      'case': '{case}',
      'ms': '{ms:.1f}',
      '/ dense twin': '{per_twin:.2f}',
      **timing.WORK,
    },
  )
  depth_table = timing.table(
    depths,
    {
      'case': '{case}',
      'layers': '{layers}',
      'compile s': '{compile_seconds:.1f}',
      '/ fewest layers': '{ratio:.2f}',
      'temporary MiB': timing.WORK['temporary MiB'],
    },
  )
  return (
    f'# A training step of {title}\n\n'
    f'{warning}{". " * bool(warning)}{timing.conditions(peaks)} One device was '
    'used. Random tokens, full rows; the state is donated. '
    f'{timing.ABOUT_WORK}, without activations or recomputation.\n\n'
    f'{step_table}\n'
    '## Compile time with depth\n\n'
    'Scanned layers, every second one sparse; tracing, lowering and compiling '
    f'together, each once.\n\n{depth_table}'
  )


def peer_report(
  rows: Sequence[Mapping[str, Any]], peaks: Peaks, about: tuple[str, str]
) -> str:
  """Table of our training steps against another library's, in Markdown.

  Args:
    rows: A row for each of our cases and the peer.
    peaks: Peaks of the machine before the timing.
    about: Heading, and what the steps are.
  """
  heading, sizes = about
  columns = {
    'case': '{case}',
    'ms': '{ms:.0f}',
    'times as fast': '{faster:.2f}',
    'limit, ms': '{limit_ms:.0f}',
    'limit / time': '{limit_share:.2f}',
    'rounds': '{rounds}',
  }
  return (
    f'{heading}\n\n{timing.conditions(peaks)} {sizes} Limit: our counted '
    'products at the peak of the same rounds.\n\n'
    f'{timing.table(rows, columns)}'
  )


@cli.reported()
def main(argv: Sequence[str] | None = None) -> None:
  """Measures the steps; writes the tables and the plot."""
  parser = timing.parser(NAME, __doc__)
  add = parser.add_argument
  text = 'length of timing'
  add('--preset', choices=list(PRESETS), default='quick', help=text)
  text = 'config of a sparse model'
  add('--config', default='configs/tiny_switch.py', help=text)
  one = parser.add_mutually_exclusive_group()
  one.add_argument(
    '--peer',
    nargs='?',
    const='transformers',
    choices=list(PEERS),
    help="time another library's step against ours, and nothing else; without "
    "a name, transformers'",
  )
  one.add_argument(
    '--against',
    metavar='FOLDER',
    help='another checkout, whose sparse and dense steps are timed against '
    'those of this one, and nothing else',
  )
  text = 'choice of experts whatever the logits are: model.moe.force_balance'
  add('--force_balance', choices=FORCED, help=text)
  text = "time for all steps; default: the preset's"
  add('--seconds', type=cli.SECONDS, help=text)
  text = 'numbers of layers of the models that are only compiled'
  add('--depths', type=cli.POSITIVE, nargs='+', default=DEPTHS, help=text)
  options = parser.parse_args(argv)
  seconds = options.seconds
  if seconds is None:
    seconds = PRESETS[options.preset]
  keep_freed_memory()
  if options.peer:
    peaks = measure_peaks('float32', quick=options.rough_peaks)
    peers = PEERS[options.peer]
    rows = measure_peer(peers, seconds, peaks)
    text = peer_report(rows, peaks, peers.ABOUT)
    metadata = {'peaks': dataclasses.asdict(peaks)}
    name = f'{NAME}_{options.peer}'
    timing.write(options.output, name, text, rows, metadata)
    return
  if options.against:
    cases = {TWIN: variants()[TWIN], SPARSE: {}}
    rows = checkouts.compare(options.against, options.config, cases, seconds)
    text = checkouts.report(options.config, rows)
    timing.write(options.output, f'{NAME}_against', text, rows, {})
    return
  config = cli.load_config(options.config)
  if options.force_balance:
    forced = {'moe': {'force_balance': options.force_balance}}
    config = merge(config, {'model': forced})
  if not config.model.moe.num_experts:
    raise SystemExit(f'{options.config} is dense: there is no twin to compare')
  peaks = measure_peaks(config.model.numerics.dtype, quick=options.rough_peaks)
  print(f'{timing.device_name()}; {peaks.describe()}', flush=True)
  rows = measure_steps(config, seconds, peaks)
  depths = measure_compilation(config, options.depths)
  forced = prepared(config, {}).build().stacks.forced_balance
  text = report(options.config, peaks, rows, depths, forced)
  metadata = {
    'config': config.to_dict(),
    'peaks': dataclasses.asdict(peaks),
    'compilation': depths,
  }
  folder = timing.write(options.output, NAME, text, rows, metadata)
  ratios = {row['case']: row['per_twin'] for row in rows}
  timing.draw_bars(folder / 'steps.png', ratios, "step time / dense twin's")


if __name__ == '__main__':
  main()
