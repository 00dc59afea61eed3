"""What does a training step of a sparse model cost, against its dense twin?

    python -m experiments.bench_train_step --config.model.num_layers=8
    python -m experiments.bench_train_step --peer
    python -m experiments.bench_train_step --against=OLD

Times the config's own training step with its dispatch, dropless, as its dense
twin, and with each kind of rematerialisation, all interleaved; and compiles
models of few and of many layers, since compile time must not grow with depth.
`--peer` times transformers' step of a Switch encoder-decoder against ours, in
place of all that; `--against` times the sparse step and its twin's of another
checkout of this project against those here. Writes `table.md` and
`results.json` to `results/bench_train_step/<device>`; with `--peer` or
`--against` to `results/bench_train_step_transformers` or `_against`.
"""

import collections
import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from experiments.benchmarks import checkout_steps, peer_steps, timing
from experiments.benchmarks.roofline import Peaks
from experiments.benchmarks.train_step_programs import compile_step, prepared
from experiments.benchmarks.turns import HERE, PAUSE, turns
from moe_jax import cli
from moe_jax.models.stack import REMATS

NAME = 'bench_train_step'
TWIN, SPARSE = 'dense twin', 'sparse'
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
  remats = [remat for remat in REMATS if remat != 'none']
  return overrides | {f'{SPARSE}, remat {x}': {'remat': x} for x in remats}


def measure_steps(
  config: ConfigDict, seconds: float, peaks: Peaks
) -> list[dict[str, Any]]:
  """Times the steps of all variants, interleaved; one row for each."""
  steps = {
    name: compile_step(prepared(config, overrides))
    for name, overrides in variants().items()
  }
  times, rows = timing.measure(steps, peaks, seconds=seconds)
  return [
    {**row, 'per_twin': timing.ratio(times[name], times[TWIN])}
    for name, row in rows.items()
  ]


def measure_compilation(
  config: ConfigDict, depths: Sequence[int]
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
      first = first or numbers['compile_seconds']
      ratio = numbers['compile_seconds'] / first
      rows.append({'case': name, 'layers': depth, 'ratio': ratio, **numbers})
  return rows


def report(
  title: str,
  peaks: Peaks,
  rows: Sequence[Mapping[str, Any]],
  depths: Sequence[Mapping[str, Any]],
  warning: str = '',
) -> str:
  """Both tables and the meaning of their columns, in Markdown."""
  columns = {
    'case': '{case}',
    'ms': '{ms:.1f}',
    '/ dense twin': '{per_twin:.2f}',
    **timing.WORK,
  }
  depth_columns = {
    'case': '{case}',
    'layers': '{layers}',
    'compile s': '{compile_seconds:.1f}',
    '/ fewest layers': '{ratio:.2f}',
    'temporary MiB': timing.WORK['temporary MiB'],
  }
  return (
    f'# A training step of {title}\n\n'
    f'{warning}{". " * bool(warning)}{timing.conditions(peaks)} One device was '
    'used. Random tokens, full rows; the state is donated. '
    f'{timing.ABOUT_WORK}, without activations or recomputation.\n\n'
    f'{timing.table(rows, columns)}\n'
    '## Compile time with depth\n\n'
    'Scanned layers, every second one sparse; tracing, lowering and compiling '
    f'together, each once.\n\n{timing.table(depths, depth_columns)}'
  )


def measure_peer(seconds: float, peaks: Peaks) -> list[dict[str, Any]]:
  """Times our steps and transformers', in turns; one row for each."""
  config = peer_steps.config()
  steps = {
    name: compile_step(prepared(config, overrides))
    for name, overrides in peer_steps.cases().items()
  }
  # The limit is that of the products alone.
  work = dataclasses.replace(next(iter(steps.values())).work, min_bytes=0)
  with turns(peer_steps.__file__, {}, ('torch', 'transformers')) as peer:
    runs = {name: step.run for name, step in steps.items()} | dict(peer)
    programs = {name: timing.Program(run, work) for name, run in runs.items()}
    times, rows = timing.measure(programs, peaks, PAUSE, seconds=seconds)
  return [
    {**row, 'faster': timing.ratio(times[peer_steps.NAME], times[name])}
    for name, row in rows.items()
  ]


def peer_report(rows: Sequence[Mapping[str, Any]], peaks: Peaks) -> str:
  """Table of our training steps against transformers', in Markdown."""
  columns = {
    'case': '{case}',
    'ms': '{ms.median:.0f}',
    'times as fast': '{faster:.2f}',
    'limit, ms': '{roofline_ms:.0f}',
    'limit / time': '{fraction:.2f}',
    'rounds': '{rounds}',
  }
  return (
    f'{peer_steps.HEADING}\n\n{timing.conditions(peaks)} {peer_steps.ABOUT} '
    'Limit: our counted products at the peak of the same rounds.\n\n'
    f'{timing.table(rows, columns)}'
  )


def measure_against(
  old: pathlib.Path, config: str, seconds: float
) -> list[dict[str, Any]]:
  """Times the sparse step and its twin's of another checkout and of this one.

  The steps are interleaved, each checkout's in a process of its own. There is a
  row for each case, and a last one with the difference between the two.

  Args:
    old: Folder of the other checkout.
    config: File of the config, which both checkouts have.
    seconds: Time for all steps together.
  """
  cases = {TWIN: variants()[TWIN], SPARSE: {}}
  arguments, file = {'config': config, 'cases': cases}, checkout_steps.__file__
  losses = collections.defaultdict(list)

  with (
    turns(file, arguments, checkout=old.resolve()) as before,
    turns(file, arguments, checkout=HERE) as after,
  ):
    sides = {'old': before, 'new': after}

    def take(side, case):
      losses[side, case].append(sides[side][case]())

    steps = {
      (side, case): functools.partial(take, side, case)
      for case in cases
      for side in sides
    }
    times = timing.interleave(steps, seconds=seconds, most=2000)
  ms = {key: 1e3 * np.array(values) for key, values in times.items()}
  pairs = {case: [ms[side, case] for side in sides] for case in cases}
  pairs[f'{SPARSE} minus {TWIN}'] = np.subtract(pairs[SPARSE], pairs[TWIN])
  rows = []
  for case, (old_ms, new_ms) in pairs.items():
    row: dict[str, Any] = {'case': case, 'rounds': len(old_ms)}
    if case in cases:
      row['same_losses'] = losses['old', case] == losses['new', case]
    spreads = {'old': old_ms, 'new': new_ms}
    spreads |= {'change': new_ms - old_ms, 'ratio': new_ms / old_ms}
    rows.append(row | {k: timing.Spread.of(x) for k, x in spreads.items()})
  return rows


def against_report(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
  """The table of both checkouts' steps, in Markdown."""
  columns = {
    'case': '{case}',
    'old ms': '{old:.2f}',
    'new ms': '{new:.2f}',
    'new minus old, ms': '{change:.2f}',
    'new / old': '{ratio:.3f}',
    'losses': lambda row: 'the same bits' if row['same_losses'] else 'differ',
    'rounds': '{rounds}',
  }
  return (
    f'# A training step of {title} in two checkouts\n\n'
    f'{timing.conditions()} Two processes take turns; differences are taken '
    'within a round, too. Random tokens, full rows.\n\n'
    f'{timing.table(rows, columns)}'
  )


@cli.reported()
def main(argv: Sequence[str] | None = None) -> None:
  """Measures the steps and writes the tables."""
  parser = timing.parser(NAME, __doc__)
  add = parser.add_argument
  text = 'config of a sparse model'
  add('--config', default='configs/tiny_switch.py', help=text)
  one = parser.add_mutually_exclusive_group()
  text = "time transformers' step against ours, and nothing else"
  one.add_argument('--peer', action='store_true', help=text)
  one.add_argument(
    '--against',
    metavar='FOLDER',
    type=pathlib.Path,
    help='another checkout, whose sparse and dense steps are timed against '
    'those of this one, and nothing else',
  )
  text = 'time for all steps'
  add('--seconds', type=cli.SECONDS, default=40.0, help=text)
  text = 'numbers of layers of the models that are only compiled'
  add('--depths', type=cli.POSITIVE, nargs='+', default=DEPTHS, help=text)
  options, overrides = cli.parse_command(
    parser, argv, lambda options: not (options.peer or options.against)
  )
  write = functools.partial(timing.write, options.output)
  if options.peer:
    peaks = timing.measured_peaks(options)
    rows = measure_peer(options.seconds, peaks)
    metadata = {'peaks': dataclasses.asdict(peaks)}
    write(f'{NAME}_transformers', peer_report(rows, peaks), rows, metadata)
    return
  if options.against:
    rows = measure_against(options.against, options.config, options.seconds)
    text = against_report(options.config, rows)
    write(f'{NAME}_against', text, rows, {})
    return
  config = cli.config_of(options.config, overrides)
  if not config.model.moe.num_experts:
    raise SystemExit(f'{options.config} is dense: there is no twin to compare')
  peaks = timing.measured_peaks(options, config.model.numerics.dtype)
  rows = measure_steps(config, options.seconds, peaks)
  depths = measure_compilation(config, options.depths)
  forced = prepared(config, {}).build().stacks.forced_balance
  text = report(options.config, peaks, rows, depths, forced)
  metadata = {
    'config': config.to_dict(),
    'peaks': dataclasses.asdict(peaks),
    'compilation': depths,
  }
  write(NAME, text, rows, metadata)


if __name__ == '__main__':
  main()
