"""The style of every figure, and the figures of a run's losses and loads.

A figure is read by the colour-blind and on grey paper, too: the colours of
lines are Okabe and Ito's (Color Universal Design, https://jfly.uni-koeln.de/color/),
each with a line style and a marker of its own. A colour of a heat map is the
lighter, the smaller the number that it stands for.

Figures are made with matplotlib's objects, never with pyplot, so that a hook
may draw in any thread, without a display, and leaves a notebook's open figures
alone.
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from jaxtyping import Float
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
Floats = Float[np.ndarray, '...']
Rows = Sequence[Mapping[str, Any]]

# Curves below the losses: the key behind 'train/' in metrics, title, unit, and
# the factor from the metric to that unit.
_BELOW = (
  ('drop_rate', 'Dropped choices of experts', 'percent', 100.0),
  ('learning_rate', 'Learning rate schedule', 'learning rate', 1.0),
  ('tokens_per_second', 'Speed', 'tokens/s', 1.0),
)
# With more columns than this, cells of a heat map are narrower than a pixel.
_MAX_COLUMNS = 400
_WIDTH = 7.2  # inches
_MAX_LETTERS = 26  # letters of a name in a legend


def series(number: int) -> dict[str, Any]:
  """The style of line `number` of a figure, as arguments of `Axes.plot`.

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


def heat_maps(
  panels: Mapping[str, Floats],
  labels: tuple[str, str, str],
  columns: int,
  size: tuple[float | int, float | int],
  borders: Mapping[str, Floats] = {},
) -> tuple[Figure, list[Axes], Axes]:
  """Heat maps of ratios in a grid, with one logarithmic scale of colours.

  The first row of ratios is at the top. Zero has no logarithm; it is drawn in
  the colour below the end of the scale. Cells that are NaN, and areas without a
  cell, are hatched.

  Args:
    panels: The ratios of each heat map, [rows, columns], by its title; NaN are
      unknown.
    labels: The title, and the labels of the x axis and of the y axis.
    columns: Number of heat maps side by side.
    size: Width and height of the figure in inches.
    borders: The borders of each heat map's columns on the x axis, by its title;
      columns without borders are centred on 0, 1, 2, ...

  Returns:
    The figure, the axes of the heat maps and those of the colour bar.
  """
  figure = Figure(figsize=size, layout='constrained')
  lines = -(-len(panels) // columns)
  all_axes = figure.subplots(lines, columns, squeeze=False).flatten()
  mesh: Any = None
  for axes, (title, ratios) in zip(all_axes, panels.items()):
    axes.patch.set(facecolor='white', hatch='////', edgecolor='0.75')
    floor = np.where(ratios > 0, RATIOS[0], RATIOS[0] / 2)
    y, x = (np.arange(n + 1) - 0.5 for n in ratios.shape)
    mesh = axes.pcolormesh(
      borders.get(title, x),
      y,
      np.where(np.isnan(ratios), ratios, np.maximum(ratios, floor)),
      cmap=RATIO_COLOURS,
      norm=LogNorm(*RATIOS),
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
  look: Any = {'extend': 'both', 'pad': 0.01, 'aspect': 6 * size[1]}
  bar = figure.colorbar(mesh, ax=axes, **look)
  bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=['¼', '½', '1', '2', '4'])
  bar.minorticks_off()
  return figure, axes, bar.ax


def label_axes(axes: Axes, title: str, unit: str, last: int) -> None:
  """Gives axes over steps from 0 to `last` a title, a unit and a grid."""
  axes.set_title(title, loc='left')
  axes.set(xlabel='step', ylabel=unit, xlim=(0, 1.03 * max(last, 1)))
  axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
  if axes.get_ylim()[1] >= 1000:
    axes.yaxis.set_major_formatter(StrMethodFormatter('{x:,.0f}'))
  axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
  axes.xaxis.set_major_formatter(StrMethodFormatter('{x:,.0f}'))
  axes.grid(alpha=0.25)
  axes.spines[['top', 'right']].set_visible(False)


def save(figure: Figure, path: pathlib.Path) -> None:
  """Writes a figure as PNG; a reader never finds an unfinished file."""
  unfinished = path.with_name(path.name + '.tmp')
  figure.savefig(unfinished, format='png', dpi=150)
  unfinished.replace(path)


def curves_figure(rows: Rows) -> Figure | None:
  """The figure of a run's losses and, below, of its other logged curves.

  Args:
    rows: Rows of metrics, each with its `step`.

  Returns:
    The figure; None if no row has a loss.
  """
  evals = _names(rows, r'eval/(.+)/loss')
  if not evals and not _names(rows, r'train/(loss)'):
    return None
  below = [x for x in _BELOW if any(f'train/{x[0]}' in row for row in rows)]
  names = [key for key, *_ in below]
  names += names[-1:] * (len(names) % 2)  # the last of an odd number is wide
  layout, lines = [['loss'] * 2, *zip(names[::2], names[1::2])], len(names) // 2
  figure = Figure(figsize=(_WIDTH, 3.6 + 1.75 * lines), layout='constrained')
  heights = [2.1] + [1.0] * lines
  axes = figure.subplot_mosaic(cast(Any, layout), height_ratios=heights)
  last = max(row['step'] for row in rows)
  _losses(axes['loss'], rows, evals)
  label_axes(axes['loss'], 'Loss', 'nats/token', last)
  for key, title, unit, scale in below:
    steps, values = _series(rows, f'train/{key}')
    axes[key].plot(steps, scale * values, **_thin(steps))
    highest = scale * max(values[np.isfinite(values)], default=0)
    axes[key].set_ylim(0, 1.08 * highest or 1)
    label_axes(axes[key], title, unit, last)
  return figure


def load_figure(rows: Rows) -> Figure | None:
  """The figure of each expert's load over steps, a panel for each sparse layer.

  The colour of a cell is the expert's share of all choices before any is
  dropped, divided by the uniform share 1/E. The text `HOW_TO_READ` explains
  the colours. Their scale is logarithmic, from 1/4 to 4.

  Args:
    rows: Rows of metrics, each with its `step`.

  Returns:
    The figure; None if no row has the load of a layer.
  """
  layers = sorted(map(int, _names(rows, r'train/layer_(\d+)/load')))
  if not layers:
    return None
  panels, borders = {}, {}
  for layer in layers:
    steps, load = _series(rows, f'train/layer_{layer}/load')
    spans = np.array_split(np.arange(len(steps)), min(len(steps), _MAX_COLUMNS))
    middles = np.array([steps[span].mean() for span in spans])
    means = np.array([load[span].mean(axis=0) for span in spans])
    panels[f'layer {layer}'] = load.shape[1] * means.T
    borders[f'layer {layer}'] = _borders(middles)
  columns = 1 + (len(layers) > 4)
  lines = -(-len(layers) // columns)
  title = 'Load: share of all choices that each expert gets, before drops'
  labels, size = (title, 'step', 'expert'), (_WIDTH, 0.9 + 1.7 * lines)
  figure, axes, bar = heat_maps(panels, labels, columns, size, borders)
  for one in axes:
    one.xaxis.set_major_formatter(StrMethodFormatter('{x:,.0f}'))
  bar.set_ylabel('share / uniform share')
  return figure


def smooth(values: Float[np.ndarray, 'n'], window: int) -> np.ndarray:
  """The running mean of values, in windows centred on each of them.

  Values that are not finite are left out; a window of such values alone gives
  NaN. At both ends the mean is over the part of the window that exists.

  Args:
    values: The values.
    window: Number of values in a window, odd and at most the number of values.
  """
  finite, ones = np.isfinite(values), np.ones(window)
  count = np.convolve(finite, ones, 'same')
  total = np.convolve(np.where(finite, values, 0), ones, 'same')
  undefined = np.full(len(values), np.nan)
  return np.divide(total, count, out=undefined, where=count > 0.5)


def _losses(axes: Axes, rows: Rows, evals: Sequence[str]) -> None:
  """Draws the losses of training, logged and smoothed, and of evaluations.

  The legend gives the last training loss as logged, which a run prints too.
  `rows` are rows of metrics, and `evals` the names of evaluations.
  """
  steps, losses = _series(rows, 'train/loss')
  visible_losses = []
  if losses.size:
    window = 2 * (len(losses) // 50) + 1
    smoothed, alpha = smooth(losses, window), 0.35 if window > 1 else 1
    label = _label('train', losses)
    style: dict[str, Any] = _thin(steps) | {'alpha': alpha, 'label': label}
    axes.plot(steps, losses, **style)
    if window > 1:
      label = f'train, mean of {window} rows'
      axes.plot(steps, smoothed, color=BLUE, label=label)
    visible_losses.append(smoothed[len(losses) // 20 :])
  for i, name in enumerate(evals):
    steps, losses = _series(rows, f'eval/{name}/loss')
    style = series(i + 1) | {'markevery': max(1, len(steps) // 30)}
    axes.plot(steps, losses, **style, label=_label(name, losses))
    visible_losses.append(losses[len(losses) // 20 :])
  # The losses of the first steps are left out of the axis's range, since they
  # would press all others into a flat line. Equal values are in its middle.
  values = np.concatenate(visible_losses)
  if (values := values[np.isfinite(values)]).size:
    low, high = values.min(), values.max()
    space = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - space, high + space)
  axes.legend(fontsize='small', edgecolor='none')


def _borders(middles: Float[np.ndarray, 'n']) -> np.ndarray:
  """The `n + 1` borders of n cells whose middles are given, ascending."""
  if len(middles) == 1:  # one cell reaches back to step 0
    return np.array([0.0, max(middles[0], 1)])
  inner = (middles[1:] + middles[:-1]) / 2
  first, last = 2 * middles[0] - inner[0], 2 * middles[-1] - inner[-1]
  return np.concatenate([[first], inner, [last]])


def _names(rows: Rows, pattern: str) -> list[str]:
  """The part of each metric's name that the group of a pattern matches.

  `rows` are rows of metrics by name. Names that the pattern does not match as a
  whole are left out.
  """
  keys = dict.fromkeys(key for row in rows for key in row)
  matches = (re.fullmatch(pattern, key) for key in keys)
  return [match[1] for match in matches if match]


def _series(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
  """The steps of the rows of metrics that have `key`, and its values there."""
  pairs = [(row['step'], row[key]) for row in rows if key in row]
  steps = np.array([step for step, _ in pairs], np.float64)
  return steps, np.array([value for _, value in pairs], np.float64)


def _label(name: str, values: Float[np.ndarray, 'n']) -> str:
  if len(name) > _MAX_LETTERS:
    name = f'{name[: _MAX_LETTERS - 1]}…'
  return f'{name} (last {values[-1]:.4f})'


def _thin(steps: Float[np.ndarray, 'n']) -> dict[str, Any]:
  """Arguments of `Axes.plot` for a thin line; few points are marked."""
  return {
    'color': BLUE,
    'linewidth': 0.9,
    'marker': '.' if len(steps) < 30 else '',
  }
