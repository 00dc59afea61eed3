"""Draws the figure of a study from its summary. Not here: its tables."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas

from experiments.study.parts import Figure
from experiments.study.tables import Interval
from moe_jax.analysis import plot_style


def draw(spec: Figure, summary: Mapping[str, Any], path: pathlib.Path) -> None:
  """Draws and writes a figure with a panel for each of the spec's columns.

  Where the spec has an x axis, rows are points of lines along it, and rows
  without x are horizontal lines; else every row is one point.
  """
  panels = [c for c in summary['columns'] if c['name'] in spec.columns]
  rows = [row for row in summary['rows'] if spec.keeps(row['name'])]
  names = _names(rows)
  height = 3.6 + 0.2 * len(names) / len(panels)
  if not spec.x_label:
    height = 1.2 + 0.3 * len(rows)
  figure = Canvas(figsize=(4.8 * len(panels), height), layout='constrained')
  axes = figure.subplots(1, len(panels), squeeze=False)[0]
  for ax, column in zip(axes, panels, strict=True):
    label = column['name'] + (f' ({column["unit"]})' if column['unit'] else '')
    if spec.x_label:
      _lines(ax, spec, rows, column['name'], names)
      ax.set_ylabel(label)
    else:
      _points(ax, rows, column['name'], labels=ax is axes[0])
      ax.set_xlabel(label)
  if spec.x_label:
    handle_of = {}
    for ax in axes:
      handles, labels = ax.get_legend_handles_labels()
      handle_of |= dict(zip(labels, handles, strict=True))
    figure.legend(
      handle_of.values(),
      handle_of,
      loc='outside lower center',
      fontsize=8,
      ncols=3 if len(panels) > 1 else 2,
    )
  figure.suptitle(summary['title'], fontsize=10)
  figure.savefig(path, dpi=110)


def _shown(row, column) -> Interval | None:
  values = row['values'].get(column, [])
  if not values or None in values:
    return None
  return Interval.of(values)


def _bar(interval: Interval) -> float:
  return interval.half_width if np.isfinite(interval.half_width) else 0.0


def _names(rows) -> list[str]:
  """Names in the legend, which fix colours: lines, then rows without x."""
  lines = [row['line'] for row in rows if row['x'] is not None]
  levels = [row['name'] for row in rows if row['x'] is None]
  return list(dict.fromkeys(lines + levels))


def _lines(ax, spec, rows, column: str, names: list[str]) -> None:
  shown = [(row, i) for row in rows if (i := _shown(row, column)) is not None]
  lines = dict.fromkeys(row['line'] for row, _ in shown if row['x'] is not None)
  for line in lines:
    points = sorted(
      (row['x'], interval.mean, _bar(interval))
      for row, interval in shown
      if row['line'] == line and row['x'] is not None
    )
    xs, means, bars = zip(*points, strict=True)
    style = plot_style.series(names.index(line))
    ax.errorbar(xs, means, bars, **style, capsize=3, label=line)
  for row, interval in shown:
    if row['x'] is None:
      style = plot_style.series(names.index(row['name']))
      color, dashes = style['color'], style['linestyle']
      ax.axhline(
        interval.mean, color=color, linestyle=dashes, label=row['name']
      )
  if spec.log_x:
    ax.set_xscale('log', base=2)
    ticks = sorted({row['x'] for row, _ in shown if row['x'] is not None})
    ax.set_xticks(ticks, [f'{tick:g}' for tick in ticks])
  ax.set_xlabel(spec.x_label)


def _points(ax, rows, column: str, *, labels: bool) -> None:
  for i, row in enumerate(rows):
    interval = _shown(row, column)
    if interval is not None:
      # A row has one style in all panels.
      style = plot_style.series(i)
      ax.errorbar(interval.mean, i, xerr=_bar(interval), **style, capsize=3)
  ax.locator_params(axis='x', nbins=6)  # more labels would touch each other
  names = [row['name'] for row in rows] if labels else [''] * len(rows)
  ax.set_yticks(range(len(rows)), names)
  ax.set_ylim(len(rows) - 0.5, -0.5)  # the first row is on top
