"""Figures of 1991's systems: the experts' regions of the plane, and epochs."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.origins_1991.descent import forward
from experiments.origins_1991.mixture import Mixture
from experiments.origins_1991.vowels import CLASSES, Vowels
from experiments.study.parts import Result, Row
from experiments.study.tables import Interval

# Number of points of the plane's grid, each way.
GRID = 90
CAPTION = (
  'colour: the expert with the largest proportion, paler where it shares; '
  'lines: where an expert in use says 0.5, dashed: where the mixture does'
)
# Markers of the two targets.
MARKERS = ('o', 'x')


def draw(ax: Axes, vowels: Vowels, model: Mixture, params: Any) -> None:
  """Draws the experts' regions and decision lines of one set of weights.

  An expert's region, in its colour, is where it has the largest proportion; it
  is paler where the proportion is smaller. Its line is where its own output is
  0.5; experts that are the likeliest of no training case have none. The black,
  dashed line is where the mixture's output is 0.5.
  """
  low, high = vowels.features.min(0), vowels.features.max(0)
  margin = 0.08 * (high - low)
  xs, ys = np.linspace(low - margin, high + margin, GRID, dtype=np.float32).T
  grid = np.stack(np.meshgrid(xs, ys), axis=-1)  # [Y, X, 2]
  outputs = jax.tree.map(
    lambda leaf: np.asarray(leaf).reshape(GRID, GRID, *leaf.shape[1:]),
    forward(model, params, grid.reshape(-1, 2)),
  )
  probs, E = outputs.gate_probs, model.num_experts
  hues = np.array([colors.to_rgb(f'C{i % 10}') for i in range(E)])
  # The largest proportion, scaled from [1 / E, 1] to [0, 1].
  share = (probs.max(-1) - 1 / E) / max(1 - 1 / E, 1e-6)
  image = 1 - 0.45 * share[..., None] * (1 - hues[probs.argmax(-1)])
  extent = (xs[0], xs[-1], ys[0], ys[-1])
  ax.imshow(image, origin='lower', extent=extent, aspect='auto')
  of_cases = forward(model, params, vowels.features).gate_probs
  for i in np.unique(np.asarray(of_cases).argmax(-1)):
    _contour(ax, xs, ys, outputs.experts[:, :, i, 0], colors=[f'C{i % 10}'])
  # Dashes leave the experts' lines visible below.
  options = dict(colors='black', linestyles='--')
  _contour(ax, xs, ys, outputs.prediction[..., 0], **options)
  _points(ax, vowels)


def _contour(ax: Axes, xs, ys, values, **options) -> None:
  """Draws the line where the values cross 0.5, if there is one."""
  if values.min() < 0.5 < values.max():
    ax.contour(xs, ys, values, levels=[0.5], linewidths=1.6, **options)


def _points(ax: Axes, vowels: Vowels) -> None:
  for label, name in enumerate(CLASSES):
    x, y = vowels.features[vowels.labels == label].T
    marker = MARKERS[label % 2]
    size = 6 if marker == 'o' else 10
    ax.scatter(x, y, size, '0.25', marker, linewidths=0.6, alpha=0.6)
    ax.annotate(f'[{name}]', (x.mean(), y.mean()), fontsize=9, weight='bold')


def boundaries(
  vowels: Vowels, lives: Mapping[str, tuple[Mixture, Mapping[int, Any]]]
) -> Figure:
  """Draws a row for each run, and a column for each moment.

  Args:
    vowels: The training vowels.
    lives: The model of each run by name, and its weights by epoch.
  """
  count = max(len(life) for _, life in lives.values())
  size = (2.6 * count, 2.5 * len(lives) + 0.3)
  figure = Figure(figsize=size, layout='constrained')
  axes = figure.subplots(
    len(lives), count, sharex=True, sharey=True, squeeze=False
  )
  for row, (name, (model, life)) in zip(axes, lives.items(), strict=True):
    for ax, (epoch, params) in zip(row, life.items(), strict=True):
      draw(ax, vowels, model, params)
      ax.set_title(f'{name}, epoch {epoch:,}', fontsize=8)
      ax.tick_params(labelsize=7)
    row[0].set_ylabel('F2 (kHz)', fontsize=8)
  for ax in axes[-1]:
    ax.set_xlabel('F1 (kHz)', fontsize=8)
  figure.supxlabel(CAPTION, fontsize=8)
  return figure


def epochs(
  rows: Mapping[str, Row],
  sweeps: Mapping[str, Mapping[float, Sequence[Result]]],
  title: str,
  path: pathlib.Path,
) -> None:
  """Draws and writes the table's figure, of three panels.

  They are the epochs of every run, the mean epochs at every explored rate, and
  the information I(expert; case) of every run.

  Args:
    rows: Rows of the table, by name; those of all systems are needed.
    sweeps: Results of each system by learning rate; see `rows.sweeps`.
    title: Title of the figure.
    path: Path of the file.
  """
  figure = Figure(figsize=(14, 4.2), layout='constrained')
  runs, rates, special = figure.subplots(1, 3, width_ratios=(4, 4, 3))
  names = list(sweeps)
  for i, name in enumerate(names):
    _spread(runs, i, rows[name].values['epochs'])
    _spread(special, i, rows[name].values['I(expert; case)'])
    arrived = {
      rate: np.mean([run['epochs'] for run in swept])
      for rate, swept in sweeps[name].items()
      if all(run['reached'] for run in swept)
    }
    rates.plot(
      list(arrived),
      list(arrived.values()),
      marker='o',
      label=name,
      linestyle='--' if name.startswith('BP') else '-',
    )
  runs.set_yticks(range(len(names)), names)
  special.set_yticks(range(len(names)), [''] * len(names))
  for ax, label in ((runs, 'epochs'), (special, 'I(expert; case) (nats)')):
    ax.invert_yaxis()
    ax.set_xlabel(f'{label}, best rate; a dot a seed')
  rates.set_xscale('log', base=2)
  rates.set_xlabel('learning rate, where all explored seeds arrive')
  rates.set_ylabel('epochs')
  figure.legend(fontsize=7, loc='outside lower center', ncols=4)
  figure.suptitle(title, fontsize=10)
  figure.savefig(path, dpi=110)


def _spread(ax: Axes, y: int, values: Sequence[float]) -> None:
  mean = Interval.of(values)
  width = mean.half_width if np.isfinite(mean.half_width) else 0.0
  ax.plot(values, [y] * len(values), '.', color='0.7')
  ax.errorbar(mean.mean, y, xerr=width, marker='o', capsize=3)
