"""Figures of a run, drawn from its rows of metrics.

Figures are objects of matplotlib, never of pyplot, so that a hook may draw in
any thread, without a display, beside the figures that a notebook has open.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from moe_jax.analysis import plot_style
from moe_jax.errors import InputError

Rows = Sequence[Mapping[str, Any]]

# With more columns than this, cells of a heat map are narrower than a pixel.
_MAX_COLUMNS = 400
_RASTER_POINTS = 2000  # points, above which a line is drawn as a bitmap
_WIDTH = 7.2  # inches
_FEW_ROWS = 500  # rows beside which the best place of a legend is found fast
_MAX_NAMED = 7  # evaluations that fit into the legend of a small panel
_MAX_LETTERS = 26  # letters of a name in a legend


class Panel(NamedTuple):
  """One set of axes of a run's curves.

  Attributes:
    name: A short name.
    title: One line.
    draw: Function that draws it.
  """

  name: str
  title: str
  draw: Callable[[Axes], None]


def panels(rows: Rows) -> list[Panel]:
  """The curves of a run: losses, and the other curves that rows have.

  Args:
    rows: Rows of metrics, each with its `step`.

  Raises:
    ValueError: No row has a loss.
  """
  evals = _names(rows, r'eval/(.+)/loss')
  if not evals and not _names(rows, r'train/(loss)'):
    raise InputError(
      f"no 'train/loss' and no 'eval/<name>/loss' in {len(rows)} rows; "
      f'have {sorted({key for row in rows for key in row})}'
    )
  curves = [Panel('loss', 'Loss', lambda axes: _losses(axes, rows, evals))]
  if len(evals) > 1:
    title = f'Evaluations less {_short(evals[0])}'
    curves.append(
      Panel('evaluations', title, lambda axes: _differences(axes, rows, evals))
    )
  units = {'loss': 'nats/token', 'evaluations': 'nats/token'}
  for key, title, unit, scale in [
    ('drop_rate', 'Dropped choices of experts', 'percent', 100.0),
    ('learning_rate', 'Learning rate schedule', 'learning rate', 1.0),
    ('tokens_per_second', 'Speed', 'tokens/s', 1.0),
  ]:
    if any(f'train/{key}' in row for row in rows):
      units[key] = unit
      draw = _line_of(rows, f'train/{key}', scale)
      curves.append(Panel(key, title, draw))
  return [_labelled(panel, units[panel.name], rows) for panel in curves]


def curves_figure(rows: Rows) -> Figure:
  """All `panels` in one figure, the losses on top, with the same errors."""
  first, *below = panels(rows)
  names = [panel.name for panel in below]
  names += names[-1:] * (len(names) % 2)  # the last of an odd number is wide
  lines = len(names) // 2
  layout = [[first.name] * 2, *(names[2 * i : 2 * i + 2] for i in range(lines))]
  figure = Figure(figsize=(_WIDTH, 3.6 + 1.75 * lines), layout='constrained')
  heights = [2.1] + [1.0] * lines
  axes = figure.subplot_mosaic(cast(Any, layout), height_ratios=heights)
  for panel in [first, *below]:
    panel.draw(axes[panel.name])
  return figure


def load_figure(rows: Rows) -> Figure:
  """The load of each expert over steps, in a panel for each sparse layer.

  The colour of a cell is the expert's share of all choices before any is
  dropped, divided by the uniform share 1/E: `plot_style.HOW_TO_READ`. The scale
  is logarithmic, from 1/4 to 4.

  Args:
    rows: Rows of metrics, each with its `step`.

  Raises:
    ValueError: No row has the load of a layer.
  """
  layers = sorted(map(int, _names(rows, r'train/layer_(\d+)/load')))
  if not layers:
    problem = f"no 'train/layer_<i>/load' in {len(rows)} rows"
    raise InputError(f'{problem}; a dense model has none')
  columns = 1 + (len(layers) > 4)
  lines = -(-len(layers) // columns)
  figure = Figure(figsize=(_WIDTH, 0.9 + 1.7 * lines), layout='constrained')
  grid = figure.subplots(lines, columns, sharex=True, squeeze=False)
  mesh: Any = None
  for axes, layer in zip(grid.flat, layers):
    mesh = _draw_load(axes, *_series(rows, f'train/layer_{layer}/load'))
    axes.set_title(f'layer {layer}', loc='left', fontsize='medium')
    plot_style.count_steps(axes, 5 if columns == 1 else 3)
  for axes in grid.flat[len(layers) :]:
    axes.remove()
    # The panel above the gap is now the last one of its column.
    grid[-2, -1].tick_params(labelbottom=True)
  figure.supxlabel('step', fontsize='medium')
  title = 'Load: share of all choices that each expert gets'
  figure.suptitle(f'{title}, before drops', fontsize='large')
  bar = plot_style.ratio_bar(figure, mesh, figure.axes, aspect=12 * lines)
  bar.set_ylabel('share / uniform share')
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
  means = np.empty(len(values))
  for i in range(len(values)):
    nearby = values[max(0, i - half) : i + half + 1]
    nearby = nearby[np.isfinite(nearby)]
    means[i] = nearby.mean() if nearby.size else np.nan
  return means


def _labelled(panel: Panel, unit: str, rows: Rows) -> Panel:
  """A panel whose axes have title, unit and steps."""
  last = max((row['step'] for row in rows), default=0)

  def draw(axes: Axes) -> None:
    panel.draw(axes)
    plot_style.label_axes(axes, panel.title, unit)
    plot_style.from_step_0(axes, last)

  return panel._replace(draw=draw)


def _losses(axes: Axes, rows: Rows, evals: Sequence[str]) -> None:
  """Draws the losses of training, as logged and smoothed, and evaluations.

  The last loss in the legend is the logged one, which a run prints too.
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
    axes.plot(steps, losses, **_marked(i, steps), label=label)
    visible_losses.append(losses[len(losses) // 20 :])
  # The losses of the first steps would press all others into a flat line.
  plot_style.room_around(axes, np.concatenate(visible_losses))
  last_losses = [values[-1] for values in visible_losses if values.size]
  falls = max(last_losses, default=0) <= np.mean(axes.get_ylim())
  legend_place = 'upper right' if falls else 'lower right'
  legend_place = 'best' if len(rows) < _FEW_ROWS else legend_place
  axes.legend(loc=legend_place, fontsize='small', edgecolor='none')


def _differences(axes: Axes, rows: Rows, evals: Sequence[str]) -> None:
  """Draws evaluations less the first of them, where they would coincide."""
  first = dict(zip(*_series(rows, f'eval/{evals[0]}/loss')))
  axes.axhline(0, color=plot_style.series(1)['color'], linewidth=1)
  drawn_values = [np.zeros(1)]
  for i, name in enumerate(evals[1:], 1):
    steps, losses = _series(rows, f'eval/{name}/loss')
    is_shared = np.isin(steps, list(first))
    steps = steps[is_shared]
    differences = losses[is_shared] - np.array([first[step] for step in steps])
    axes.plot(steps, differences, **_marked(i, steps), label=_short(name))
    drawn_values.append(differences[len(differences) // 20 :])
  plot_style.room_around(axes, np.concatenate(drawn_values), 0.15)
  if len(evals) <= _MAX_NAMED:  # the panel of losses names all
    low, high = axes.get_ylim()
    axes.set_ylim(top=high + 0.17 * (high - low) * (len(evals) // 2))
    style = {'fontsize': 'x-small', 'edgecolor': 'none'}
    axes.legend(loc='upper right', ncols=2, **style)


def _line_of(rows: Rows, key: str, scale: float) -> Callable[[Axes], None]:
  """A function that draws one line, which is never negative, above zero."""
  steps, values = _series(rows, key)

  def draw(axes: Axes) -> None:
    axes.plot(steps, scale * values, **_thin(steps))
    highest = scale * max(values[np.isfinite(values)], default=0)
    axes.set_ylim(0, 1.08 * highest or 1)

  return draw


def _marked(number: int, steps: Float[np.ndarray, 'n']) -> dict[str, Any]:
  """The style of evaluation `number`; training has the first style."""
  marker_spacing = {'markevery': max(1, len(steps) // 30)}
  return plot_style.series(number + 1) | marker_spacing


def _draw_load(
  axes: Axes, steps: Float[np.ndarray, 'n'], load: Float[np.ndarray, 'n E']
) -> QuadMesh:
  """Draws the panel of one layer; returns the mesh that a colour bar needs."""
  num_experts = load.shape[1]
  spans = np.array_split(np.arange(len(steps)), min(len(steps), _MAX_COLUMNS))
  middles = np.array([steps[span].mean() for span in spans])
  relative = np.array([num_experts * load[span].mean(axis=0) for span in spans])
  mesh = plot_style.heat(axes, _edges(middles), relative.T)
  axes.set_yticks(range(0, num_experts, max(1, num_experts // 4)))
  axes.set_ylabel('expert')
  return mesh


def _edges(middles: Float[np.ndarray, 'n']) -> np.ndarray:
  """The `n + 1` borders of cells with these ascending middles."""
  if len(middles) == 1:  # a row is about all steps until its own
    return np.array([0.0, max(middles[0], 1)])
  inner = (middles[1:] + middles[:-1]) / 2
  first, last = 2 * middles[0] - inner[0], 2 * middles[-1] - inner[-1]
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
  return f'{_short(name)} (last {values[-1]:.4f})'


def _short(name: str) -> str:
  return name if len(name) <= _MAX_LETTERS else f'{name[: _MAX_LETTERS - 1]}…'


def _thin(steps: Float[np.ndarray, 'n']) -> dict[str, Any]:
  """The style of a line; its points are marked if there are only a few."""
  return {
    'color': plot_style.BLUE,
    'linewidth': 0.9,
    'marker': '.' if len(steps) < 30 else '',
    'rasterized': len(steps) > _RASTER_POINTS,
  }
