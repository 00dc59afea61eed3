"""What does a sparse layer cost, against dense layers and bare products?

    python -m experiments.bench_moe_layer --preset=quick

Times `moe_jax.MoE` with capacity factor 1 (`gather`, and `sorted` without empty
slots) and `dropless`, with its router, over numbers of experts and choices,
uniform and Zipf-skewed routing, forward and with the gradient of parameters and
input. Every time is a ratio, taken within a round, to: the dense feed-forward
times K, which has equal FLOPs; the fastest bare grouped products of the same
shapes (the limit); `lax.ragged_dot`; and the roofline of this machine's
measured peaks. Writes `table.md` and `results.json` to
`results/bench_moe_layer/<device>`. `quick` takes under five minutes on two
cores, with E=256 in the second table alone; `cells` times both passes of E=8
and 64, K=1 and 2, under uniform routing. `bench_accelerator` has the sizes of
known models.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.benchmarks import moe_layer, timing
from experiments.benchmarks.moe_layer import DENSE, LAYERS, PLAIN_DENSE, RAGGED
from experiments.benchmarks.roofline import Peaks
from experiments.benchmarks.timing import Row
from moe_jax import cli
from moe_jax.layers import ACTIVATIONS

NAME = 'bench_moe_layer'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset(moe_layer.Sizes):
  """The settings that are timed, and for how long.

  Attributes:
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

  experts: tuple[int, ...]
  selected: tuple[int, ...] = (1, 2)
  routings: tuple[str, ...] = moe_layer.ROUTINGS
  forward_selected: tuple[int, ...] = (1, 2)
  scaling: tuple[int, ...] = ()
  rows_per_expert: int = 128
  seconds: float = 5.0
  most_ragged: int = 8


_CPU = dict(num_tokens=4096, width=256, hidden=1024)
PRESETS = {
  'quick': Preset(
    **_CPU, experts=(8, 64), forward_selected=(1,), scaling=(8, 64, 256)
  ),
  'cells': Preset(
    **_CPU, experts=(8, 64), routings=('uniform',), seconds=15.0, most_ragged=0
  ),
}


def measure_all(preset: Preset, peaks: Peaks) -> list[dict[str, Any]]:
  """Times each E, K, pass and routing of the preset; a row for each case."""
  rows = []
  for E in preset.experts:
    layer = moe_layer.Layer.draw(preset, E)
    names = [*LAYERS, *moe_layer.OTHERS]
    if preset.most_ragged < E:
      names.remove(RAGGED)
    passes = [(K, True) for K in preset.selected]
    passes += [(K, False) for K in preset.forward_selected]
    for K, backward in passes:
      compiled = moe_layer.compile_cases(layer, K, backward, names)
      for routing in preset.routings:
        setting = dict(E=E, K=K, routing=routing)
        setting['pass'] = moe_layer.PASSES[backward]
        print(f'times {setting}', flush=True)
        inputs = moe_layer.Inputs.draw(layer, routing, K)
        programs = moe_layer.bind(layer, compiled, inputs, K, backward)
        seconds = preset.seconds
        times, measured = timing.measure(programs, peaks, seconds=seconds)
        rows += [
          {**setting, **row, **ratios(times, row['case'], K, routing)}
          for row in measured.values()
        ]
  return rows


def ratios(
  times: Mapping[str, Sequence[float]], name: str, K: int, routing: str
) -> dict[str, Any]:
  """Ratios of a case's time to that of dense layers times K, and to its limit.

  Args:
    times: Seconds of each case in each round.
    name: Name of the case.
    K: Number of selected experts.
    routing: Name of the routing.
  """
  own, found = times[name], dict[str, Any]()
  for base in (DENSE, PLAIN_DENSE):
    times_K = 1 if name in (DENSE, PLAIN_DENSE) else K
    found[f'per_{base}'] = timing.ratio(own, [times_K * t for t in times[base]])
  if name in LAYERS:
    found['limit'] = limit = fastest_limit(times, name, routing)
    found['per_limit'] = timing.ratio(own, times[limit])
    if RAGGED in times:
      found['per_ragged_dot'] = timing.ratio(own, times[RAGGED])
  return found


def fastest_limit(
  times: Mapping[str, Sequence[float]], layer: str, routing: str
) -> str:
  """Name of the fastest bare products of a layer's shapes, its limit.

  `gather` is compared to products of equal groups, which its slots are, and so
  is `sorted`, which has at most as many rows. `dropless` is compared to
  products of the drawn groups; under uniform routing, where these are equal but
  for chance, products of equal groups count for it too.
  """
  grouped = moe_layer.GROUPED
  drawn_groups = [*grouped, RAGGED]
  equal = [*moe_layer.BATCHED, *(name + moe_layer.EQUAL for name in grouped)]
  names = equal if layer in moe_layer.DROPPING else drawn_groups
  if layer == 'dropless' and routing == 'uniform':
    names = drawn_groups + equal
  return min(
    (name for name in names if name in times),
    key=lambda name: timing.Spread.of(times[name]).median,
  )


def measure_scaling(preset: Preset, peaks: Peaks) -> list[dict[str, Any]]:
  """Times the layers with tokens in proportion to E; a row for each and E.

  K is 1 and the routing uniform, and the gradient is computed.
  """
  programs = {}
  for E in preset.scaling:
    tokens = E * preset.rows_per_expert
    sizes = dataclasses.replace(preset, num_tokens=tokens)
    layer = moe_layer.Layer.draw(sizes, E)
    compiled = moe_layer.compile_cases(layer, 1, True, LAYERS)
    inputs = moe_layer.Inputs.draw(layer, 'uniform', 1)
    bound = moe_layer.bind(layer, compiled, inputs, 1, True)
    programs |= {(E, name): program for name, program in bound.items()}
  _, rows = timing.measure(programs, peaks, seconds=3 * preset.seconds, least=3)
  first = preset.scaling[0]
  return [
    {
      **row,
      'case': name,
      'E': E,
      'tokens': E * preset.rows_per_expert,
      'growth': rows[first, name]['fraction'] / row['fraction'],
      'gradient_bytes': preset.kernel_bytes(E),
    }
    for (E, name), row in rows.items()
  ]


# Columns by title; see `timing.table`.
SETTING = {name: f'{{{name}}}' for name in ('E', 'K', 'routing', 'pass')}
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
    'reached': '{fraction:.0%}',
    f'time / roofline, relative to E={rows[0]["E"]}': '{growth:.2f}',
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
  layers = [row for row in rows if row['case'] in LAYERS]
  others = [row for row in rows if row['case'] not in LAYERS]
  sections = [
    '# One sparse layer against dense layers and bare products\n\n'
    f'{timing.conditions(peaks)} N={preset.num_tokens:,} tokens, '
    f'M={preset.width:,}, F={preset.hidden:,}, {preset.activation}, '
    f'{preset.dtype}.\n\n'
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
    '## Baselines\n',
    timing.table(others, OF_BASELINES),
  ]
  if scaling:
    sections += [
      '## Growth with E\n\n'
      f'{preset.rows_per_expert} tokens an expert, K=1, '
      'uniform routing, forward+backward; all rows interleaved.\n',
      scaling_table(scaling),
    ]
  return '\n'.join(sections)


@cli.reported()
def main(argv: Sequence[str] | None = None) -> None:
  """Measures every setting and writes the tables."""
  parser, n = timing.parser(NAME, __doc__), cli.POSITIVE
  add = parser.add_argument
  add(
    '--preset',
    choices=list(PRESETS),
    default='quick',
    help='quick: E=8 and 64, three minutes on two cores; cells: the same E, '
    'uniform routing, each pass. The options below change one',
  )
  add('--seconds', type=cli.SECONDS, help='how long each setting is timed')
  add('--tokens', type=n, dest='num_tokens', help='N, tokens of a batch')
  add('--width', type=n, help='M, model width')
  add('--hidden', type=n, help='F, hidden width of one expert')
  add('--activation', choices=list(ACTIVATIONS), help='activation of experts')
  add('--dtype', choices=['float32', 'bfloat16'], help='type of all arrays')
  add('--experts', type=n, nargs='+', help='values of E')
  add('--selected', type=n, nargs='+', help='values of K')
  routings = moe_layer.ROUTINGS
  add('--routings', nargs='+', choices=routings, help="tokens' distributions")
  text = 'values of K whose forward pass is timed alone too'
  add('--forward_selected', type=n, nargs='*', help=text)
  add('--scaling', type=n, nargs='*', help='values of E of the second table')
  add('--rows_per_expert', type=n, help='tokens an expert, second table')
  options = parser.parse_args(argv)
  preset = PRESETS[options.preset]
  given = {
    field.name: value
    for field in dataclasses.fields(preset)
    if (value := getattr(options, field.name, None)) is not None
  }
  preset = dataclasses.replace(preset, **given)
  for E in preset.experts:
    if max(preset.selected) > E:
      raise SystemExit(f'selected={max(preset.selected)} > experts={E}')
  peaks = timing.measured_peaks(options, preset.dtype)
  rows = measure_all(preset, peaks)
  scaling = measure_scaling(preset, peaks) if preset.scaling else []
  metadata = {
    'preset': dataclasses.asdict(preset),
    'peaks': dataclasses.asdict(peaks),
    'scaling': [timing.flat(row) for row in scaling],
  }
  text = report(preset, peaks, rows, scaling)
  timing.write(options.output, NAME, text, rows, metadata)


if __name__ == '__main__':
  main()
