"""Six pictures of a trace, and its text in the colours of its experts.

The colour of a cell in a heat map is what was counted over what chance gives,
on a logarithmic scale: `plot_style.HOW_TO_READ`. Hatched cells would hold fewer
than 5 tokens by chance, too few to tell.
"""

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from moe_jax.analysis import plot_style
from moe_jax.analysis import routing_measures as measures
from moe_jax.analysis.routing_measures import Information, Layer
from moe_jax.analysis.traces import Record
from moe_jax.data.tokenizers import TextStream, Tokenizer

Layers = Mapping[int, Layer]
# Lighter tints of Okabe and Ito's colours, on which black text is read.
COLOURS = (
  '#8CC8EC', '#F2B48C', '#8FD6BE', '#E8BBD3',
  '#F7EC8C', '#7FA8D9', '#F0C25E', '#C4C4C4',
)  # fmt: skip
_WIDTH = 10  # inches
_MIN_CHANCE = 5  # tokens, the fewest by chance that tell
_MAX_RANKS = 4  # first choices, second ones ... that have lines of their own


def pictures(
  layers: Layers, by_label: Mapping[str, Mapping[int, Information]]
) -> Iterator[tuple[str, Figure]]:
  """The pictures by name; those of pairs and of layers only if there are any.

  Args:
    layers: The choices in a trace.
    by_label: The information of labels on experts, by layer.
  """
  n = max(len(layer.load) for layer in layers.values())
  loads = np.full((len(layers), n), math.nan)
  for row, layer in zip(loads, layers.values(), strict=True):
    row[: len(layer.load)] = layer.load / max(layer.load.mean(), 1e-300)
  title = 'Load of each expert / mean load of the layer'
  yield 'load', _panels({'': loads}, title, 'expert', 'layer', [*layers])
  yield 'drops', drop_figure(layers)
  yield 'entropy', entropy_figure(layers)
  yield 'information', information_figure(by_label)
  pairs = {
    f'layer {n}': _over(pairs, measures.expected_pairs(pairs))
    for n, layer in layers.items()
    if (pairs := measures.pair_counts(layer.expert, len(layer.load))).any()
  }
  if pairs:
    title = 'Tokens that chose both experts / chance'
    yield 'co_activation', _panels(pairs, title, 'expert', 'expert')
  flows = {
    f'layer {a} to {b}': _over(table, measures.independent(table))
    for (a, b), table in measures.flows(layers).items()
  }
  if flows:
    title = 'Tokens from an expert to an expert of the next layer / chance'
    yield 'transitions', _panels(flows, title, 'next expert', 'expert')


def drop_figure(layers: Layers) -> Figure:
  """Choices that are not served, by layer and rank, and by place in the row."""
  figure, (by_rank, by_place) = _pair()
  rates = [
    measures.drop_rates_by_rank(x.expert, x.kept) for x in layers.values()
  ]
  lines = _by_rank(rates)
  lines['tokens without expert'] = [
    measures.unserved_rate(x.expert, x.kept) for x in layers.values()
  ]
  _draw(by_rank, 'Choices that are not served', layers, lines)
  colours = plot_style.shades(len(layers))
  for (number, x), colour in zip(layers.items(), colours, strict=True):
    parts = min(measures.NUM_PARTS, x.length)
    part = measures.parts_of(x.tokens.column, x.length, parts)
    middle = (np.arange(parts) + 0.5) / parts * x.length
    values = measures.drop_rates(x.expert, x.kept, part, parts)
    by_place.plot(middle, values, color=colour, label=f'layer {number}')
  by_place.set_title('The same by place in the row', loc='left', size='medium')
  by_place.set_xlabel('place in the row, tokens')
  for axes in (by_rank, by_place):
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
  legend = by_place.get_legend_handles_labels()
  columns, place = math.ceil(len(layers) / 12), 'outside right center'
  figure.legend(
    *legend, loc=place, ncols=columns, frameon=False, fontsize='small'
  )
  return figure


def entropy_figure(layers: Layers) -> Figure:
  """Entropies of loads and of routers over ln E, and the gates of choices."""
  figure, (entropies, gates) = _pair()
  lines = {
    'load': [measures.load_evenness(x.load) for x in layers.values()],
    'router, mean over tokens': [
      measures.router_evenness(x.logits) for x in layers.values()
    ],
  }
  _draw(entropies, 'Entropy / ln E', layers, lines)
  means = [
    measures.mean_gates(x.expert, x.gate, x.kept) for x in layers.values()
  ]
  _draw(gates, 'Mean gate of served choices', layers, _by_rank(means))
  for axes in (entropies, gates):
    axes.set_ylim(0, 1.03)
  return figure


def information_figure(
  by_label: Mapping[str, Mapping[int, Information]],
) -> Figure:
  """The information of labels on experts by layer, and best guesses."""
  figure, panels = _pair()
  first = next(iter(by_label.values()))  # ids of tokens, known in every layer
  titles = {
    'adjusted': 'Information about the expert, less that of shuffled labels',
    'accuracy': 'Best guess of the expert from the label',
  }
  for axes, (field, title) in zip(panels, titles.items(), strict=True):
    lines = {
      name: [getattr(infos.get(n), field, math.nan) for n in first]
      for name, infos in by_label.items()
    }
    if field == 'accuracy':
      lines['base rate'] = [info.base_rate for info in first.values()]
    _draw(axes, title, first, lines)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
  return figure


def _by_rank(values: Sequence[Float[np.ndarray, '_']]) -> dict[str, list]:
  """Lines over layers from an array of each layer, first choices first."""
  most = max(int((~np.isnan(x)).sum()) for x in values)
  return {
    f'choice {k + 1}': [x[k] if k < len(x) else math.nan for x in values]
    for k in range(min(most, _MAX_RANKS))
  }


def _draw(
  axes: Axes, title: str, layers: Mapping[int, Any], lines: Mapping[str, Any]
) -> None:
  """Draws lines over layers, without those that have no value."""
  for i, (label, values) in enumerate(lines.items()):
    if not np.isnan(values).all():
      axes.plot(values, **plot_style.series(i), label=label)
  axes.set_title(title, loc='left', fontsize='medium')
  axes.set_xlabel('layer')
  axes.set_xticks(range(len(layers)), labels=map(str, layers))
  axes.set_xlim(-0.6, len(layers) - 0.4)
  axes.margins(y=0.3)  # room for the legend
  if axes.lines:
    axes.legend(frameon=False, fontsize='small')


def coloured_text(
  record: Record, layer: int, tokenizer: Tokenizer | None = None, row: int = 0
) -> str:
  """A text as HTML, each token with the colour and number of its first expert.

  Colours repeat after eight experts; numbers tell those of one colour apart,
  and all of them in print. A token without a choice is white. A sign stands
  for a new line, and for a token without text. In a notebook,
  `IPython.display.HTML` shows it.

  Args:
    record: The batch.
    layer: The number of the layer.
    tokenizer: The tokenizer of the run; None shows ids.
    row: The number of the row in the batch.
  """
  real = record.documents[row] > 0
  texts = _texts(record.tokens[row][real], tokenizer)
  spans = []
  for text, expert in zip(texts, record.layers[layer].expert[row, real, 0]):
    text = html.escape(text or '\u00b7').replace('\n', '\u21b5\n')
    number = '' if expert < 0 else f'<sub>{expert}</sub>'
    colour = '#FFFFFF' if expert < 0 else COLOURS[expert % len(COLOURS)]
    style = f'background:{colour};color:black'
    spans.append(f'<span style="{style}">{text}{number}</span>')
  return f'<pre style="line-height:1.7">{"".join(spans)}</pre>'


def _texts(
  token_ids: Int[np.ndarray, 'N'], tokenizer: Tokenizer | None
) -> Sequence[str]:
  if tokenizer is None or not len(token_ids):
    return [f'{number} ' for number in token_ids]
  stream = TextStream(tokenizer)
  texts = [stream.add(int(number)) for number in token_ids]
  texts[-1] += stream.end()
  return [
    ''.join(c if c.isprintable() or c in '\n\t' else '\ufffd' for c in text)
    for text in texts
  ]


def _pair() -> tuple[Figure, np.ndarray]:
  figure = Figure(figsize=(_WIDTH, 3.6), layout='constrained')
  panels = figure.subplots(1, 2)
  for axes in panels:
    axes.grid(alpha=0.25)
    axes.spines[['top', 'right']].set_visible(False)
  return figure, panels


def _panels(
  panels: Mapping[str, Float[np.ndarray, 'rows columns']],
  title: str,
  x_label: str,
  y_label: str,
  row_names: Sequence[int] = (),
) -> Figure:
  """Heat maps of ratios in a grid with one colour scale; cells are square.

  With names of rows, cells are as wide as the page has room for.
  """
  columns = min(4, len(panels))
  lines = math.ceil(len(panels) / columns)
  side = _WIDTH / 4 if columns > 2 else 4
  size = max(columns * side, 6.5), 1 + lines * (side * 0.95)
  if row_names:
    size = _WIDTH, 1.6 + 0.28 * len(row_names)
  figure = Figure(figsize=size, layout='constrained')
  grid = figure.subplots(lines, columns, squeeze=False)
  mesh: Any = None
  for axes, (name, ratios) in zip(grid.flat, panels.items()):
    mesh = plot_style.heat(axes, np.arange(ratios.shape[1] + 1) - 0.5, ratios)
    axes.set_title(name, loc='left', fontsize='medium')
    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    if row_names:
      axes.set_yticks(range(len(row_names)), labels=map(str, row_names))
    else:
      axes.set_aspect('equal')
  for axes in grid.flat[len(panels) :]:
    axes.remove()
  figure.supxlabel(x_label, fontsize='medium')
  figure.supylabel(y_label, fontsize='medium')
  figure.suptitle(title, fontsize='large')
  aspect = 15 * lines
  plot_style.ratio_bar(figure, mesh, figure.axes, pad=0.01, aspect=aspect)
  return figure


def _over(
  counts: Int[np.ndarray, 'rows columns'],
  chance: Float[np.ndarray, 'rows columns'],
) -> Float[np.ndarray, 'rows columns']:
  """Counts over chance, NaN where chance is too little to tell."""
  undefined = np.full(chance.shape, math.nan)
  return np.divide(counts, chance, out=undefined, where=chance >= _MIN_CHANCE)
