"""Figures of a run, drawn from its rows of metrics.

Figures are made with matplotlib's objects, never with pyplot, so that a hook
may draw in any thread, without a display, and leaves a notebook's open figures
alone.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from moe_jax.analysis import plot_style

Rows = Sequence[Mapping[str, Any]]

# Curves below the losses: keys of `train/`, title, unit and factor.
_BELOW = (
  ('drop_rate', 'Dropped choices of experts', 'percent', 100.0),
  ('learning_rate', 'Learning rate schedule', 'learning rate', 1.0),
  ('tokens_per_second', 'Speed', 'tokens/s', 1.0),
)
# With more columns than this, cells of a heat map are narrower than a pixel.
_MAX_COLUMNS = 400
_RASTER_POINTS = 2000  # points, above which a line is drawn as a bitmap
_WIDTH = 7.2  # inches
_MAX_LETTERS = 26  # letters of a name in a legend


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
  lines = len(names) // 2
  layout = [['loss'] * 2, *(names[2 * i : 2 * i + 2] for i in range(lines))]
  figure = Figure(figsize=(_WIDTH, 3.6 + 1.75 * lines), layout='constrained')
  heights = [2.1] + [1.0] * lines
  axes = figure.subplot_mosaic(cast(Any, layout), height_ratios=heights)
  last = max(row['step'] for row in rows)
  _losses(axes['loss'], rows, evals)
  plot_style.label_axes(axes['loss'], 'Loss', 'nats/token', last)
  for key, title, unit, scale in below:
    steps, values = _series(rows, f'train/{key}')
    axes[key].plot(steps, scale * values, **_thin(steps))
    highest = scale * max(values[np.isfinite(values)], default=0)
    axes[key].set_ylim(0, 1.08 * highest or 1)
    plot_style.label_axes(axes[key], title, unit, last)
  return figure


def load_figure(rows: Rows) -> Figure | None:
  """The figure of each expert's load over steps, a panel for each sparse layer.

  The colour of a cell is the expert's share of all choices before any is
  dropped, divided by the uniform share 1/E: `plot_style.HOW_TO_READ`. The scale
  is logarithmic, from 1/4 to 4.

  Args:
    rows: Rows of metrics, each with its `step`.

  Returns:
    The figure; None if no row has the load of a layer.
  """
  layers = sorted(map(int, _names(rows, r'train/layer_(\d+)/load')))
  if not layers:
    return None
  panels = {}
  for layer in layers:
    steps, load = _series(rows, f'train/layer_{layer}/load')
    spans = np.array_split(np.arange(len(steps)), min(len(steps), _MAX_COLUMNS))
    edges = _edges(np.array([steps[span].mean() for span in spans]))
    means = np.array([load[span].mean(axis=0) for span in spans])
    panels[f'layer {layer}'] = edges, load.shape[1] * means.T
  columns = 1 + (len(layers) > 4)
  lines = -(-len(layers) // columns)
  title = 'Load: share of all choices that each expert gets, before drops'
  size = _WIDTH, 0.9 + 1.7 * lines
  figure, axes, bar = plot_style.heat_maps(
    panels, (title, 'step', 'expert'), columns, size, 12 * lines
  )
  for one in axes:
    one.xaxis.set_major_formatter(StrMethodFormatter('{x:,.0f}'))
  bar.set_ylabel('share / uniform share')
  return figure


def smooth(values: Float[np.ndarray, 'n'], window: int) -> np.ndarray:
  """The running mean of values, in windows centred on each of them.

  Values that are not finite are left out. At both ends the mean is over the
  part of the window that exists.

  Args:
    values: The values.
    window: Number of values in a window, odd and not more than there are.
  """
  finite, ones = np.isfinite(values), np.ones(window)
  count = np.convolve(finite, ones, 'same')
  total = np.convolve(np.where(finite, values, 0), ones, 'same')
  undefined = np.full(len(values), np.nan)
  return np.divide(total, count, out=undefined, where=count > 0.5)


def _losses(axes: Axes, rows: Rows, evals: Sequence[str]) -> None:
  """Draws the losses of training, logged and smoothed, and of evaluations.

  The legend gives the last training loss as logged, which a run prints too.
  """
  steps, losses = _series(rows, 'train/loss')
  visible_losses = []
  if losses.size:
    window = 2 * (len(losses) // 50) + 1
    smoothed = smooth(losses, window)
    style: dict[str, Any] = _thin(steps) | {'alpha': 0.35 if window > 1 else 1}
    label = _label('train', losses)
    axes.plot(steps, losses, **style, label=label)
    if window > 1:
      label = f'train, mean of {window} rows'
      axes.plot(steps, smoothed, color=plot_style.BLUE, label=label)
    visible_losses.append(smoothed[len(losses) // 20 :])
  for i, name in enumerate(evals):
    steps, losses = _series(rows, f'eval/{name}/loss')
    label = _label(name, losses)
    style = plot_style.series(i + 1) | {'markevery': max(1, len(steps) // 30)}
    axes.plot(steps, losses, **style, label=label)
    visible_losses.append(losses[len(losses) // 20 :])
  # The losses of the first steps would press all others into a flat line.
  plot_style.room_around(axes, np.concatenate(visible_losses))
  last_losses = [values[-1] for values in visible_losses if values.size]
  falls = max(last_losses, default=0) <= np.mean(axes.get_ylim())
  legend_place = 'upper right' if falls else 'lower right'
  axes.legend(loc=legend_place, fontsize='small', edgecolor='none')


def _edges(middles: Float[np.ndarray, 'n']) -> np.ndarray:
  """The `n + 1` borders of n cells whose middles are given, ascending."""
  if len(middles) == 1:  # one cell reaches back to step 0
    return np.array([0.0, max(middles[0], 1)])
  inner = (middles[1:] + middles[:-1]) / 2
  first, last = 2 * middles[0] - inner[0], 2 * middles[-1] - inner[-1]
  return np.concatenate([[first], inner, [last]])


def _names(rows: Rows, pattern: str) -> list[str]:
  """The text of the group of `pattern` in each key of rows that matches it."""
  keys = dict.fromkeys(key for row in rows for key in row)
  matches = (re.fullmatch(pattern, key) for key in keys)
  return [match[1] for match in matches if match]


def _series(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
  """The steps of the rows that have a key, and the values of the key."""
  pairs = [(row['step'], row[key]) for row in rows if key in row]
  steps = np.array([step for step, _ in pairs], np.float64)
  return steps, np.array([value for _, value in pairs], np.float64)


def _label(name: str, values: Float[np.ndarray, 'n']) -> str:
  if len(name) > _MAX_LETTERS:
    name = f'{name[: _MAX_LETTERS - 1]}…'
  return f'{name} (last {values[-1]:.4f})'


def _thin(steps: Float[np.ndarray, 'n']) -> dict[str, Any]:
  """The style of a line; its points are marked if there are only a few."""
  return {
    'color': plot_style.BLUE,
    'linewidth': 0.9,
    'marker': '.' if len(steps) < 30 else '',
    'rasterized': len(steps) > _RASTER_POINTS,
  }
