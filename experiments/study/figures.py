"""Draws the figure of a study from its summary."""

import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Canvas

from experiments.study import claims
from experiments.study.parts import Figure
from experiments.study.tables import bounds_of
from moe_jax.analysis import plot_style
from moe_jax.analysis.intervals import Bounds, Interval

# Markers by the side of the paper's row: below, above or beside the other row.
_SIDES = {'lower': '<v', 'higher': '>^', 'equal': 'DD'}
PAPER = 'side on which the paper has a row (checked)'
_LETTERS = 34  # number of letters in a line of a label
# Markers of points without lines: eight, as colours are seven, so that no two
# of many rows look alike.
_MARKERS = 'osD^vP*X'


def draw(spec: Figure, summary: Mapping[str, Any], path: pathlib.Path) -> None:
  """Draws and writes a figure with a panel for each of the spec's columns.

  Where the spec has an x axis, rows are points of lines along it, and rows
  without x are horizontal lines; else every row is one point. A grey triangle
  is at the value with which a claim compares the row, and points to the side
  where the paper has the row, if its numbers are checked. Where the spec names
  a column as the x axis, every row is a point along it.
  """
  panels = [c for c in summary['columns'] if c['name'] in spec.columns]
  draw_panels = _against if spec.against else _canvas
  figure = draw_panels(spec, summary, panels)
  older = '\n(in part older than the study: see the text)'
  title = summary['title'] + older * bool(summary.get('outdated'))
  figure.suptitle(title, fontsize=10)
  figure.savefig(path, dpi=110)


def heading(column: Mapping[str, Any]) -> str:
  """Name and unit of a column."""
  return column['name'] + (f' ({column["unit"]})' if column['unit'] else '')


def _against(
  spec: Figure, summary: Mapping[str, Any], panels: Sequence[Mapping[str, Any]]
) -> Canvas:
  """A figure with a panel for each of these columns along another column."""
  (across,) = (c for c in summary['columns'] if c['name'] == spec.against)
  figure = Canvas(figsize=(6 * len(panels), 4.4), layout='constrained')
  for column, ax in zip(panels, figure.subplots(1, len(panels)), strict=True):
    for i, row in enumerate(summary['rows']):
      x, y = _shown(row, across), _shown(row, column)
      colour = plot_style.COLOURS[i % len(plot_style.COLOURS)]
      style = dict(color=colour, marker=_MARKERS[i % len(_MARKERS)], ls='')
      if column is panels[0]:
        style['label'] = row['name']
      yerr = np.transpose([bar(y, bounds_of(row, column))])
      ax.errorbar(x.mean, y.mean, yerr, **style, capsize=3)
    ax.set_xscale('log', base=2)
    ax.xaxis.set_major_formatter('{x:g}')
    ax.set_xlabel(f'{spec.x_label} ({across["unit"]})')
    ax.set_ylabel(heading(column))
  figure.legend(loc='outside right center', fontsize=8)
  return figure


def _canvas(
  spec: Figure, summary: Mapping[str, Any], panels: Sequence[Mapping[str, Any]]
) -> Canvas:
  """A figure with a panel for each of these columns; see `draw`."""
  rows = [row for row in summary['rows'] if spec.keeps(row['name'])]
  # Names in the legend, which fix colours: lines, then rows without x.
  names = [row['line'] for row in rows if row['x'] is not None]
  names += [row['name'] for row in rows if row['x'] is None]
  names = list(dict.fromkeys(names))
  lines, across = grid(len(panels))
  # The rows, by their index, of which any panel of a line has numbers.
  rows_by_line = [
    {
      i: row
      for i, row in enumerate(rows)
      if any(_shown(row, column) for column in panels[line * across :][:across])
    }
    for line in range(lines)
  ]
  heights = [3.6 + 0.2 * len(names) / len(panels)] * lines
  if not spec.x_label:
    heights = [*map(_height, rows_by_line)]
  figure = Canvas(figsize=(4.8 * across, sum(heights)), layout='constrained')
  axes = figure.subplots(
    lines, across, squeeze=False, height_ratios=heights
  ).flat
  for ax in axes[len(panels) :]:
    ax.set_axis_off()
  handle_of = {}
  for ax, column in zip(axes, panels):
    drawn = rows
    if spec.x_label:
      _lines(ax, spec, rows, column, names)
      ax.set_ylabel(heading(column))
    else:
      subplot = ax.get_subplotspec()
      first, shown = subplot.is_first_col(), rows_by_line[subplot.rowspan.start]
      _points(ax, shown, column, labels=first)
      drawn = list(shown.values())
      ax.set_xlabel(heading(column))
      ax.set_ylabel(textwrap.fill(spec.rows, _LETTERS) * first)
    _sides(ax, summary, drawn, column, along_x=bool(spec.x_label))
    handles, labels = ax.get_legend_handles_labels()
    handle_of |= dict(zip(labels, handles, strict=True))
  if handle_of:
    figure.legend(
      handle_of.values(),
      handle_of,
      loc='outside lower center',
      fontsize=8,
      frameon=False,
      ncols=3 if len(panels) > 1 else 1,
    )
  return figure


def _label(row: Mapping[str, Any]) -> str:
  return textwrap.fill(row['name'], _LETTERS)


def _height(rows: Mapping[int, Mapping[str, Any]]) -> float:
  """Inches of a panel of rows, whose names may take several lines."""
  lines = [1 + _label(row).count('\n') for row in rows.values()]
  return 1.2 + (0.16 + 0.14 * max(lines, default=1)) * len(rows)


def _sides(ax, summary, rows, column, *, along_x: bool) -> None:
  """Marks where the paper has the rows of checked claims about a column."""
  number_of = {row['name']: i for i, row in enumerate(rows)}
  row_of = {row['name']: row for row in summary['rows']}
  for claim in summary.get('claims', ()):
    published, value = claim['published'], claim['than']
    if claim['column'] != column['name'] or claim['row'] not in number_of:
      continue
    if not published or not all(map(claims.is_checked, published)):
      continue
    if isinstance(value, str):
      interval = _shown(row_of[value], column) if value in row_of else None
      if interval is None:
        continue
      value = interval.mean
    number = number_of[claim['row']]
    x = rows[number]['x']
    marker = _SIDES[claim['direction']][along_x]
    style = dict(color='grey', linestyle='', markersize=6, label=PAPER)
    if not along_x:
      ax.plot(value, number, marker, **style)
    elif x is None:  # at the right end of its horizontal line
      ax.plot(1, value, marker, transform=ax.get_yaxis_transform(), **style)
    else:
      ax.plot(x, value, marker, **style)


def grid(panels: int) -> tuple[int, int]:
  """Lines and columns of panels: at most two stand side by side.

  A strip of three or more would be shown so small that no text is readable.
  """
  across = min(panels, 2)
  return -(-panels // across), across


def _shown(row, column) -> Interval | None:
  values = row['values'].get(column['name'], [])
  return Interval.of(values) if values and None not in values else None


def bar(interval: Interval, bounds: Bounds) -> tuple[float, float]:
  """Lengths of an interval's bar below and above the mean, within bounds."""
  if not np.isfinite(interval.half_width):
    return 0.0, 0.0
  low, high = interval.ends(bounds)
  return max(interval.mean - low, 0.0), max(high - interval.mean, 0.0)


def _style(number: int, name: str) -> dict[str, Any]:
  """The style of a row or line; dense twins are grey in all figures."""
  is_dense = name.startswith('dense') or ', dense' in name
  return plot_style.series(number) | (dict(color='0.45') if is_dense else {})


def _lines(ax, spec, rows, column, names: list[str]) -> None:
  lines: dict[str, list] = {}
  levels: dict[str, float] = {}
  for row in rows:
    if (interval := _shown(row, column)) is None:
      continue
    if row['x'] is None:
      levels[row['name']] = interval.mean
    else:
      point = interval.mean, bar(interval, bounds_of(row, column))
      lines.setdefault(row['line'], []).append((row['x'], *point))
  for line, points in lines.items():
    xs, means, bars = zip(*sorted(points), strict=True)
    style = _style(names.index(line), line)
    ax.errorbar(xs, means, np.transpose(bars), **style, capsize=3, label=line)
  for name, mean in levels.items():
    style = _style(names.index(name), name)
    color, dashes = style['color'], style['linestyle']
    ax.axhline(mean, color=color, linestyle=dashes, label=name)
  if spec.log_x:
    ax.set_xscale('log', base=2)
    ticks = sorted({x for points in lines.values() for x, _, _ in points})
    # A whole number is printed as it is, another with one to three digits.
    labels = [f'{x:g}' if x == round(x) else f'{x:.3g}' for x in ticks]
    ax.set_xticks(ticks, labels)
  ax.set_xlabel(spec.x_label)


def _points(ax, rows, column, *, labels: bool) -> None:
  for y, (i, row) in enumerate(rows.items()):
    interval = _shown(row, column)
    if interval is not None:
      # A row has one style in all panels.
      style = _style(i, row['name'])
      xerr = np.transpose([bar(interval, bounds_of(row, column))])
      ax.errorbar(interval.mean, y, xerr=xerr, **style, capsize=3)
  ax.locator_params(axis='x', nbins=6)  # more labels would touch each other
  names = [_label(row) * labels for row in rows.values()]
  ax.set_yticks(range(len(rows)), names, fontsize=8)
  ax.set_ylim(len(rows) - 0.5, -0.5)  # the first row is on top
