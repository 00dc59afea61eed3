"""The plane of two formants as gates and experts divide it, and epochs.

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
# The blend's line is dashed, so that experts' lines show below it.
BLEND = dict(colors='black', linestyles='--')
CAPTION = (
  'colour: the expert with the largest proportion, paler where it shares; '
  'lines: where an expert in use says 0.5, dashed: where the mixture does'
)
# Markers of the classes in turn; of pairs, those of the two targets.
MARKERS = ('o', 'x')


@dataclasses.dataclass(frozen=True)
class Life:
  """One run, from its start to where it stopped.

  Attributes:
    model: The system.
    params: A tree of [steps + 1, ...], its weights after every step.
    every: Number of epochs of a step.
  """

  model: AdaptiveMixture
  params: Any
  every: int

  def __len__(self) -> int:
    return len(jax.tree.leaves(self.params)[0])

  def at(self, step: int):
    """The weights after so many steps."""
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
  """Draws one moment: whose region is whose, and where it is decided.

  A colour is an expert: its region is where it has the largest proportion (the
  paler, the less it decides alone), its line where its own output is 0.5. The
  black, dashed line is the blend's. Experts that no training case is given to
  have no line.
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
  # 0 where all experts have the same proportion.
  share = (probs.max(-1) - 1 / E) / max(1 - 1 / E, 1e-6)
  image = hues[probs.argmax(-1)]
  image = 1 - 0.45 * share[..., None] * (1 - image)
  extent = (xs[0], xs[-1], ys[0], ys[-1])
  ax.imshow(image, origin='lower', extent=extent, aspect='auto')
  there = forward(model, params, problem.train.features)
  used = np.unique(np.asarray(there.gate_probs).argmax(-1))
  for i in used if outputs.prediction.shape[-1] == 1 else ():
    line = outputs.expert_outputs[:, :, i, 0]
    _contour(ax, xs, ys, line, colors=[COLORS[i % len(COLORS)]])
  _decision(ax, xs, ys, outputs.prediction)
  _points(ax, problem)


def _contour(ax: Axes, xs, ys, values, **options) -> None:
  """Draws where the values cross 0.5, if they do."""
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
    problem: What is learned, from two features.
    lives: Runs by name.
    moments: Parts of a life, from 0 to 1; () is the start and four later ones.
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
  """The runs side by side, with a frame for each step.

  `.to_jshtml()` shows it in a notebook, `.save('a.gif', writer='pillow')`
  keeps it. It has to be kept alive until then.
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
  """Draws epochs of every run and of every rate that was explored, and gates.

  Args:
    rows: The rows of the table by name, those of the systems among them.
    sweeps: The results of each system by rate; see `jacobs_rows.sweeps`.
    title: Title of the figure.
    path: Where it is written.
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
