"""Heat maps of a trace: loads, pairs of experts, flows between layers.

The colour of a cell is what was counted over what chance gives, on a
logarithmic scale: `plot_style.HOW_TO_READ`. Hatched cells would hold fewer than
5 tokens by chance, too few to tell. Not here: lines over layers, places and
steps (`route_lines.py`), and loads over steps (`plots.py`).
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe_jax.analysis import plot_style, route_measures
from moe_jax.analysis.route_sums import RouteSums

_WIDTH = 10  # inches
_MIN_CHANCE = 5  # tokens, the fewest by chance that tell


def load_figure(sums: RouteSums) -> Figure:
  """The load of each expert over the mean of its layer, and percentiles."""
  loads = {n: layer.load for n, layer in sums.layers.items()}
  experts = max(len(load) for load in loads.values())
  values = np.full((len(loads), experts), math.nan)
  for row, load in zip(values, loads.values(), strict=True):
    row[: len(load)] = load / max(load.mean(), 1e-300)
  figure = Figure(figsize=(_WIDTH, 1.6 + 0.28 * len(loads)))
  figure.set_layout_engine('constrained')
  heat, lines = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
  mesh = _heat(heat, values)
  heat.set_title('Load of each expert / mean load of the layer', loc='left')
  heat.set_xlabel('expert')
  heat.set_yticks(range(len(loads)), labels=map(str, loads))
  heat.set_ylabel('layer')
  _colour_bar(figure, mesh, heat, 20)
  quantiles = [route_measures.load_percentiles(load) for load in loads.values()]
  y, at = np.arange(len(loads)), lambda p: [layer[p] for layer in quantiles]
  lines.barh(
    y,
    np.subtract(at(90), at(10)),
    left=at(10),
    color=plot_style.SKY,
    height=0.6,
    label='10 to 90 %',
  )
  lines.plot(
    at(50), y, '|', color=plot_style.BLUE, markersize=9, label='median'
  )
  lines.plot(
    at(100), y, 'o', color=plot_style.VERMILION, markersize=4, label='most'
  )
  lines.axvline(1, color='0.3', linewidth=0.8)
  lines.set_xlim(left=0)
  lines.set_title('Percentiles over experts', loc='left')
  lines.set_xlabel('load / mean')
  figure.legend(
    *lines.get_legend_handles_labels(),
    loc='outside lower right',
    ncols=3,
    frameon=False,
  )
  return figure


def co_activation_figure(
  sums: RouteSums, expected: Mapping[int, Float[np.ndarray, 'E E']]
) -> Figure:
  """Pairs of experts of one token over chance, a panel for each layer.

  Args:
    sums: The sums.
    expected: `route_measures.expected_pairs` of each layer with pairs.
  """
  panels = {}
  for number, chance in expected.items():
    pairs = sums.layers[number].pairs
    panels[f'layer {number}'] = _over_chance(pairs, chance)
  return _panels(
    panels, 'Tokens that chose both experts / chance', 'expert', 'expert'
  )


def transition_figure(sums: RouteSums) -> Figure:
  """Flows between consecutive sparse layers over chance, a panel for each."""
  panels = {
    f'layer {layer.previous} to {number}': _over_chance(
      layer.following, route_measures.independent(layer.following)
    )
    for number, layer in sums.layers.items()
    if layer.previous is not None and layer.following.any()
  }
  title = 'Tokens from an expert to an expert of the next layer / chance'
  return _panels(panels, title, 'expert in the next layer', 'expert')


def flow_figure(sums: RouteSums, sequence: str = '') -> Figure:
  """Flows of tokens between experts of consecutive layers.

  A dot is an expert, and its area the share of first choices that it takes in
  its layer. A line is a flow of tokens: its width is their number, and its
  colour how much they exceed chance. Between two layers those flows are drawn
  that exceed chance by the most tokens, as many as there are experts.

  Args:
    sums: The sums.
    sequence: The sequence whose layers are drawn.
  """
  layers = {n: s for n, s in sums.layers.items() if s.info.sequence == sequence}
  column_of = {number: i for i, number in enumerate(layers)}
  experts = max(layer.info.num_experts for layer in layers.values())
  height = 2 + min(0.11 * experts, 7)
  figure = Figure(figsize=(_WIDTH, height), layout='constrained')
  axes = figure.subplots()
  for number, layer in layers.items():
    share = layer.first / max(layer.first.sum(), 1)
    middle = _heights(layer.info.num_experts)
    axes.scatter(
      np.full(len(share), column_of[number]),
      middle,
      s=4 + 600 * share,
      color='0.25',
      linewidths=0,
      zorder=3,
    )
    if layer.previous in layers and layer.following.any():
      _draw_flows(axes, layer.following, column_of[number])
  axes.set_xticks(range(len(layers)), labels=map(str, layers))
  axes.set_xlabel('layer')
  ticks = np.unique(np.linspace(0, experts - 1, min(experts, 9)).astype(int))
  axes.set_yticks(_heights(experts)[ticks], labels=map(str, ticks))
  axes.set_ylabel('expert of the first choice')
  axes.set_ylim(1.02, -0.02)
  axes.spines[['top', 'right']].set_visible(False)
  axes.set_title(
    'Flows of tokens from layer to layer that exceed chance', loc='left'
  )
  mappable = ScalarMappable(LogNorm(1, 16), colormaps['viridis_r'])
  ticks = [1, 2, 4, 8, 16]
  bar = figure.colorbar(mappable, ax=axes, extend='both', pad=0.01, aspect=40)
  bar.set_ticks(ticks, labels=[*map(str, ticks)])
  bar.minorticks_off()
  bar.set_label('tokens / chance')
  return figure


def _draw_flows(
  axes: Axes, table: Int[np.ndarray, 'experts E'], right: int
) -> None:
  """Draws the flows into the layer in column `right` that exceed chance."""
  chance = route_measures.independent(table)
  largest = np.argsort((table - chance), axis=None)[-max(table.shape) :]
  a, b = np.unravel_index(largest, table.shape)
  exceeds = table[a, b] > chance[a, b]
  a, b = a[exceeds], b[exceeds]
  tail, head = (_heights(size) for size in table.shape)
  flows: Any = [[(right - 1, tail[i]), (right, head[j])] for i, j in zip(a, b)]
  lines = LineCollection(
    flows,
    linewidths=0.5 + 60 * table[a, b] / table.sum(),
    array=table[a, b] / chance[a, b],
    norm=LogNorm(1, 16),
    cmap='viridis_r',
    alpha=0.7,
    capstyle='round',
  )
  axes.add_collection(lines)


def _heights(num_experts: int) -> Float[np.ndarray, 'E']:
  return (np.arange(num_experts) + 0.5) / num_experts


def _panels(
  panels: Mapping[str, Float[np.ndarray, 'rows columns']],
  title: str,
  x_label: str,
  y_label: str,
) -> Figure:
  """Heat maps in a grid with one colour scale."""
  columns = min(4, len(panels))
  lines = math.ceil(len(panels) / columns)
  side = _WIDTH / 4 if columns > 2 else 4
  size = max(columns * side, 6.5), 1 + lines * (side * 0.95)
  figure = Figure(figsize=size, layout='constrained')
  grid = figure.subplots(lines, columns, squeeze=False)
  mesh: Any = None
  for i, (axes, (name, values)) in enumerate(zip(grid.flat, panels.items())):
    mesh = _heat(axes, values)
    axes.set_aspect('equal')
    axes.set_title(name, loc='left', fontsize='medium')
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    if i % columns == 0:
      axes.set_ylabel(y_label)
    if i + columns >= len(panels):
      axes.set_xlabel(x_label)
  for axes in grid.flat[len(panels) :]:
    axes.remove()
  figure.suptitle(title, fontsize='large')
  _colour_bar(figure, mesh, figure.axes, 15 * lines)
  return figure


def _heat(axes: Axes, values: Float[np.ndarray, 'rows columns']) -> QuadMesh:
  """Draws ratios as a heat map, with the first row at the top."""
  mesh = plot_style.heat(axes, np.arange(values.shape[1] + 1) - 0.5, values)
  axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
  return mesh


def _colour_bar(
  figure: Figure, mesh: QuadMesh, axes: Axes | list[Axes], aspect: int
) -> None:
  plot_style.ratio_bar(figure, mesh, axes, pad=0.01, aspect=aspect)


def _over_chance(
  counts: Int[np.ndarray, 'rows columns'],
  chance: Float[np.ndarray, 'rows columns'],
) -> Float[np.ndarray, 'rows columns']:
  """Counts over chance, NaN where chance is too little to tell."""
  undefined = np.full(chance.shape, math.nan)
  return np.divide(counts, chance, out=undefined, where=chance >= _MIN_CHANCE)
