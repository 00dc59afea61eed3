"""Figures of 1991's systems: the experts' regions of the plane, and epochs.

    figure = boundaries(problem, {'competitive': Life(model, params, 50)})
    animation(problem, lives).to_jshtml()  # in a notebook

Not here: the runs that are drawn (`jacobs_runs.path`).
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from matplotlib import animation as mpl_animation
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.origins_1991.jacobs_problems import Cases, Problem
from experiments.origins_1991.jacobs_runs import forward
from experiments.study.parts import Result, Row
from experiments.study.tables import Interval
from moe_jax.models.adaptive import AdaptiveMixture

# Number of points of the plane's grid, each way.
GRID = 90
COLORS = [f'C{i}' for i in range(10)]
# The mixture's line is dashed, so that experts' lines stay visible below it.
BLEND = dict(colors='black', linestyles='--')
CAPTION = (
  'colour: the expert with the largest proportion, paler where it shares; '
  'lines: where an expert in use says 0.5, dashed: where the mixture does'
)
# Markers of the classes in turn; with targets 'pairs', of the two targets.
MARKERS = ('o', 'x')


@dataclasses.dataclass(frozen=True)
class Life:
  """The weights of one run over time, from its start to where it stopped.

  Attributes:
    model: The system that was trained.
    params: Weights at the start and after every step, a tree of
      [steps + 1, ...].
    every: Number of epochs of a step.
  """

  model: AdaptiveMixture
  params: Any
  every: int

  def __len__(self) -> int:
    return len(jax.tree.leaves(self.params)[0])

  def at(self, step: int):
    """The weights after a number of steps."""
    return jax.tree.map(lambda leaf: leaf[step], self.params)


def plane(cases: Cases) -> tuple[np.ndarray, np.ndarray]:
  """The two axes of a grid around all cases."""
  low, high = cases.features.min(0), cases.features.max(0)
  margin = 0.08 * (high - low)
  return tuple(
    np.linspace(a, b, GRID, dtype=np.float32)
    for a, b in zip(low - margin, high + margin, strict=True)
  )


def draw(ax: Axes, problem: Problem, life: Life, step: int) -> None:
  """Draws the experts' regions and decision lines at one step of a run.

  An expert's region, in its colour, is where it has the largest proportion; it
  is paler where the proportion is smaller. Its line is where its own output is
  0.5; experts that are the likeliest of no training case have none. The black,
  dashed line is where the mixture's output is 0.5.
  """
  model, params = life.model, life.at(step)
  xs, ys = plane(problem.train)
  grid = np.stack(np.meshgrid(xs, ys), axis=-1)  # [Y, X, 2]
  outputs = jax.tree.map(
    lambda leaf: np.asarray(leaf).reshape(GRID, GRID, *leaf.shape[1:]),
    forward(model, params, grid.reshape(-1, 2)),
  )
  probs = outputs.gate_probs
  E = probs.shape[-1]
  hues = np.array([colors.to_rgb(COLORS[i % len(COLORS)]) for i in range(E)])
  # The largest proportion, scaled from [1 / E, 1] to [0, 1].
  share = (probs.max(-1) - 1 / E) / max(1 - 1 / E, 1e-6)
  image = hues[probs.argmax(-1)]
  image = 1 - 0.45 * share[..., None] * (1 - image)
  extent = (xs[0], xs[-1], ys[0], ys[-1])
  ax.imshow(image, origin='lower', extent=extent, aspect='auto')
  forward_pass = forward(model, params, problem.train.features)
  used = np.unique(np.asarray(forward_pass.gate_probs).argmax(-1))
  for i in used if outputs.prediction.shape[-1] == 1 else ():
    line = outputs.expert_outputs[:, :, i, 0]
    _contour(ax, xs, ys, line, colors=[COLORS[i % len(COLORS)]])
  _decision(ax, xs, ys, outputs.prediction)
  _points(ax, problem)


def _contour(ax: Axes, xs, ys, values, **options) -> None:
  """Draws the line where the values cross 0.5, if there is one."""
  if values.min() < 0.5 < values.max():
    ax.contour(xs, ys, values, levels=[0.5], linewidths=1.6, **options)


def _decision(ax: Axes, xs, ys, prediction) -> None:
  if prediction.shape[-1] == 1:
    _contour(ax, xs, ys, prediction[..., 0], **BLEND)
    return
  answer = prediction.argmax(-1)
  for kind in np.unique(answer):
    _contour(ax, xs, ys, (answer == kind).astype(float), **BLEND)


def _points(ax: Axes, problem: Problem) -> None:
  cases = problem.train
  for label, name in enumerate(problem.classes):
    x, y = cases.features[cases.labels == label].T
    marker = MARKERS[label % len(MARKERS)]
    size = 6 if marker == 'o' else 10
    ax.scatter(x, y, size, '0.25', marker, linewidths=0.6, alpha=0.6)
    ax.annotate(f'[{name}]', (x.mean(), y.mean()), fontsize=9, weight='bold')


def boundaries(
  problem: Problem, lives: Mapping[str, Life], moments: Sequence[float] = ()
) -> Figure:
  """Draws a row for each run, and a column for each moment.

  Args:
    problem: The learned problem, which has two features.
    lives: Weights of runs over time, by name.
    moments: Points in time as fractions of a run's length, from 0 to 1; ()
      takes the start and four later ones.
  """
  moments = moments or (0.0, 0.1, 0.25, 0.5, 1.0)
  size = (2.6 * len(moments), 2.5 * len(lives) + 0.3)
  figure = Figure(figsize=size, layout='constrained')
  axes = figure.subplots(
    len(lives), len(moments), sharex=True, sharey=True, squeeze=False
  )
  for row, (name, life) in zip(axes, lives.items(), strict=True):
    for ax, moment in zip(row, moments, strict=True):
      step = round(moment * (len(life) - 1))
      draw(ax, problem, life, step)
      ax.set_title(f'{name}, epoch {step * life.every:,}', fontsize=8)
      ax.tick_params(labelsize=7)
    row[0].set_ylabel('F2 (kHz)', fontsize=8)
  for ax in axes[-1]:
    ax.set_xlabel('F1 (kHz)', fontsize=8)
  figure.supxlabel(CAPTION, fontsize=8)
  return figure


def animation(
  problem: Problem, lives: Mapping[str, Life], milliseconds: int = 200
) -> mpl_animation.FuncAnimation:
  """An animation of the runs side by side, with a frame for each step.

  `.to_jshtml()` shows it in a notebook, and `.save('a.gif', writer='pillow')`
  writes a file. Keep a reference to it until then.
  """
  figure = Figure(figsize=(3 * len(lives), 3), layout='constrained')
  axes = figure.subplots(1, len(lives), sharey=True, squeeze=False)[0]

  def frame(step: int):
    for ax, (name, life) in zip(axes, lives.items(), strict=True):
      ax.clear()
      at = min(step, len(life) - 1)
      draw(ax, problem, life, at)
      ax.set_title(f'{name}, epoch {at * life.every:,}', fontsize=9)
    return []

  return mpl_animation.FuncAnimation(
    figure,
    frame,
    frames=max(map(len, lives.values())),
    init_func=lambda: [],  # else the first frame is drawn twice
    interval=milliseconds,
  )


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
    sweeps: Results of each system by learning rate; see `jacobs_rows.sweeps`.
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
