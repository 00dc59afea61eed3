"""The tables and the plot of `bench_train_step`, from its rows."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments.benchmarks import timing
from experiments.benchmarks.roofline import Peaks
from experiments.study.tables import markdown_table

_MIB = 2**20


def report(
  title: str,
  peaks: Peaks,
  rows: Sequence[Mapping[str, Any]],
  depths: Sequence[Mapping[str, Any]],
  warning: str = '',
) -> str:
  """Both tables and the meaning of their columns, in Markdown."""
  f = timing.facts()
  return (
    f'# A training step of {title}\n\n'
    f'{warning}{". " * bool(warning)}'
    f'{f["device"]} ({f["cores"]} cores, one device used), {f["date"]}, jax '
    f'{f["jax"]}; {peaks.describe()}. Cases ran interleaved: '
    'medians, and medians of ratios within a round (quartiles in brackets). '
    'Random tokens, full rows; the state is donated. Roofline: the larger of '
    'GFLOP / peak matmul and MB at least / peak copy (both peaks timed again '
    'in every round), by formula, without activations or recomputation. * XLA '
    'counts a loop of dynamic trip count '
    'once.\n\n'
    f'{step_table(rows)}\n'
    '## Compile time with depth\n\n'
    'Scanned layers, every second one sparse; tracing, lowering and compiling '
    'together, each once.\n\n'
    f'{depth_table(depths)}'
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
  f = timing.facts()
  lines = [
    {
      'case': row['case'],
      'ms': f'{row["ms"]:.0f}',
      'times as fast': f'{row["faster"]:.2f} '
      f'({row["faster_low"]:.2f}-{row["faster_high"]:.2f})',
      'limit, ms': f'{row["limit_ms"]:.0f}',
      'limit / time': f'{row["limit_share"]:.2f}',
      'rounds': str(row['rounds']),
    }
    for row in rows
  ]
  return (
    f'{heading}\n\n'
    f'{f["device"]} ({f["cores"]} cores), {f["date"]}, jax {f["jax"]}; '
    f'{peaks.describe()}. {sizes} In turns; medians, and medians of ratios '
    'within a round (quartiles in brackets). Limit: our counted products at '
    'the peak of the same '
    'rounds.\n\n'
    f'{markdown_table(lines)}'
  )


def step_table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Table of the steps, with a row for each variant."""
  lines = []
  for row in rows:
    star = ' *' if 'dropless' in row['case'] else ''
    low, high = row['per_twin_low'], row['per_twin_high']
    lines.append(
      {
        'case': row['case'],
        'ms': f'{row["ms"]:.1f} ({row["ms_low"]:.1f}-{row["ms_high"]:.1f})',
        '/ dense twin': f'{row["per_twin"]:.2f} ({low:.2f}-{high:.2f})',
        'roofline ms': f'{row["roofline_ms"]:.1f}',
        'reached': f'{row["fraction"]:.0%}',
        'GFLOP': f'{row["flops"] / 1e9:.1f}',
        'GFLOP (XLA)': f'{row["xla_flops"] / 1e9:.1f}{star}',
        'MB at least': f'{row["min_bytes"] / 1e6:,.0f}',
        'MB (XLA)': f'{row["xla_bytes"] / 1e6:,.0f}{star}',
        'temporary MiB': f'{row["temp_bytes"] / _MIB:,.1f}',
        'compile s': f'{row["compile_seconds"]:.1f}',
      }
    )
  return markdown_table(lines)


def depth_table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Table of compile times, with a row for each depth."""
  return markdown_table(
    [
      {
        'case': row['case'],
        'layers': str(row['layers']),
        'compile s': f'{row["compile_seconds"]:.1f}',
        '/ fewest layers': f'{row["ratio"]:.2f}',
        'temporary MiB': f'{row["temp_bytes"] / _MIB:,.1f}',
      }
      for row in rows
    ]
  )


def write_plot(
  rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]
) -> None:
  """Draws each variant's step time over the dense twin's, with quartiles."""
  figure = Figure(figsize=(7, 0.8 + 0.4 * len(rows)), layout='constrained')
  axes = figure.subplots()
  ratios = [row['per_twin'] for row in rows]
  errors = [
    [row['per_twin'] - row['per_twin_low'] for row in rows],
    [row['per_twin_high'] - row['per_twin'] for row in rows],
  ]
  axes.barh([row['case'] for row in rows], ratios, xerr=errors)
  axes.axvline(1, color='0.5', linewidth=0.8)
  axes.invert_yaxis()
  axes.set_xlabel("step time / dense twin's")
  axes.spines[['top', 'right']].set_visible(False)
  figure.savefig(path, dpi=120)
