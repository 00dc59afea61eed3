"""What does a sparse layer cost, against dense layers and bare products?

    python -m experiments.bench_moe_layer --preset=quick

Times `moe_jax.MoE` with capacity factor 1 (`gather`, and `sorted` without empty
slots) and `dropless`, with its router, over numbers of experts and choices,
uniform and Zipf-skewed routing, forward and with the gradient of parameters and
input. Every time is a ratio, taken within a round, to: the dense feed-forward
times K, which has equal FLOPs; the fastest bare grouped products of the same
shapes (the limit); `lax.ragged_dot`; and the roofline of this machine's
measured peaks. Writes `table.md`, `rows.csv`, `results.json` and `ratios.png`
to `results/bench_moe_layer/<device>`. `quick` takes under five minutes on two
cores, with E=256 in the second table alone; `cells` times both passes of E=8
and 64, K=1 and 2, under uniform routing; `gpu` and `gpu_fine` are for one
accelerator of 80 GB.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.benchmarks import moe_layer, timing
from experiments.benchmarks.moe_layer import (
  BATCHED,
  DENSE,
  DROPPING,
  EQUAL,
  GROUPED,
  LAYERS,
  PASSES,
  PLAIN_DENSE,
  RAGGED,
  ROUTINGS,
  Sizes,
)
from experiments.benchmarks.roofline import Peaks, measure_peaks
from experiments.benchmarks.timing import Row
from moe_jax import cli
from moe_jax.devices import keep_freed_memory
from moe_jax.layers import ACTIVATIONS

NAME = 'bench_moe_layer'


@dataclasses.dataclass(frozen=True)
class Preset:
  """The settings that are timed, and for how long.

  Attributes:
    sizes: Sizes and dtype of the layer (N, M, F).
    experts: Numbers of experts E.
    selected: Numbers of selected experts K, timed with the gradient.
    routings: Names of routings, from `ROUTINGS`.
    forward_selected: Values of K whose forward pass is timed alone too.
    scaling: Values of E in the second table; empty for no such table.
    rows_per_expert: Tokens for each expert in the second table.
    seconds: Approximate time for each setting.
    most_ragged: The largest E for which `lax.ragged_dot` is timed: on a CPU
      it costs E times the dense layer.
  """

  sizes: Sizes
  experts: tuple[int, ...]
  selected: tuple[int, ...] = (1, 2)
  routings: tuple[str, ...] = ROUTINGS
  forward_selected: tuple[int, ...] = (1, 2)
  scaling: tuple[int, ...] = ()
  rows_per_expert: int = 128
  seconds: float = 5.0
  most_ragged: int = 8


_CPU = Sizes(num_tokens=4096, width=256, hidden=1024)
PRESETS = {
  'quick': Preset(
    _CPU,
    experts=(8, 64),
    forward_selected=(1,),
    scaling=(8, 64, 256),
    seconds=5.0,
  ),
  'full': Preset(
    _CPU,
    experts=(8, 64, 256),
    scaling=(8, 64, 256),
    seconds=30.0,
    most_ragged=64,
  ),
  'cells': Preset(
    _CPU, experts=(8, 64), routings=('uniform',), seconds=15.0, most_ragged=0
  ),
  'gpu': Preset(
    Sizes(16_384, 4096, 14_336, 'swiglu', 'bfloat16'),
    experts=(8,),
    selected=(2,),
    forward_selected=(2,),
  ),
  'gpu_fine': Preset(
    Sizes(32_768, 2048, 768, 'swiglu', 'bfloat16'),
    experts=(128,),
    selected=(8,),
    forward_selected=(8,),
  ),
}


def measure_all(preset: Preset, peaks: Peaks) -> list[dict[str, Any]]:
  """The rows of every setting of the first table."""
  rows = []
  for E in preset.experts:
    layer = moe_layer.Layer.draw(preset.sizes, E)
    for K, backward in [
      *((K, True) for K in preset.selected),
      *((K, False) for K in preset.forward_selected),
    ]:
      compiled = moe_layer.compile_cases(
        layer, K, backward, ragged=preset.most_ragged >= E
      )
      for routing in preset.routings:
        setting = dict(E=E, K=K, routing=routing)
        setting['pass'] = PASSES[backward]
        inputs = moe_layer.Inputs.draw(layer, routing, K)
        programs = moe_layer.bind(layer, compiled, inputs)
        rows += measure_setting(preset, setting, programs, inputs.load, peaks)
        shown = [row for row in rows[-len(programs) :] if row['case'] in LAYERS]
        print(timing.table(shown, PROGRESS), flush=True)
  return rows


def measure_setting(
  preset: Preset,
  setting: Mapping[str, Any],
  programs: Mapping[str, timing.Program],
  load: np.ndarray,
  peaks: Peaks,
) -> list[dict[str, Any]]:
  """Times all cases of one E, K, routing and pass; one row for each.

  Args:
    preset: Sizes of the layer, and the approximate time for all cases, which
      are interleaved.
    setting: E, K, routing and pass, by name; every row begins with them.
    programs: Programs on the arrays of this routing, by name.
    load: Number of choices that each expert has, [E].
    peaks: Measured peaks of the machine.
  """
  times, peaks_by_round = timing.with_probes(
    {name: program.run for name, program in programs.items()},
    peaks,
    seconds=preset.seconds,
  )
  rows, backward = [], setting['pass'] == PASSES[True]
  for name, program in programs.items():
    durations, served = times[name], served_share(name, load)
    is_dense = name in (DENSE, PLAIN_DENSE)
    E, K = (1, 1) if is_dense else (setting['E'], setting['K'])
    row = setting | _numbers(name, durations, program)
    for base in (DENSE, PLAIN_DENSE):
      row[f'per_{base}'] = timing.ratio(durations, times[base]) / K
    if name in LAYERS:
      row['limit'] = limit = fastest_limit(times, name, setting['routing'])
      row['per_limit'] = timing.ratio(durations, times[limit])
      if RAGGED in times:
        row['per_ragged_dot'] = timing.ratio(durations, times[RAGGED])
    work = preset.sizes.work(
      E, K * served, backward=backward, router=name in LAYERS
    )
    row |= timing.reached(durations, work, peaks_by_round)
    rows.append({**row, 'served': served})
  return rows


def _numbers(
  name: str, times: Sequence[float], program: timing.Program
) -> dict[str, Any]:
  ms = timing.milliseconds(times)
  return {'case': name, 'rounds': len(times), 'ms': ms, **program.numbers}


def served_share(name: str, load: np.ndarray) -> float:
  """Share of all choices that are served.

  Layers of `DROPPING` have capacity factor 1 and drop what exceeds it; the
  others serve every choice.
  """
  if name not in DROPPING:
    return 1.0
  capacity = -(-load.sum() // len(load))
  return float(np.minimum(load, capacity).sum() / load.sum())


def fastest_limit(
  times: Mapping[str, Sequence[float]], layer: str, routing: str
) -> str:
  """Name of the fastest bare products of a layer's shapes, its limit.

  `gather` is compared to products of equal groups, which its slots are, and so
  is `sorted`, which has at most as many rows. `dropless` is compared to
  products of the drawn groups; under uniform routing, where these are equal but
  for chance, products of equal groups count for it too.
  """
  drawn_groups = [*GROUPED, RAGGED]
  equal = [*BATCHED, *(name + EQUAL for name in GROUPED)]
  names = equal if layer in DROPPING else drawn_groups
  if layer == 'dropless' and routing == 'uniform':
    names = drawn_groups + equal
  medians = {
    name: timing.Spread.of(times[name]).median
    for name in names
    if name in times
  }
  return min(medians, key=medians.__getitem__)


def measure_scaling(preset: Preset, peaks: Peaks) -> list[dict[str, Any]]:
  """Times the layers with tokens in proportion to E; a row for each and E.

  K is 1 and the routing uniform, and the gradient is computed.
  """
  programs, works = {}, {}
  for E in preset.scaling:
    tokens = E * preset.rows_per_expert
    sizes = dataclasses.replace(preset.sizes, num_tokens=tokens)
    layer = moe_layer.Layer.draw(sizes, E)
    inputs = moe_layer.Inputs.draw(layer, 'uniform', 1)
    for name in LAYERS:
      module = moe_layer.moe_layer(sizes, E, 1, name)
      function = moe_layer.layer_function(module, backward=True)
      arrays = moe_layer.arguments(name, layer, inputs)
      programs[E, name] = timing.compile_ahead(function, *arrays)(*arrays)
      works[E, name] = sizes.work(E, 1, backward=True, router=True)
  times, peaks_by_round = timing.with_probes(
    {key: program.run for key, program in programs.items()},
    peaks,
    seconds=3 * preset.seconds,
    least=3,
  )
  over_roofline = {
    key: [
      t / work.seconds(p)
      for t, p in zip(times[key], peaks_by_round, strict=True)
    ]
    for key, work in works.items()
  }
  first = preset.scaling[0]
  return [
    {
      'E': E,
      'tokens': E * preset.rows_per_expert,
      **_numbers(name, times[E, name], program),
      **timing.reached(times[E, name], works[E, name], peaks_by_round),
      'over_roofline': timing.Spread.of(over_roofline[E, name]),
      'growth': timing.ratio(
        over_roofline[E, name], over_roofline[first, name]
      ),
      'gradient_bytes': preset.sizes.kernel_bytes(E),
    }
    for (E, name), program in programs.items()
  ]


# Columns by title; see `timing.table`.
SETTING = {name: f'{{{name}}}' for name in ('E', 'K', 'routing', 'pass')}
PROGRESS = {
  **SETTING,
  'layer': '{case}',
  '/ (dense * K)': f'{{per_{DENSE}:.2f}}',
  '/ limit': '{per_limit:.2f}',
  'rounds': '{rounds}',
}
OF_LAYERS = {
  **SETTING,
  'layer': '{case}',
  'served': '{served:.0%}',
  'ms': '{ms.median:.1f}',
  '/ (dense * K)': f'{{per_{DENSE}:.2f}}',
  '/ (plain dense * K)': f'{{per_{PLAIN_DENSE}.median:.2f}}',
  '/ limit': '{per_limit:.2f}',
  'the limit': '{limit}',
  '/ ragged_dot': '{per_ragged_dot.median:.2f}',
  **timing.WORK,
}
OF_BASELINES = {
  **SETTING,
  'case': '{case}',
  'ms': '{ms:.1f}',
  '/ (dense * K)': f'{{per_{DENSE}.median:.2f}}',
  **timing.WORK,
}
OF_PASSES = {
  'E': '{E}',
  'K': '{K}',
  'routing': '{routing}',
  'layer': '{case}',
  'forward+backward': f'{{per_{PLAIN_DENSE}:.2f}}',
  '/ limit': '{per_limit:.2f}',
  'forward': '{forward:.2f}',
  'backward alone': '{backward:.2f}',
}


def both_passes(rows: Sequence[Row]) -> list[dict[str, Any]]:
  """The rows of layers of which both passes were timed, and their ratios.

  Both `forward` and `backward` are medians over that of plain dense times K.
  """
  keys = ('E', 'K', 'routing', 'case', 'pass')
  ms = {tuple(row[key] for key in keys): row['ms'].median for row in rows}
  both = []
  for row in rows:
    setting = row['E'], row['K'], row['routing']
    first, whole = (ms.get((*setting, row['case'], p)) for p in PASSES.values())
    if row['case'] not in LAYERS or row['pass'] != PASSES[True] or not first:
      continue
    dense, dense_whole = (
      row['K'] * ms[*setting, PLAIN_DENSE, p] for p in PASSES.values()
    )
    backward = (whole - first) / (dense_whole - dense)
    both.append({**row, 'forward': first / dense, 'backward': backward})
  return both


def scaling_table(rows: Sequence[Row]) -> str:
  """Table of how time and memory grow with E, at fixed tokens an expert."""

  def mib(count):
    return lambda row: f'{count(row) / 2**20:,.0f}'

  columns = {
    'E': '{E}',
    'tokens': '{tokens:,}',
    'layer': '{case}',
    'ms': '{ms.median:.1f}',
    'roofline ms': '{roofline_ms:.1f}',
    'time / roofline': '{over_roofline.median:.2f}',
    f'relative to E={rows[0]["E"]}': '{growth:.2f}',
    'temporary MiB': mib(lambda row: row['temp_bytes']),
    "weights' gradients MiB": mib(lambda row: row['gradient_bytes']),
    'temporary minus gradients MiB': mib(
      lambda row: row['temp_bytes'] - row['gradient_bytes']
    ),
  }
  return timing.table(rows, columns)


def report(
  preset: Preset, peaks: Peaks, rows: Sequence[Row], scaling: Sequence[Row]
) -> str:
  """All tables and the meaning of their columns, in Markdown."""
  s, both = preset.sizes, both_passes(rows)
  layers = [row for row in rows if row['case'] in LAYERS]
  others = [row for row in rows if row['case'] not in LAYERS]
  sections = [
    '# One sparse layer against dense layers and bare products\n\n'
    f'{timing.conditions(peaks)} N={s.num_tokens:,} tokens, M={s.width:,}, '
    f'F={s.hidden:,}, {s.activation}, {s.dtype}.\n\n'
    '`gather` has capacity factor 1.0 per assignment, all tokens one group, '
    'and drops what is not served; `dropless` drops none. '
    'The layer includes router, losses and statistics; its gradient is that '
    'of all parameters and the input. Dense is the feed-forward of one expert '
    'on all tokens, so that dense * K has the FLOPs of the K experts; plain '
    'dense is `jnp` alone. The limit is the fastest bare grouped product of '
    'the same shapes in the same rounds, without routing.\n\n'
    '## Layers\n',
    timing.table(layers, OF_LAYERS),
    f'{timing.ABOUT_WORK}: every kernel read once forward and once backward, '
    'its gradient written once, activations in and out.\n',
  ]
  if both:
    sections += [
      '## Whole and backward alone\n\n'
      'Over plain dense times K. Backward alone is the time with the gradient '
      'less that of the forward pass, of medians.\n',
      timing.table(both, OF_PASSES),
    ]
  sections += ['## Baselines\n', timing.table(others, OF_BASELINES)]
  if scaling:
    sections += [
      '## Growth with E\n\n'
      f'{preset.rows_per_expert} tokens an expert, K=1, '
      'uniform routing, forward+backward; all rows interleaved.\n',
      scaling_table(scaling),
    ]
  return '\n'.join(sections)


def draw(rows: Sequence[Row], folder: pathlib.Path) -> None:
  """Draws each layer's time over that of the dense layer times K."""
  ratios, limits = {}, {}
  for row in rows:
    if row['case'] in LAYERS:
      label = 'E={E} K={K}, {routing}, {pass}: {case}'.format_map(row)
      ratios[label] = row[f'per_{DENSE}']
      limits[label] = ratios[label].median / row['per_limit'].median
  axis = 'time / (time of the dense layer * K)'
  timing.draw_bars(folder / 'ratios.png', ratios, axis, limits)


def with_options(preset: Preset, options: argparse.Namespace) -> Preset:
  """The preset, with the values of the command line in place of its own."""

  def replaced(old):
    names = [field.name for field in dataclasses.fields(old)]
    given = {name: getattr(options, name, None) for name in names}
    changes = {k: v for k, v in given.items() if v is not None}
    return dataclasses.replace(old, **changes)

  return replaced(dataclasses.replace(preset, sizes=replaced(preset.sizes)))


@cli.reported()
def main(argv: Sequence[str] | None = None) -> None:
  """Measures every setting; writes the tables and the plot."""
  parser, n = timing.parser(NAME, __doc__), cli.POSITIVE
  add = parser.add_argument
  add(
    '--preset',
    choices=list(PRESETS),
    default='quick',
    help='quick: E=8 and 64, three minutes on two cores; full: E=256 too; '
    'cells: E=8 and 64, uniform routing, each pass; gpu: the sizes of Mixtral '
    'in bfloat16; gpu_fine: 128 narrow experts. The options below change one',
  )
  add('--seconds', type=cli.SECONDS, help='how long each setting is timed')
  add('--tokens', type=n, dest='num_tokens', help='N, tokens of a batch')
  add('--width', type=n, help='M, model width')
  add('--hidden', type=n, help='F, hidden width of one expert')
  add('--activation', choices=list(ACTIVATIONS), help='activation of experts')
  add('--dtype', choices=['float32', 'bfloat16'], help='type of all arrays')
  add('--experts', type=n, nargs='+', help='values of E')
  add('--selected', type=n, nargs='+', help='values of K')
  add('--routings', nargs='+', choices=ROUTINGS, help="tokens' distributions")
  text = 'values of K whose forward pass is timed alone too'
  add('--forward_selected', type=n, nargs='*', help=text)
  add('--scaling', type=n, nargs='*', help='values of E of the second table')
  add('--rows_per_expert', type=n, help='tokens an expert, second table')
  options = parser.parse_args(argv)
  preset = with_options(PRESETS[options.preset], options)
  if 'gpu' in options.preset and jax.default_backend() == 'cpu':
    raise SystemExit(
      f"--preset={options.preset} needs an accelerator; there is only a 'cpu'"
    )
  for E in preset.experts:
    if max(preset.selected) > E:
      raise SystemExit(f'selected={max(preset.selected)} > experts={E}')
  keep_freed_memory()
  peaks = measure_peaks(preset.sizes.dtype, quick=options.rough_peaks)
  print(f'{timing.device_name()}; {peaks.describe()}', flush=True)
  rows = measure_all(preset, peaks)
  scaling = measure_scaling(preset, peaks) if preset.scaling else []
  metadata = {
    'preset': dataclasses.asdict(preset),
    'peaks': dataclasses.asdict(peaks),
    'scaling': [timing.flat(row) for row in scaling],
  }
  text = report(preset, peaks, rows, scaling)
  draw(rows, timing.write(options.output, NAME, text, rows, metadata))


if __name__ == '__main__':
  main()
