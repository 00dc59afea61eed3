"""The tables and the plot of `bench_moe_layer`, from its rows."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments.benchmarks import timing
from experiments.benchmarks.moe_layer_programs import (
  DENSE,
  LAYERS,
  PASSES,
  PLAIN_DENSE,
  Sizes,
)
from experiments.benchmarks.roofline import Peaks
from experiments.study.tables import markdown_table

_MIB = 2**20
Row = Mapping[str, Any]


def report(
  sizes: Sizes, peaks: Peaks, rows: Sequence[Row], scaling: Sequence[Row]
) -> str:
  """All tables and the meaning of their columns, in Markdown."""
  f = timing.facts()
  s = sizes
  sections = [
    '# One sparse layer against dense layers and bare products\n\n'
    f'{f["device"]} ({f["devices"]}, {f["cores"]} cores), {f["date"]}, jax '
    f'{f["jax"]}. N={s.num_tokens:,} tokens, M={s.width:,}, F={s.hidden:,}, '
    f'{s.activation}, {s.dtype}; {peaks.describe()}.\n\n'
    "Cases of a row's setting ran interleaved; ms are medians, ratios medians "
    'of ratios within a round (quartiles in brackets). `gather` has capacity '
    'factor 1.0 per assignment, all tokens one group, and drops what is not '
    'served; `dropless` drops none. '
    'The layer includes router, losses and statistics; its gradient is that '
    'of all parameters and the input. Dense is the feed-forward of one expert '
    'on all tokens, so that dense * K has the FLOPs of the K experts; plain '
    'dense is `jnp` alone. The limit is the fastest bare grouped product of '
    'the same shapes in the same rounds, without routing.\n\n'
    '## Layers\n',
    layer_table(rows),
    FOOTNOTE,
    '## Whole and backward alone\n\n'
    'Over plain dense times K. Backward alone is the time with the gradient '
    'less that of the forward pass, of medians.\n',
    backward_table(rows),
    '## Baselines\n',
    bare_table(rows),
  ]
  if scaling:
    sections += [
      '## Growth with E\n\n'
      f'{scaling[0]["tokens"] // scaling[0]["E"]} tokens an expert, K=1, '
      'uniform routing, forward+backward; all rows interleaved.\n',
      scaling_table(scaling),
    ]
  return '\n'.join(sections)


FOOTNOTE = (
  'Roofline: the larger of GFLOP / peak matmul and MB at least / peak copy, '
  'both peaks timed again in every round, as the machine drifts; '
  'GFLOP and MB at least are by formula (`benchmarks/roofline.py`: every '
  'kernel read once forward and once backward, its gradient written once, '
  'activations in and out), reached is roofline / measured. * XLA counts a '
  'loop of dynamic trip count once, so that its own figures are not the '
  "program's work there.\n"
)


def layer_table(rows: Sequence[Row]) -> str:
  """Table of the layers; ratios stand with their quartiles."""
  lines = []
  for row in rows:
    if row['case'] not in LAYERS:
      continue
    ragged = 'not run'
    if 'per_ragged_dot' in row:
      ragged = f'{row["per_ragged_dot"]:.2f}'
    lines.append(
      {
        **_setting_columns(row),
        'layer': row['case'],
        'served': f'{row["served"]:.0%}',
        'ms': f'{row["ms"]:.1f}',
        '/ (dense * K)': _ratio(row, f'per_{DENSE}'),
        '/ (plain dense * K)': f'{row[f"per_{PLAIN_DENSE}"]:.2f}',
        '/ limit': _ratio(row, 'per_limit'),
        'the limit': row['limit'],
        '/ ragged_dot': ragged,
        'roofline ms': f'{row["roofline_ms"]:.1f}',
        'reached': f'{row["fraction"]:.0%}',
        **_count_columns(row),
      }
    )
  return markdown_table(lines)


def backward_table(rows: Sequence[Row]) -> str:
  """Table of layers by dispatch, where both passes of a setting were timed."""
  ms = {
    (row['E'], row['K'], row['routing'], row['case'], row['pass']): row['ms']
    for row in rows
  }
  lines = []
  for row in rows:
    E, K, routing, case = (row[n] for n in ('E', 'K', 'routing', 'case'))
    forward = ms.get((E, K, routing, case, PASSES[False]))
    if case not in LAYERS or row['pass'] != PASSES[True] or forward is None:
      continue
    dense = [ms[E, K, routing, PLAIN_DENSE, name] for name in PASSES.values()]
    backward = (row['ms'] - forward) / (K * (dense[1] - dense[0]))
    lines.append(
      {
        'E': str(E),
        'K': str(K),
        'routing': routing,
        'layer': case,
        'forward+backward': _ratio(row, f'per_{PLAIN_DENSE}'),
        '/ limit': _ratio(row, 'per_limit'),
        'forward': f'{forward / (K * dense[0]):.2f}',
        'backward alone': f'{backward:.2f}',
      }
    )
  return markdown_table(lines) if lines else 'No setting has both passes.\n'


def bare_table(rows: Sequence[Row]) -> str:
  """Table of the baselines."""
  return markdown_table(
    [
      {
        **_setting_columns(row),
        'case': row['case'],
        'ms': f'{row["ms"]:.1f} ({row["ms_low"]:.1f}-{row["ms_high"]:.1f})',
        '/ (dense * K)': f'{row[f"per_{DENSE}"]:.2f}',
        'roofline ms': f'{row["roofline_ms"]:.1f}',
        'reached': f'{row["fraction"]:.0%}',
        **_count_columns(row),
      }
      for row in rows
      if row['case'] not in LAYERS
    ]
  )


def scaling_table(rows: Sequence[Row]) -> str:
  """Table of how time and memory grow with E, at fixed tokens an expert."""
  first = min(row['E'] for row in rows)
  return markdown_table(
    [
      {
        'E': str(row['E']),
        'tokens': f'{row["tokens"]:,}',
        'layer': row['case'],
        'ms': f'{row["ms"]:.1f}',
        'roofline ms': f'{row["roofline_ms"]:.1f}',
        'time / roofline': f'{row["over_roofline"]:.2f}',
        f'relative to E={first}': _ratio(row, 'growth'),
        'temporary MiB': f'{row["temp_bytes"] / _MIB:,.0f}',
        "weights' gradients MiB": f'{row["gradient_bytes"] / _MIB:,.0f}',
        'temporary minus gradients MiB': (
          f'{(row["temp_bytes"] - row["gradient_bytes"]) / _MIB:,.0f}'
        ),
      }
      for row in rows
    ]
  )


def _ratio(row: Row, name: str) -> str:
  low, high = row[f'{name}_low'], row[f'{name}_high']
  return f'{row[name]:.2f} ({low:.2f}-{high:.2f})'


def _setting_columns(row: Row) -> dict[str, str]:
  return {name: str(row[name]) for name in ('E', 'K', 'routing', 'pass')}


def _count_columns(row: Row) -> dict[str, str]:
  loops = row['case'] in LAYERS[1:] or row['case'].startswith('grouped')
  star = ' *' if loops else ''
  return {
    'GFLOP': f'{row["flops"] / 1e9:.1f}',
    'GFLOP (XLA)': f'{row["xla_flops"] / 1e9:.1f}{star}',
    'MB at least': f'{row["min_bytes"] / 1e6:,.0f}',
    'MB (XLA)': f'{row["xla_bytes"] / 1e6:,.0f}{star}',
    'temporary MiB': f'{row["temp_bytes"] / _MIB:,.0f}',
    'compile s': f'{row["compile_seconds"]:.1f}',
  }


def write_plot(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
  """Draws each layer's time over that of the dense layer times K.

  Layers are bars; black marks are the limits, the fastest bare products.
  """
  settings = list(dict.fromkeys(_label(row) for row in rows))
  figure = Figure(
    figsize=(7.5, 1.2 + 0.5 * len(settings)), layout='constrained'
  )
  axes = figure.subplots()
  height = 0.8 / len(LAYERS)
  for i, name in enumerate(LAYERS):
    case_rows = [row for row in rows if row['case'] == name]
    positions = [
      settings.index(_label(row)) + (i - (len(LAYERS) - 1) / 2) * height
      for row in case_rows
    ]
    ratios = [row[f'per_{DENSE}'] for row in case_rows]
    limits = [row[f'per_{DENSE}'] / row['per_limit'] for row in case_rows]
    axes.barh(positions, ratios, 0.9 * height, label=name)
    axes.plot(
      limits,
      positions,
      'k|',
      markersize=12,
      markeredgewidth=2,
      label='fastest bare products' if i == 0 else None,
    )
  axes.axvline(1, color='0.5', linewidth=0.8)
  axes.set_yticks(range(len(settings)), settings)
  axes.invert_yaxis()
  axes.set_xlabel('time / (time of the dense layer * K)')
  axes.set_title(f'One sparse layer on {timing.device_name()}', loc='left')
  axes.spines[['top', 'right']].set_visible(False)
  axes.legend(frameon=False)
  figure.savefig(path, dpi=120)


def _label(row: Row) -> str:
  return f'E={row["E"]} K={row["K"]} {row["routing"]}\n{row["pass"]}'
