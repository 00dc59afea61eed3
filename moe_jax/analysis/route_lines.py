"""Lines of a trace over layers, places in the row, and steps.

Not here: heat maps (`route_plots.py`), and the numbers (`route_findings.py`).
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from moe_jax.analysis import plot_style, route_findings
from moe_jax.analysis.route_churn import Change, Churn
from moe_jax.analysis.route_measures import Information, entropy
from moe_jax.analysis.route_sums import RouteSums

_SIZE = (10, 3.6)  # inches


def information_figure(
  by_label: Mapping[str, Mapping[int, Information]],
) -> Figure:
  """The picture of the information of labels on experts, and of best guesses.

  Args:
    by_label: The information by label and layer, as
      `route_findings.specialisation` returns it.
  """
  figure, (shares, guesses) = _pair()
  first = next(iter(by_label.values()))  # ids of tokens, known in every layer
  x_of_layer = {number: i for i, number in enumerate(first)}
  for i, (name, layers) in enumerate(by_label.items()):
    x = [x_of_layer[number] for number in layers]
    style: dict[str, Any] = plot_style.series(i)
    infos = list(layers.values())
    share = [info.adjusted for info in infos]
    error = [_fraction(info.deviation, info.entropy) for info in infos]
    shares.errorbar(x, share, error, **style, label=name)
    accuracy = [info.accuracy for info in infos]
    guesses.plot(x, accuracy, **style, label=name)
    shuffled = [info.accuracy_shuffled for info in infos]
    guesses.plot(x, shuffled, ':', color=style['color'], linewidth=1)
  base = [info.base_rate for info in first.values()]
  guesses.plot(
    range(len(base)), base, color='0.5', linestyle='--', label='base rate'
  )
  shares.axhline(0, color='0.5', linewidth=0.8)
  title = 'Information about the expert, less that of shuffled labels'
  _layer_axis(shares, title, first)
  _layer_axis(guesses, 'Best guess of the expert from the label', first)
  shares.set_ylabel('share of the most possible')
  guesses.set_ylabel('right guesses')
  guesses.set_ylim(bottom=0)
  guesses.plot([], [], ':', color='0.3', label='with shuffled labels')
  guesses.legend(frameon=False, fontsize='small')
  return figure


def prediction_figure(following: Mapping[int, Information]) -> Figure:
  """The picture of how well one layer predicts the next.

  Args:
    following: The information on each layer, as `route_findings.transitions`
      returns it.
  """
  figure, (guesses, shares) = _pair()
  x, infos = np.arange(len(following)), list(following.values())
  for i, (name, values) in enumerate(
    {
      'from the expert before': [info.accuracy for info in infos],
      'base rate': [info.base_rate for info in infos],
    }.items()
  ):
    colour = plot_style.BLUE if i == 0 else '0.7'
    guesses.bar(x + 0.4 * i - 0.2, values, 0.4, color=colour, label=name)
  guesses.legend(frameon=False, fontsize='small', ncols=2)
  guesses.set_ylim(0, 1.2 * max(info.accuracy for info in infos))
  guesses.set_ylabel('right guesses')
  shares.bar(x, [info.fraction for info in infos], 0.6, color=plot_style.BLUE)
  shares.set_ylabel('share of the entropy of experts')
  _layer_axis(guesses, 'Best guess of the expert in this layer', following)
  title = 'Information from the layer before, less shuffled'
  _layer_axis(shares, title, following)
  return figure


def repeat_figure(sums: RouteSums) -> Figure:
  """Consecutive tokens with the same experts, against chance and even loads."""
  figure, panels = _pair()
  repeats = [route_findings.persistence(s) for s in sums.layers.values()]
  titles = 'Same first choice', 'Any expert in common'
  for axes, title, name in zip(panels, titles, ('first', 'any'), strict=True):
    lines = {'consecutive tokens': name}
    if name == 'first':
      lines['consecutive, different ids'] = 'different'
    lines['random tokens of the batch'] = f'{name}_chance'
    lines['even loads'] = f'{name}_uniform'
    for i, (label, key) in enumerate(lines.items()):
      values = [getattr(one, key) for one in repeats]
      if not all(map(math.isnan, values)):
        axes.plot(values, **plot_style.series(i), label=label)
    _layer_axis(axes, title, sums.layers)
    axes.set_ylabel('pairs of tokens')
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize='small')
  return figure


def drop_figure(sums: RouteSums) -> Figure:
  """Drops by place in the row and in the document, a line for each layer.

  If nothing is dropped, as where experts choose, the lines are the shares of
  tokens that no expert served.
  """
  layers = sums.layers
  dropped = any(layer.by_rank[:, 1].any() for layer in layers.values())
  rates, y_label = route_findings.unserved_rates, 'tokens without expert'
  if dropped:
    rates, y_label = route_findings.drop_rates, 'dropped choices'
    if any(s.info.second_policy != 'all' for s in layers.values()):
      y_label = 'choices not served'
  figure, panels = _pair()
  for axes, container in zip(panels, ('row', 'document'), strict=True):
    for (number, layer), colour in zip(
      layers.items(), plot_style.shades(len(layers)), strict=True
    ):
      counts = layer.by_column if container == 'row' else layer.by_position
      length = sums.length.get(layer.info.sequence, 0)
      middle = (np.arange(len(counts)) + 0.5) / len(counts) * length
      axes.plot(middle, rates(counts), color=colour, label=f'layer {number}')
    axes.set_title(f'By place in the {container}', loc='left')
    axes.set_xlabel(f'place in the {container}, tokens')
    axes.set_ylabel(y_label)
    _percent(axes)
    axes.set_ylim(bottom=0)
  _layer_legend(figure, panels[0], len(layers))
  return figure


def gate_figure(sums: RouteSums) -> Figure:
  """Gates by layer, and the entropies of loads and of routers."""
  figure, (gate_axes, entropy_axes) = _pair()
  x = range(len(sums.layers))
  gates = [route_findings.gates(layer) for layer in sums.layers.values()]
  low, high = [one.low for one in gates], [one.high for one in gates]
  gate_axes.fill_between(
    x, low, high, color=plot_style.SKY, alpha=0.4, label='first, 10 to 90 %'
  )
  medians = [one.median for one in gates]
  gate_axes.plot(x, medians, **plot_style.series(0), label='first, median')
  second = [(*one.means, math.nan, math.nan)[1] for one in gates]
  if not all(map(math.isnan, second)):
    gate_axes.plot(x, second, **plot_style.series(1), label='second, mean')
  most = [math.log(s.info.num_experts) for s in sums.layers.values()]
  load = [entropy(s.load) for s in sums.layers.values()]
  shares = [*map(_fraction, load, most)]
  entropy_axes.plot(x, shares, **plot_style.series(0), label='load')
  router = [one.router_entropy for one in gates]
  if not all(map(math.isnan, router)):
    shares = [one.router_share for one in gates]
    label = 'router, mean over tokens'
    entropy_axes.plot(x, shares, **plot_style.series(1), label=label)
  _layer_axis(gate_axes, 'Gates of served choices', sums.layers, percent=False)
  _layer_axis(entropy_axes, 'Entropy / ln E', sums.layers, percent=False)
  gate_axes.set_ylabel('gate')
  entropy_axes.set_ylabel('entropy / ln E')
  for axes in (gate_axes, entropy_axes):
    axes.set_ylim(0, 1.03)
    axes.legend(frameon=False, fontsize='small')
  return figure


def churn_figure(churn: Churn) -> Figure:
  """First choices that changed, over steps, a line for each layer."""
  figure, panels = _pair()
  numbers = [*churn.to_last[0].layers]
  for axes, changes, title in zip(
    panels,
    (churn.from_before, churn.to_last),
    (
      'Changed since the step before',
      f'Changed until step {churn.to_last[0].other}',
    ),
    strict=True,
  ):
    _draw_changes(axes, changes, numbers)
    axes.set_title(title, loc='left')
  _layer_legend(figure, panels[0], len(numbers))
  return figure


def _draw_changes(
  axes: Axes, changes: Sequence[Change], numbers: Sequence[int]
) -> None:
  steps = [change.step for change in changes]
  for number, colour in zip(
    numbers, plot_style.shades(len(numbers)), strict=True
  ):
    values = [change.layers[number].churn for change in changes]
    axes.plot(
      steps, values, 'o-', color=colour, markersize=3, label=f'layer {number}'
    )
  axes.set_xlabel('step')
  axes.set_ylabel('tokens with another first choice')
  axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
  _percent(axes)
  axes.set_ylim(bottom=0)


def _pair() -> tuple[Figure, Sequence[Axes]]:
  figure = Figure(figsize=_SIZE, layout='constrained')
  panels = figure.subplots(1, 2)
  for axes in panels:
    axes.grid(alpha=0.25)
    axes.spines[['top', 'right']].set_visible(False)
  return figure, panels


def _layer_axis(
  axes: Axes, title: str, layers: Collection[int], percent: bool = True
) -> None:
  axes.set_title(title, loc='left', fontsize='medium')
  axes.set_xlabel('layer')
  axes.set_xticks(range(len(layers)), labels=map(str, layers))
  axes.set_xlim(-0.6, len(layers) - 0.4)
  if percent:
    _percent(axes)


def _percent(axes: Axes) -> None:
  axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))


def _layer_legend(figure: Figure, axes: Axes, count: int) -> None:
  columns = math.ceil(count / 12)
  figure.legend(
    *axes.get_legend_handles_labels(),
    loc='outside right center',
    frameon=False,
    fontsize='small',
    ncols=columns,
  )


def _fraction(value: float, maximum: float) -> float:
  return value / maximum if maximum else math.nan
