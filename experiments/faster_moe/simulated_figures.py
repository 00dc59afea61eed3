"""Figures of simulated training steps; every title says SIMULATED."""

import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.faster_moe import simulate
from experiments.faster_moe.clusters import Cluster
from experiments.faster_moe.simulate import ARMS, SYNCHRONOUS
from experiments.faster_moe.simulated_tables import Case, published
from moe_jax.parallel import cost_model
from moe_jax.parallel.cost_model import Sizes

_COLORS = {name: f'C{i}' for i, name in enumerate(ARMS)}
_COLORS[SYNCHRONOUS] = 'black'
_MARKERS = dict(zip(ARMS, 'os^vD<>P', strict=True))


def speed_ups(cases: Sequence[Case], path: pathlib.Path) -> None:
  """Draws the speed-up of every arm, a panel for each case.

  A bar is the speed-up over all layers and steps, a dot that of the best one,
  and a black line the paper's.
  """
  sources = list(dict.fromkeys(case.source for case in cases))
  names = list(dict.fromkeys(case.cluster.name for case in cases))
  shape = len(sources), len(names)
  figure = Figure(
    figsize=(2.5 + 3.0 * shape[1], 1.0 + 2.2 * shape[0]), layout='constrained'
  )
  axes = figure.subplots(*shape, squeeze=False, sharex='col')
  for ax in axes.flat:
    ax.set_visible(False)
  for case in cases:
    column = names.index(case.cluster.name)
    ax = axes[sources.index(case.source), column]
    ax.set_visible(True)
    _bars(ax, case, labelled=column == 0)
  figure.supxlabel(
    'SIMULATED speed-up over synchronous: bar, all layers and steps;\n'
    'dot, the best; black line, the paper (whole iterations, measured)',
    fontsize=8,
  )
  figure.savefig(path, dpi=110)


def _bars(ax: Axes, case: Case, *, labelled: bool) -> None:
  base, names = case.arms[SYNCHRONOUS], list(ARMS)[1:]
  for y, name in enumerate(names):
    if name not in case.arms:
      continue
    total, best = simulate.speed_up(base, case.arms[name])
    ax.barh(y, total, color=_COLORS[name], alpha=0.7)
    ax.plot(best, y, 'o', color=_COLORS[name], ms=4)
    if cell := published(case.cluster, name):
      ax.plot([cell.value] * 2, [y - 0.45, y + 0.45], 'k-', lw=2)
  ax.axvline(1, color='gray', lw=0.8, ls=':')
  ax.set_yticks(range(len(names)), names if labelled else [], fontsize=7)
  ax.tick_params('x', labelsize=7)
  ax.set_ylim(len(names) - 0.5, -0.5)
  ax.set_title(f'SIMULATED: {case.source} on {case.cluster.name}', fontsize=8)


def roofline(cases: Sequence[Case], path: pathlib.Path) -> None:
  """Draws Figure 4 of FasterMoE, the roofline of a layer, for each machine.

  Crosses are synchronous layers whose devices have equally many rows, with an
  eighth to 64 times the hidden width: they lie on the semi-ideal curve. Other
  points are those of each machine's first case.

  Args:
    cases: The cases.
    path: File of the picture.
  """
  first = {case.cluster.name: case for case in reversed(cases)}
  shown = [case for case in cases if first[case.cluster.name] is case]
  figure = Figure(figsize=(1 + 4.2 * len(shown), 4.8), layout='constrained')
  axes = figure.subplots(1, len(shown), squeeze=False)[0]
  handles = {}
  for ax, case in zip(axes, shown, strict=True):
    _curves(ax, case.cluster, case.sizes)
    for name, arm in case.arms.items():
      style = dict(color=_COLORS[name], ms=3, alpha=0.4, label=name)
      ax.plot(arm.ratio, arm.flops / 1e12, _MARKERS[name], **style)
    ax.set_xscale('log')
    ax.set_yscale('log')
    ax.set_xlabel('R_CC, computation over communication', fontsize=8)
    ax.set_title(
      f'SIMULATED: {case.source} on {case.cluster.name}, M={case.sizes.M:,}, '
      f'F={case.sizes.F:,}',
      fontsize=8,
    )
    ax_handles, labels = ax.get_legend_handles_labels()
    handles |= dict(zip(labels, ax_handles, strict=True))
  axes[0].set_ylabel('SIMULATED TFLOP/s of a device', fontsize=8)
  figure.legend(
    handles.values(),
    handles,
    loc='outside lower center',
    ncols=1 + len(shown),
    fontsize=7,
  )
  figure.savefig(path, dpi=110)


def _curves(ax: Axes, cluster: Cluster, sizes: Sizes) -> None:
  peak = cluster.topology.flops_per_second
  x, y = simulate.even_points(cluster, sizes)
  line = np.geomspace(x.min() / 2, max(x.max(), 8), 200)
  for curve, style in (
    (cost_model.ideal, 'k-'),
    (cost_model.semi_ideal, 'k--'),
  ):
    name = curve.__name__.replace('_', '-')
    ax.plot(line, curve(peak, line) / 1e12, style, lw=1, label=name)
  ax.plot(x, y / 1e12, 'kx', ms=5, label='synchronous, even rows, F/8 to 64 F')
