"""Colours, lines and markers of every figure, and what its axes have in common.

A figure is read by the colour-blind and on grey paper, too: the colours of
lines are Okabe and Ito's (Color Universal Design, https://jfly.uni-koeln.de/color/),
each with a line style and a marker of its own, and colours of heat maps are
lighter the less they stand for.
"""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter, StrMethodFormatter

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = COLOURS = (
  '#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000'
)  # fmt: skip
LINES = (
  '-', (0, (5, 1.5)), (0, (6, 1.5, 1, 1.5)), (0, (1.2, 1.2)),
  (0, (3, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (2, 2)),
)  # fmt: skip
MARKERS = 'osD^vPX'
DPI = 150
# Ends of the colour scale of ratios, and its colours: paler than grey is less
# than 1, and darker is more, so that a grey print tells the two apart.
RATIOS = (0.25, 4)
RATIO_COLOURS = LinearSegmentedColormap.from_list(
  'ratio', ['#FBE3B0', '#DDB878', '#A9A29A', '#5C7FA8', '#0B2F63']
).with_extremes(under='white', bad=(0, 0, 0, 0))
HOW_TO_READ = (
  'Grey is a ratio of 1, darker and bluer is more, paler and more orange is '
  'less, and white is nothing at all.'
)


def series(number: int) -> dict[str, Any]:
  """The style of line `number` of a figure: colour, line, marker.

  Markers are hollow, and later lines have smaller markers, so that all points
  show where they coincide.
  """
  index = number % len(COLOURS)
  return {
    'color': COLOURS[index],
    'linestyle': LINES[index],
    'linewidth': 1.4,
    'marker': MARKERS[index],
    'markersize': max(3.5, 7.5 - 1.2 * index),
    'markerfacecolor': 'none',
  }


def shades(count: int) -> Float[np.ndarray, 'n 4']:
  """Colours of an ordered set of lines, such as layers; the last is palest."""
  return colormaps['viridis'](np.linspace(0, 0.85, count))


def heat_maps(
  panels: Mapping[
    str, tuple[Float[np.ndarray, ' X'], Float[np.ndarray, '...']]
  ],
  labels: tuple[str, str, str],
  columns: int,
  size: tuple[float | int, float | int],
  bar_aspect: int,
) -> tuple[Figure, list[Axes], Axes]:
  """Heat maps of ratios in a grid, with one logarithmic scale of colours.

  The first row of ratios is at the top. Zero has no logarithm; it is drawn in
  the colour below the end of the scale. Cells that are NaN, and areas without a
  cell, are hatched.

  Args:
    panels: The borders of columns and the ratios, [rows, columns], of each heat
      map, by its title; NaN are unknown.
    labels: The title, and the labels of the x axis and of the y axis.
    columns: Number of heat maps side by side.
    size: Width and height of the figure in inches.
    bar_aspect: Height of the colour bar over its width.

  Returns:
    The figure, the axes of the heat maps and those of the colour bar.
  """
  figure = Figure(figsize=size, layout='constrained')
  lines = -(-len(panels) // columns)
  all_axes = figure.subplots(lines, columns, squeeze=False).flatten()
  mesh: Any = None
  for axes, (title, (x, ratios)) in zip(all_axes, panels.items()):
    axes.patch.set(facecolor='white', hatch='////', edgecolor='0.75')
    floor = np.where(ratios > 0, RATIOS[0], RATIOS[0] / 2)
    mesh = axes.pcolormesh(
      x,
      np.arange(len(ratios) + 1) - 0.5,
      np.where(np.isnan(ratios), ratios, np.maximum(ratios, floor)),
      cmap=RATIO_COLOURS,
      norm=LogNorm(*RATIOS),
      rasterized=True,
    )
    axes.set_ylim(len(ratios) - 0.5, -0.5)
    axes.set_title(title, loc='left', fontsize='medium')
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
  for axes in all_axes[len(panels) :]:
    axes.remove()
  figure.suptitle(labels[0], fontsize='large')
  figure.supxlabel(labels[1], fontsize='medium')
  figure.supylabel(labels[2], fontsize='medium')
  axes = [*all_axes[: len(panels)]]
  bar = figure.colorbar(
    mesh, ax=axes, extend='both', pad=0.01, aspect=bar_aspect
  )
  bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=['¼', '½', '1', '2', '4'])
  bar.minorticks_off()
  return figure, axes, bar.ax


def label_axes(axes: Axes, title: str, unit: str, last: int) -> None:
  """Gives axes over steps from 0 to `last` a title, a unit and a grid."""
  axes.set_title(title, loc='left')
  axes.set_xlabel('step')
  axes.set_ylabel(unit)
  axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
  axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
  axes.xaxis.set_major_formatter(StrMethodFormatter('{x:,.0f}'))
  axes.grid(alpha=0.25)
  axes.spines[['top', 'right']].set_visible(False)
  axes.set_xlim(0, 1.03 * max(last, 1))


def room_around(axes: Axes, values: Float[np.ndarray, 'n']) -> None:
  """Sets limits of the y axis that also show a single value in the middle."""
  values = values[np.isfinite(values)]
  if not values.size:
    return
  low, high = values.min(), values.max()
  space = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
  axes.set_ylim(low - space, high + space)


def picture(figure: Figure) -> bytes:
  """The PNG file of a figure."""
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=DPI)
  return buffer.getvalue()
