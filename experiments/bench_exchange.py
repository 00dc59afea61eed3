"""How many rows and bytes cross between devices, by what is shadowed?

    python -m experiments.bench_exchange --steps=50
    python -m experiments.bench_exchange --devices=8 \
      --config.model.moe.num_experts=32

Trains a sparse model without a balance loss on fake devices, which split its
experts, once for each number of experts that may be shadowed and each room of
the exchange. Prints the rows that had to leave their device, counted in each
step, and beside them the bytes that the compiled step sends, which are fixed
when it is compiled: shadowing alone lowers the rows and not the bytes. Nothing
is timed, as fake devices share a machine. Writes `table.md`, `rows.csv` and
`results.json` to `results/bench_exchange/<device>`.
"""

import argparse
import contextlib
import io
import itertools
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from experiments.benchmarks import timing
from experiments.compile_ahead import compile_step, described_devices, mesh_of
from experiments.study.tables import markdown_table
from moe_jax import command_line, config_file, run_config, sections
from moe_jax.analysis import collectives, cost
from moe_jax.runs import metrics
from moe_jax.training.loop import train_and_evaluate

NAME = 'bench_exchange'
SHADOWED = (0, 1, 2, 4)
FRACTIONS = (1.0, 0.5)
# A device for which a row is dear beside a product, as in a slow cluster.
SLOW = {'teraflops': 11.5, 'gigabytes': 1.0}
_COLUMNS = {
  'away_share': 'rows whose expert is elsewhere',
  'sent_share': 'rows that left',
  'shadowed_experts': 'experts shadowed',
  'exchange_overflow': 'rows without room',
}


def changes(
  devices: int, steps: int, shadowed: int, fraction: float
) -> dict[str, Any]:
  """Changes of the config for one row of the table."""
  shadowing = {'experts': shadowed} | (SLOW if shadowed else {})
  return {
    'total_steps': steps,
    'log_every_steps': 1,
    'optimizer': {'schedule': {'warmup_steps': 0}},
    'checkpoint': {'every_steps': 0},
    'mesh': {'data': 1, 'fsdp': 1, 'expert': devices, 'tensor': 1},
    'model': {
      'moe': {
        'router': {
          'kind': 'token_choice',
          'token_choice': {'balance_weight': 0.0},
        },
        'capacity': {'kind': 'all'},
        # All tokens choose the experts that leave room for other rows.
        'allow_future_leak': bool(shadowed) and fraction < 1,
        'dispatch': {
          'kind': 'gather',
          'gather': {
            'exchange': {'kind': 'ring', 'capacity_fraction': fraction},
            'shadowing': shadowing,
          },
        },
      }
    },
  }


def measure(
  config: ml_collections.ConfigDict, devices: int, steps: int
) -> list[dict[str, Any]]:
  """Trains and compiles each case; one row for each.

  Args:
    config: Config of the run.
    devices: The number of fake devices, over which experts are split.
    steps: The number of steps of each run.
  """
  on = described_devices(f'cpu:{devices}')
  rows = []
  for shadowed, fraction in itertools.product(SHADOWED, FRACTIONS):
    merged = sections.merge(config, changes(devices, steps, shadowed, fraction))
    options = run_config.settled(config, merged)[0]
    print(f'shadowed at most {shadowed}, room {fraction:g}', flush=True)
    with (
      tempfile.TemporaryDirectory() as folder,
      contextlib.redirect_stdout(io.StringIO()),
    ):
      train_and_evaluate(options, folder, devices=on)
      metric_rows = metrics.read_metrics(
        pathlib.Path(folder) / metrics.FILE_NAME
      )
    options = cost.with_own_vocabulary(options)
    compiled, _ = compile_step(options, mesh_of(options, on))
    sent = collectives.read(compiled.as_text()).by_kind
    rows.append(
      {
        'shadowed at most': shadowed,
        'room': fraction,
        **{name: _mean(metric_rows, name) for name in _COLUMNS},
        **{f'{kind} bytes': sent[kind].num_bytes for kind in sorted(sent)},
        'temporary bytes': compiled.memory_analysis().temp_size_in_bytes,
        'loss': [
          row['train/loss'] for row in metric_rows if 'train/loss' in row
        ][-1],
      }
    )
  return rows


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
  """The mean of a metric over training steps and layers."""
  values = [
    value
    for row in rows
    for key, value in row.items()
    if key.startswith('train/layer_') and key.endswith(f'/{name}')
  ]
  return float(np.mean(values))


def report(title: str, devices: int, rows: Sequence[Mapping[str, Any]]) -> str:
  """The table, in Markdown."""
  kinds = sorted({k for row in rows for k in row if k.endswith(' bytes')})
  lines = [
    {
      'shadowed at most': str(row['shadowed at most']),
      'room of the exchange': f'{row["room"]:g}',
      **{
        heading: f'{row[name]:.2f}' if name == 'shadowed_experts'
        else f'{row[name]:.1%}'
        for name, heading in _COLUMNS.items()
      },
      **{
        kind.replace(' bytes', ', MB'): f'{row.get(kind, 0) / 1e6:.2f}'
        for kind in kinds
      },
      'training loss at the end': f'{row["loss"]:.3f}',
    }
    for row in rows
  ]  # fmt: skip
  f = timing.facts()
  return (
    f'# What crosses between devices in a step of {title}\n\n'
    f'{devices} fake devices of {f["device"]}, {f["date"]}, jax {f["jax"]}; a '
    'balance loss of 0, and experts with room for all tokens. Rows '
    'are counted in every step, as shares of those that were served, and '
    'averaged over steps and layers. Where experts are shadowed and the room '
    'is less than 1, later tokens can change earlier outputs '
    '(moe.allow_future_leak). Bytes are what a device sends in a step '
    'by its compiled program, for each kind of collective: constants, '
    'whatever is shadowed. The exchange along a ring is collective-permute; '
    'all-reduce has the gradients of shared parameters, '
    'and the parameters of shadowed experts with their gradients. The network '
    f'is taken for one of {SLOW["gigabytes"]:g} GB/s and a device for one of '
    f'{SLOW["teraflops"]:g} TFLOP/s when experts are chosen.\n\n'
    f'{markdown_table(lines)}'
  )


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
  """The command line, and the config's overrides."""
  parser = command_line.Parser(
    prog=f'python -m experiments.{NAME}',
    description=__doc__.split('\n')[0],
    epilog='Keys of the config can be changed: --config.batch_size=8',
    allow_abbrev=False,
  )
  add, positive = parser.add_argument, command_line.POSITIVE
  add('--config', default='configs/tiny_switch.py', help='config to train')
  add('--devices', type=positive, default=4, help='number of fake devices')
  add('--steps', type=positive, default=50, help='steps of each run')
  add('--output', default='results', help='folder of the results')
  return parser.parse_known_args(argv)


@command_line.reported()
def main(argv: Sequence[str] | None = None) -> None:
  """Measures all cases and writes the table."""
  options, overrides = parse(argv)
  jax.config.update('jax_platforms', 'cpu')
  config = config_file.config_of(options.config, overrides)
  rows = measure(config, options.devices, options.steps)
  text = report(options.config, options.devices, rows)
  metadata = {'config': options.config, 'devices': options.devices}
  folder = timing.write(options.output, NAME, text, rows, metadata)
  print(f'{text}\nwritten: {folder}')


if __name__ == '__main__':
  main()
