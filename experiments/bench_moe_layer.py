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
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from experiments.benchmarks import moe_layer_cases as cases_lib
from experiments.benchmarks import moe_layer_programs as programs_lib
from experiments.benchmarks import moe_layer_tables as tables
from experiments.benchmarks import timing
from experiments.benchmarks.moe_layer_cases import ROUTINGS
from experiments.benchmarks.moe_layer_programs import DENSE, LAYERS, PASSES
from experiments.benchmarks.moe_layer_rows import (
  measure_scaling,
  measure_setting,
)
from experiments.benchmarks.roofline import Peaks, measure_peaks
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

  sizes: programs_lib.Sizes
  experts: tuple[int, ...]
  selected: tuple[int, ...] = (1, 2)
  routings: tuple[str, ...] = ROUTINGS
  forward_selected: tuple[int, ...] = (1, 2)
  scaling: tuple[int, ...] = ()
  rows_per_expert: int = 128
  seconds: float = 5.0
  most_ragged: int = 8

  def programs(self) -> list[tuple[int, bool]]:
    """The programs compiled for each E: pairs (K, whether with gradient)."""
    return [
      *((K, True) for K in self.selected),
      *((K, False) for K in self.forward_selected),
    ]


_CPU = programs_lib.Sizes(num_tokens=4096, width=256, hidden=1024)
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
    programs_lib.Sizes(16_384, 4096, 14_336, 'swiglu', 'bfloat16'),
    experts=(8,),
    selected=(2,),
    forward_selected=(2,),
  ),
  'gpu_fine': Preset(
    programs_lib.Sizes(32_768, 2048, 768, 'swiglu', 'bfloat16'),
    experts=(128,),
    selected=(8,),
    forward_selected=(8,),
  ),
}


def measure_all(preset: Preset, peaks: Peaks) -> list[dict[str, Any]]:
  """The rows of every setting of the first table."""
  rows = []
  for E in preset.experts:
    layer = cases_lib.Layer.draw(preset.sizes, E)
    for K, backward in preset.programs():
      compilations = cases_lib.compile_cases(
        layer, K, backward, ragged=preset.most_ragged >= E
      )
      for routing in preset.routings:
        setting = {
          'E': E, 'K': K, 'routing': routing, 'pass': PASSES[backward],
        }  # fmt: skip
        setting_rows = measure_setting(
          layer, compilations, setting, peaks, preset.seconds
        )
        rows += setting_rows
        _progress(setting_rows)
  return rows


def _progress(rows: Sequence[Mapping[str, Any]]) -> None:
  first = rows[0]
  ratios = ', '.join(
    f'{row["case"]} {row[f"per_{DENSE}"]:.2f} (x limit {row["per_limit"]:.2f})'
    for row in rows
    if row['case'] in LAYERS
  )
  print(
    f'E={first["E"]} K={first["K"]} {first["routing"]} {first["pass"]}: '
    f'{ratios} of the dense layer times K, {first["rounds"]} rounds',
    flush=True,
  )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = cli.Parser(
    prog=f'python -m experiments.{NAME}', description=__doc__.split('\n')[0]
  )
  add = parser.add_argument
  n = cli.POSITIVE
  add(
    '--preset',
    choices=list(PRESETS),
    default='quick',
    help='quick: E=8 and 64, three minutes on two cores; full: E=256 too; '
    'cells: E=8 and 64, uniform routing, each pass; gpu: the sizes of Mixtral '
    'in bfloat16; gpu_fine: 128 narrow experts. The options below change one',
  )
  timing.add_arguments(parser)
  add('--seconds', type=cli.SECONDS, help='how long each setting is timed')
  add('--tokens', type=n, help='N, tokens of a batch')
  add('--width', type=n, help='M, model width')
  add('--hidden', type=n, help='F, hidden width of one expert')
  add('--activation', choices=list(ACTIVATIONS), help='activation of experts')
  add('--dtype', choices=['float32', 'bfloat16'], help='type of all arrays')
  add('--experts', type=n, nargs='+', help='values of E')
  add('--selected', type=n, nargs='+', help='values of K')
  add('--routings', nargs='+', choices=ROUTINGS, help="tokens' distributions")
  add(
    '--forward_selected',
    type=n,
    nargs='*',
    help='values of K whose forward pass is timed alone too',
  )
  add('--scaling', type=n, nargs='*', help='values of E of the second table')
  add('--rows_per_expert', type=n, help='tokens an expert, second table')
  return parser.parse_args(argv)


def with_options(preset: Preset, options: argparse.Namespace) -> Preset:
  """The preset, with the values of the command line in place of its own."""
  overrides = {k: v for k, v in vars(options).items() if v is not None}
  overrides = {
    k: tuple(v) if isinstance(v, list) else v for k, v in overrides.items()
  }
  if 'tokens' in overrides:
    overrides['num_tokens'] = overrides.pop('tokens')

  def replace(old):
    names = {field.name for field in dataclasses.fields(old)}
    return dataclasses.replace(
      old, **{k: v for k, v in overrides.items() if k in names}
    )

  return dataclasses.replace(replace(preset), sizes=replace(preset.sizes))


@cli.reported()
def main(argv: Sequence[str] | None = None) -> None:
  """Measures every setting; writes the tables and the plot."""
  options = parse(argv)
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
  scaling = []
  if preset.scaling:
    scaling = measure_scaling(
      preset.sizes,
      preset.scaling,
      preset.rows_per_expert,
      peaks,
      3 * preset.seconds,
    )
  text = tables.report(preset.sizes, peaks, rows, scaling)
  folder = timing.write(
    options.output,
    NAME,
    text,
    rows,
    {
      'preset': dataclasses.asdict(preset),
      'peaks': dataclasses.asdict(peaks),
      'scaling': scaling,
    },
  )
  tables.write_plot(rows, folder / 'ratios.png')
  print(f'\n{tables.layer_table(rows)}')
  print(tables.backward_table(rows))
  if scaling:
    print(tables.scaling_table(scaling))
  print(f'written: {folder}')


if __name__ == '__main__':
  main()
