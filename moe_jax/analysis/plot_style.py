"""Colours, lines and markers of every figure, and what its axes have in common.

A figure is read by the colour-blind and on grey paper, too: the colours of
lines are Okabe and Ito's (Color Universal Design, https://jfly.uni-koeln.de/color/),
each with a line style and a marker of its own, and colours of heat maps are
lighter the less they stand for.
"""

import io
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
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

  Markers are hollow, and those of later lines are smaller, so that points at
  one place all show.
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
  """Colours of an ordered set of lines, such as layers: the last is palest."""
  return colormaps['viridis'](np.linspace(0, 0.85, count))


def heat(
  axes: Axes,
  x: Float[np.ndarray, ' X'],
  ratios: Float[np.ndarray, 'rows columns'],
) -> QuadMesh:
  """Draws ratios on a logarithmic scale, with the first row at the top.

  Zero has no logarithm; it is drawn below the end of the scale. Cells that are
  NaN, and places without a cell, are hatched.

  Args:
    axes: The axes that they are drawn on.
    x: The borders of columns.
    ratios: The ratios; NaN are unknown.
  """
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
  return mesh


def ratio_bar(
  figure: Figure, mesh: QuadMesh, axes: Axes | list[Axes], **layout: Any
) -> Axes:
  """The colour bar of `heat`; `layout` goes to `Figure.colorbar`."""
  bar = figure.colorbar(mesh, ax=axes, extend='both', **layout)
  bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=['¼', '½', '1', '2', '4'])
  bar.minorticks_off()
  return bar.ax


def label_axes(axes: Axes, title: str, unit: str, last: int) -> None:
  """Gives axes over steps from 0 to `last` a title, a unit and a grid."""
  axes.set_title(title, loc='left')
  axes.set_xlabel('step')
  axes.set_ylabel(unit)
  axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
  count_steps(axes, 6)
  axes.grid(alpha=0.25)
  axes.spines[['top', 'right']].set_visible(False)
  axes.set_xlim(0, 1.03 * max(last, 1))


def count_steps(axes: Axes, at_most: int) -> None:
  """Labels the axis of steps with a few whole numbers, at most `at_most`."""
  axes.xaxis.set_major_locator(MaxNLocator(at_most, integer=True))
  axes.xaxis.set_major_formatter(StrMethodFormatter('{x:,.0f}'))


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
