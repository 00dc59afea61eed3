"""Six pictures of a trace, and its text in the colours of its experts.

The colour of a cell in a heat map is what was counted over what chance gives,
on a logarithmic scale: `plot_style.HOW_TO_READ`. Hatched cells would hold fewer
than 5 tokens by chance, too few to tell.
"""

import html
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy.stats.contingency import expected_freq

from moe_jax.analysis import plot_style
from moe_jax.analysis import routing_measures as measures
from moe_jax.analysis.routing_measures import ByLabel, Layers
from moe_jax.analysis.routing_report import Row
from moe_jax.analysis.traces import Record
from moe_jax.data.tokenizers import TextStream, Tokenizer

# Lighter tints of Okabe and Ito's colours, on which black text is read.
COLOURS = (
  '#8CC8EC', '#F2B48C', '#8FD6BE', '#E8BBD3',
  '#F7EC8C', '#7FA8D9', '#F0C25E', '#C4C4C4',
)  # fmt: skip
_WIDTH = 10  # inches
# Cells in which chance puts fewer tokens are hatched.
_MIN_CHANCE = 5


def pictures(
  layers: Layers,
  by_label: ByLabel,
  load_rows: Sequence[Row],
  drop_rows: Sequence[Row],
) -> Iterator[tuple[str, Figure]]:
  """The pictures by name.

  Pictures of pairs of choices or of layers are drawn only if there are pairs.

  Args:
    layers: The choices in a trace.
    by_label: The information of labels on experts, by layer.
    load_rows: The rows of the table of loads, one for each layer.
    drop_rows: The rows of the table of drops.
  """
  n = max(len(layer.load) for layer in layers.values())
  loads = np.full((len(layers), n), math.nan)
  for row, layer in zip(loads, layers.values(), strict=True):
    row[: len(layer.load)] = layer.load / max(layer.load.mean(), 1e-300)
  figure, (axes,), _ = plot_style.heat_maps(
    {'': (np.arange(n + 1) - 0.5, loads)},
    ('Load of each expert / mean load of the layer', 'expert', 'layer'),
    1,
    (_WIDTH, 1.6 + 0.28 * len(layers)),
    20,
  )
  axes.set_yticks(range(len(layers)), labels=map(str, layers))
  yield 'load', figure
  yield 'drops', drop_figure(drop_rows)
  entropies = {'Entropy / ln E': _columns(load_rows, '.*entropy / ln E')}
  yield 'entropy', _lines(layers, entropies)
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
    f'layer {a} to {b}': _over(table, expected_freq(table))
    for (a, b), table in measures.flows(layers).items()
  }
  if flows:
    title = 'Tokens from an expert to an expert of the next layer / chance'
    yield 'transitions', _panels(flows, title, 'next expert', 'expert')


def drop_figure(rows: Sequence[Row]) -> Figure:
  """The shares of unserved choices by layer, for each rank and row quarter."""
  panels = {
    'Choices that are not served': r'choice \d+|tokens unserved',
    'The same by quarter of the row': r'quarter \d',
  }
  return _lines(
    [row['layer'] for row in rows],
    {title: _columns(rows, pattern) for title, pattern in panels.items()},
  )


def information_figure(by_label: ByLabel) -> Figure:
  """How well labels tell experts, by layer: information and best guesses."""
  first = next(iter(by_label.values()))  # ids of tokens, known in every layer

  def values(field: str) -> dict[str, list[float]]:
    return {
      name: [getattr(infos.get(n), field, math.nan) for n in first]
      for name, infos in by_label.items()
    }

  base_rate = {'base rate': [info.base_rate for info in first.values()]}
  panels = {
    'Information, less that of shuffled labels': values('adjusted'),
    'Best guess of the expert from the label': values('accuracy') | base_rate,
  }
  return _lines(first, panels)


def _columns(rows: Sequence[Row], pattern: str) -> dict[str, list[float]]:
  """The columns of a table whose names match `pattern`, by name."""
  names = dict.fromkeys(name for row in rows for name in row)
  return {
    name: [row.get(name, math.nan) for row in rows]
    for name in names
    if re.fullmatch(pattern, name)
  }


def _lines(
  layers: Iterable[int], panels: Mapping[str, Mapping[str, Sequence[float]]]
) -> Figure:
  """Shares over layers, as the lines of one panel for each title.

  Lines without any value are left out.
  """
  figure = Figure(figsize=(_WIDTH, 3.6), layout='constrained')
  all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
  labels = [*map(str, layers)]
  for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
    for i, (label, values) in enumerate(lines.items()):
      if not np.isnan(values).all():
        axes.plot(values, **plot_style.series(i), label=label)
    values = [0, *itertools.chain(*lines.values())]
    lowest, highest = np.nanmin(values), np.nanmax(values)
    room = 0.3 * (highest - lowest) or 1  # for the legend
    axes.set_title(title, loc='left', fontsize='medium')
    axes.set_xlabel('layer')
    axes.set_xticks(range(len(labels)), labels=labels)
    axes.set_xlim(-0.6, len(labels) - 0.4)
    axes.set_ylim(lowest - room * (lowest < 0), highest + room)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.grid(alpha=0.25)
    axes.spines[['top', 'right']].set_visible(False)
    if axes.lines:
      axes.legend(frameon=False, fontsize='small')
  return figure


def coloured_text(
  record: Record, layer: int, tokenizer: Tokenizer | None = None, row: int = 0
) -> str:
  """A text as HTML, each token with the colour and index of its first expert.

  Colours repeat after eight experts; the index tells experts of one colour
  apart, and all experts on grey paper. A token without a choice is white. A
  sign stands for a new line, and for a token without text. In a notebook,
  `IPython.display.HTML` shows the text.

  Args:
    record: The record of the batch.
    layer: The index of the layer.
    tokenizer: The tokenizer of the run; None shows token ids.
    row: The index of the row in the batch.
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


def _panels(
  panels: Mapping[str, Float[np.ndarray, 'rows columns']],
  title: str,
  x_label: str,
  y_label: str,
) -> Figure:
  """A figure of heat maps in a grid, with square cells."""
  columns = min(4, len(panels))
  lines = math.ceil(len(panels) / columns)
  side = _WIDTH / 4 if columns > 2 else 4
  figure, all_axes, _ = plot_style.heat_maps(
    {k: (np.arange(x.shape[1] + 1) - 0.5, x) for k, x in panels.items()},
    (title, x_label, y_label),
    columns,
    (max(columns * side, 6.5), 1 + lines * (side * 0.95)),
    15 * lines,
  )
  for axes in all_axes:
    axes.set_aspect('equal')
  return figure


def _over(
  counts: Int[np.ndarray, 'rows columns'],
  chance: Float[np.ndarray, 'rows columns'],
) -> Float[np.ndarray, 'rows columns']:
  """Counts divided by chance; NaN where fewer than 5 are due to chance."""
  undefined = np.full(chance.shape, math.nan)
  return np.divide(counts, chance, out=undefined, where=chance >= _MIN_CHANCE)
