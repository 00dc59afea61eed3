"""Figures of a run, drawn from its rows of metrics.

Figures are objects of matplotlib, never of pyplot, so that a hook may draw in
any thread, without a display, beside the figures that a notebook has open. Not
here: the rows (`moe_jax.runs.metrics`), and tables (`routing_report.py`).
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

Rows = Sequence[Mapping[str, Any]]

# Okabe and Ito's colours, which colour-blind readers tell apart too.
_TRAIN = '#0072B2'
_EVALS = ('#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
# With more columns than this, cells of a heat map are narrower than a pixel.
_MAX_COLUMNS = 400
_DPI = 150
_SCALE = (0.25, 4)  # ends of the colour scale, in shares of 1/E


def plot_curves(
  rows: Rows, path: str | os.PathLike[str], loss_unit: str = 'nats/token'
) -> None:
  """Saves `curves_figure`; the suffix of the path gives the format."""
  curves_figure(rows, loss_unit).savefig(path, dpi=_DPI)


def plot_load(rows: Rows, path: str | os.PathLike[str]) -> None:
  """Saves `load_figure`; the suffix of the path gives the format."""
  load_figure(rows).savefig(path, dpi=_DPI)


def curves_figure(rows: Rows, loss_unit: str = 'nats/token') -> Figure:
  """Losses over steps, above drop rate and learning rate where those exist.

  Args:
    rows: Rows of metrics, each with its `step`.
    loss_unit: Unit of the losses.

  Raises:
    ValueError: No row has a loss.
  """
  evals = _names(rows, r'eval/(.+)/loss')
  if not evals and not _names(rows, r'train/(loss)'):
    raise ValueError(
      f"no 'train/loss' and no 'eval/<name>/loss' in {len(rows)} rows; "
      f'have {sorted({key for row in rows for key in row})}'
    )
  below = [
    (key, title, unit, scale)
    for key, title, unit, scale in [
      ('train/drop_rate', 'Dropped choices of experts', 'percent', 100),
      ('train/learning_rate', 'Learning rate schedule', 'learning rate', 1),
    ]
    if any(key in row for row in rows)
  ]
  figure = Figure(figsize=(7.2, 5.2 if below else 3.6), layout='constrained')
  layout = [['loss'] * max(1, len(below))]
  if below:
    layout.append([key for key, *_ in below])
  axes = figure.subplot_mosaic(layout, height_ratios=[2.2, 1][: len(layout)])
  _draw_losses(axes['loss'], rows, evals)
  _label_axes(axes['loss'], 'Loss', loss_unit)
  for key, title, unit, scale in below:
    steps, values = _series(rows, key)
    axes[key].plot(steps, scale * values, **_thin(steps))
    highest = scale * max(values[np.isfinite(values)], default=0)
    axes[key].set_ylim(0, 1.08 * highest or 1)
    _label_axes(axes[key], title, unit)
  return figure


def load_figure(rows: Rows) -> Figure:
  """The load of each expert over steps, in a panel for each sparse layer.

  The colour of a cell is the expert's share of all choices before any is
  dropped, divided by the uniform share 1/E. White is the uniform share, red is
  more, blue is less, and black is nothing at all. The scale is logarithmic,
  from 1/4 to 4.

  Args:
    rows: Rows of metrics, each with its `step`.

  Raises:
    ValueError: No row has the load of a layer.
  """
  layers = sorted(map(int, _names(rows, r'train/layer_(\d+)/load')))
  if not layers:
    raise ValueError(
      f"no 'train/layer_<i>/load' in {len(rows)} rows; a dense model has none"
    )
  columns = 1 if len(layers) <= 4 else 2
  lines = -(-len(layers) // columns)
  figure = Figure(figsize=(7.2, 0.9 + 1.7 * lines), layout='constrained')
  panels = figure.subplots(lines, columns, sharex=True, squeeze=False)
  mesh = None
  for axes, layer in zip(panels.flat, layers):
    mesh = _draw_load(axes, *_series(rows, f'train/layer_{layer}/load'))
    axes.set_title(f'layer {layer}', loc='left', fontsize='medium')
    _count_steps(axes, 5 if columns == 1 else 3)
  for axes in panels.flat[len(layers) :]:
    axes.remove()
    # The panel above the gap is now the last one of its column.
    panels[-2, -1].tick_params(labelbottom=True)
  figure.supxlabel('step', fontsize='medium')
  figure.suptitle(
    'Load: share of all choices that each expert gets, before drops',
    fontsize='large',
  )
  bar = figure.colorbar(mesh, ax=figure.axes, extend='both', aspect=12 * lines)
  bar.set_label('share / uniform share')
  bar.set_ticks([0.25, 0.5, 1, 2, 4], labels=['¼', '½', '1', '2', '4'])
  bar.minorticks_off()
  return figure


def smooth(values: Float[np.ndarray, 'n'], window: int) -> np.ndarray:
  """The running mean of values, in windows centred on each of them.

  Values that are not finite are left out. At both ends the mean is over the
  part of the window that exists.

  Args:
    values: The values.
    window: Number of values in a window, which is odd.
  """
  half = window // 2
  result = np.empty(len(values))
  for i in range(len(values)):
    near = values[max(0, i - half) : i + half + 1]
    near = near[np.isfinite(near)]
    result[i] = near.mean() if near.size else np.nan
  return result


def _draw_losses(axes: Axes, rows: Rows, evals: Sequence[str]) -> None:
  """Draws the losses of training, raw and smoothed, and of evaluations."""
  steps, losses = _series(rows, 'train/loss')
  in_view = []
  if losses.size:
    smoothed = smooth(losses, 2 * (len(losses) // 50) + 1)
    axes.plot(steps, losses, **_thin(steps), alpha=0.25)
    axes.plot(steps, smoothed, color=_TRAIN, label=_label('train', smoothed))
    in_view.append(smoothed[len(losses) // 20 :])
  for i, name in enumerate(evals):
    steps, losses = _series(rows, f'eval/{name}/loss')
    axes.plot(
      steps,
      losses,
      color=_EVALS[i % len(_EVALS)],
      marker='o',
      markersize=3.5,
      label=_label(name, losses),
    )
    in_view.append(losses[len(losses) // 20 :])
  # The losses of the first steps would press all others into a flat line.
  values = np.concatenate(in_view)
  values = values[np.isfinite(values)]
  if values.size and values.min() < values.max():
    margin = 0.08 * (values.max() - values.min())
    axes.set_ylim(values.min() - margin, values.max() + margin)
  axes.legend(frameon=False, loc='upper right')


def _draw_load(
  axes: Axes, steps: Float[np.ndarray, 'n'], load: Float[np.ndarray, 'n E']
) -> QuadMesh:
  """Draws the panel of one layer; returns the mesh that a colour bar needs."""
  num_experts = load.shape[1]
  parts = np.array_split(np.arange(len(steps)), min(len(steps), _MAX_COLUMNS))
  middle = np.array([steps[part].mean() for part in parts])
  relative = np.array([num_experts * load[part].mean(axis=0) for part in parts])
  axes.set_facecolor('0.8')  # seen where nothing was measured
  # Black stands below the end of the scale, as the logarithm of 0 does not
  # exist; an expert that is merely rare stays dark blue.
  floor = np.where(relative > 0, _SCALE[0], _SCALE[0] / 2)
  mesh = axes.pcolormesh(
    _edges(middle),
    np.arange(num_experts + 1) - 0.5,
    np.maximum(relative, floor).T,
    cmap=colormaps['RdBu_r'].with_extremes(under='black'),
    norm=LogNorm(*_SCALE),
    rasterized=True,
  )
  axes.set_yticks(range(0, num_experts, max(1, num_experts // 4)))
  axes.set_ylim(num_experts - 0.5, -0.5)
  axes.set_ylabel('expert')
  return mesh


def _edges(middle: Float[np.ndarray, 'n']) -> np.ndarray:
  """The `n + 1` borders of cells with these ascending middles."""
  if len(middle) == 1:
    return np.array([middle[0] - 0.5, middle[0] + 0.5])
  inner = (middle[1:] + middle[:-1]) / 2
  first, last = 2 * middle[0] - inner[0], 2 * middle[-1] - inner[-1]
  return np.concatenate([[first], inner, [last]])


def _names(rows: Rows, pattern: str) -> list[str]:
  """The group of `pattern` in each key that it matches, in order of rows."""
  keys = dict.fromkeys(key for row in rows for key in row)
  matches = (re.fullmatch(pattern, key) for key in keys)
  return [match[1] for match in matches if match]


def _series(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
  """The steps of the rows that have a key, and its values."""
  pairs = [(row['step'], row[key]) for row in rows if key in row]
  steps = np.array([step for step, _ in pairs], np.float64)
  return steps, np.array([value for _, value in pairs], np.float64)


def _label(name: str, values: Float[np.ndarray, 'n']) -> str:
  return f'{name} (last {values[-1]:.3f})'


def _thin(steps: Float[np.ndarray, 'n']) -> dict[str, Any]:
  """The style of a line; its points are marked if there are only a few."""
  marker = '.' if len(steps) < 30 else ''
  return {'color': _TRAIN, 'linewidth': 0.9, 'marker': marker}


def _label_axes(axes: Axes, title: str, unit: str) -> None:
  axes.set_title(title, loc='left')
  axes.set_xlabel('step')
  axes.set_ylabel(unit)
  _count_steps(axes, 6)
  axes.grid(alpha=0.25)
  axes.spines[['top', 'right']].set_visible(False)


def _count_steps(axes: Axes, at_most: int) -> None:
  axes.xaxis.set_major_locator(MaxNLocator(at_most, integer=True))
  axes.xaxis.set_major_formatter(StrMethodFormatter('{x:,.0f}'))
