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

import argparse
import dataclasses
import functools
import types
from collections.abc import Sequence
from typing import Any

import ml_collections

from experiments.benchmarks import (
  checkouts,
  nanogpt_steps,
  peer_steps,
  timing,
)
from experiments.benchmarks import train_step_tables as tables
from experiments.benchmarks.roofline import Peaks, measure_peaks
from experiments.benchmarks.train_step_programs import (
  compile_step,
  prepared,
  random_batch,
)
from experiments.benchmarks.turns import PAUSE, check_installed, turns
from moe_jax import cli
from moe_jax.config import merge
from moe_jax.devices import keep_freed_memory
from moe_jax.models.stack import REMATS
from moe_jax.routing.rules_without_logits import FORCED

NAME = 'bench_train_step'
TWIN, SPARSE = 'dense twin', 'sparse'
PEERS = {'transformers': peer_steps, 'nanogpt': nanogpt_steps}


@dataclasses.dataclass(frozen=True)
class Preset:
  """The length of the timing, and the depths that are compiled.

  Attributes:
    seconds: Approximate time for all steps together.
    depths: Numbers of layers of the models that are only compiled, few and
      many.
  """

  seconds: float
  depths: tuple[int, ...] = (4, 24)


PRESETS = {'quick': Preset(40.0), 'full': Preset(300.0)}


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
  rows = []
  for name, step in steps.items():
    step_time = timing.Spread.of(times[name])
    per_twin = timing.ratio(times[name], times[TWIN])
    rows.append(
      {
        'case': name,
        'rounds': len(times[name]),
        'ms': 1e3 * step_time.median,
        'ms_low': 1e3 * step_time.low,
        'ms_high': 1e3 * step_time.high,
        'per_twin': per_twin.median,
        'per_twin_low': per_twin.low,
        'per_twin_high': per_twin.high,
        **timing.reached(times[name], step.work, peaks_by_round),
        'xla_flops': step.counts.flops,
        'xla_bytes': step.counts.bytes_accessed,
        'temp_bytes': step.counts.temp_bytes,
        'argument_bytes': step.counts.argument_bytes,
        'compile_seconds': step.compile_seconds,
      }
    )
  return rows


def measure_peer(
  peers: types.ModuleType, seconds: float, peaks: Peaks
) -> list[dict[str, Any]]:
  """Times our steps and a peer's, in turns; one row for each."""
  config, peer = peers.config(), peers.NAME
  steps = {
    name: compile_step(prepared(config, overrides))
    for name, overrides in peers.cases().items()
  }
  options = prepared(config, {})
  programs = functools.partial(peers.programs, options, random_batch(options))
  check_installed(*peers.LIBRARIES)
  with turns(programs) as peer_runs:
    runs = {name: step.run for name, step in steps.items()} | dict(peer_runs)
    times, rounds = timing.with_probes(runs, peaks, seconds=seconds)
  times.pop(PAUSE)
  work = next(iter(steps.values())).work
  limits = [work.flops / p.flops_per_second for p in rounds]
  rows = []
  for name, durations in times.items():
    faster = timing.ratio(times[peer], durations)
    rows.append(
      {
        'case': name,
        'rounds': len(durations),
        'ms': 1e3 * timing.Spread.of(durations).median,
        'faster': faster.median,
        'faster_low': faster.low,
        'faster_high': faster.high,
        'limit_ms': 1e3 * timing.Spread.of(limits).median,
        'limit_share': timing.ratio(limits, durations).median,
      }
    )
  return rows


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
      overrides = {'num_layers': depth, 'scan_layers': True}
      moe = {'layers': 'every 2', **variants()[name].get('moe', {})}
      step = compile_step(prepared(config, {**overrides, 'moe': moe}))
      first = first or step.compile_seconds
      rows.append(
        {
          'case': name,
          'layers': depth,
          'compile_seconds': step.compile_seconds,
          'ratio': step.compile_seconds / first,
          'temp_bytes': step.counts.temp_bytes,
        }
      )
  return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = cli.Parser(
    prog=f'python -m experiments.{NAME}', description=__doc__.split('\n')[0]
  )
  add = parser.add_argument
  add(
    '--preset', choices=list(PRESETS), default='quick', help='length of timing'
  )
  add(
    '--config',
    default='configs/tiny_switch.py',
    help='config of a sparse model',
  )
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
  add(
    '--force_balance',
    choices=FORCED,
    help='choice of experts whatever the logits are: model.moe.force_balance',
  )
  timing.add_arguments(parser)
  add(
    '--seconds',
    type=cli.SECONDS,
    help="time for all steps; default: the preset's",
  )
  add(
    '--depths',
    type=cli.POSITIVE,
    nargs='+',
    help='numbers of layers of the models that are only compiled',
  )
  return parser.parse_args(argv)


@cli.reported()
def main(argv: Sequence[str] | None = None) -> None:
  """Measures the steps; writes the tables and the plot."""
  options = parse(argv)
  preset = PRESETS[options.preset]
  seconds = preset.seconds if options.seconds is None else options.seconds
  keep_freed_memory()
  if options.peer:
    peaks = measure_peaks('float32', quick=options.rough_peaks)
    peers = PEERS[options.peer]
    rows = measure_peer(peers, seconds, peaks)
    text = tables.peer_report(rows, peaks, peers.ABOUT)
    metadata = {'peaks': dataclasses.asdict(peaks)}
    name = f'{NAME}_{options.peer}'
    folder = timing.write(options.output, name, text, rows, metadata)
    print(f'{text}\nwritten: {folder}')
    return
  if options.against:
    cases = {TWIN: variants()[TWIN], SPARSE: {}}
    rows = checkouts.compare(options.against, options.config, cases, seconds)
    text = checkouts.report(options.config, rows)
    folder = timing.write(options.output, f'{NAME}_against', text, rows, {})
    print(f'{text}\nwritten: {folder}')
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
  depths = measure_compilation(config, options.depths or preset.depths)
  forced = prepared(config, {}).build().stacks.forced_balance
  text = tables.report(options.config, peaks, rows, depths, forced)
  metadata = {
    'config': config.to_dict(),
    'peaks': dataclasses.asdict(peaks),
    'compilation': depths,
  }
  folder = timing.write(options.output, NAME, text, rows, metadata)
  tables.write_plot(rows, folder / 'steps.png')
  print(f'\n{text}\nwritten: {folder}')


if __name__ == '__main__':
  main()
