"""Says what the routers of a run did, from a trace of their choices.

    python -m moe_jax.analysis.routes runs/tiny/trace --output=runs/tiny/routes

Tables are printed; the folder gets up to three pictures: `load`,
`co_activation` and `transitions`.
"""

import argparse
import html
import itertools
import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from scipy.stats.contingency import expected_freq

from moe_jax import cli
from moe_jax.analysis import plot_style, traces
from moe_jax.analysis import routing_measures as measures
from moe_jax.analysis.routing_measures import ByLabel, Layer, Layers
from moe_jax.analysis.routing_report import Row, ValueTable, wide_console
from moe_jax.analysis.traces import Record
from moe_jax.data.tokenizers import TextStream, Tokenizer
from moe_jax.routing.stats import load_summary

# Kinds of records that are read if the user names none. Both are made with the
# capacity of training, so that their choices are dropped as in training.
_PREFERRED_KINDS = ('train', 'train_capacity')
_QUARTERS = 4
# Lighter tints of Okabe and Ito's colours, on which black text is read.
COLOURS = (
  '#8CC8EC', '#F2B48C', '#8FD6BE', '#E8BBD3',
  '#F7EC8C', '#7FA8D9', '#F0C25E', '#C4C4C4',
)  # fmt: skip
Ratios = Float[np.ndarray, 'rows columns']

_WIDTH = 10  # inches
# Cells in which chance puts fewer tokens are hatched.
_MIN_CHANCE = 5


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Parses the command line."""
  parser = cli.parser('moe_jax.analysis.routes', __doc__)
  add = parser.add_argument
  add('trace', metavar='TRACE', help='folder of a trace')
  add('--output', required=True, help='folder for the pictures')
  text = "records of this kind: 'train', 'generate' or an evaluation's name"
  default = ' or '.join(_PREFERRED_KINDS)
  add('--kind', help=f'{text}; default: {default}, if there are any')
  text = "steps from FIRST on and before LAST; ':' stands for all"
  add('--steps', type=_steps, metavar='FIRST:LAST', default=':', help=text)
  cli.add_traceback(parser)
  parser.set_defaults(run=run)
  return parser.parse_args(argv)


def _steps(text: str) -> range:
  ends = re.fullmatch(r'(\d*):(\d*)', text)
  if steps := ends and range(int(ends[1] or 0), int(ends[2] or 2**62)):
    return steps
  problem = f'{text!r} is not FIRST:LAST with 0 <= FIRST < LAST'
  raise argparse.ArgumentTypeError(problem)


def run(options: argparse.Namespace, _: list[str]) -> None:
  """Prints the tables of a trace, and saves its pictures.

  Raises:
    ValueError: The trace cannot be read, or lacks the kind or the steps.
  """
  trace = traces.read(options.trace)
  preferred = [kind for kind in _PREFERRED_KINDS if kind in trace.kinds]
  kind = options.kind or (preferred or trace.kinds or _PREFERRED_KINDS)[0]
  steps = [step for step in trace.steps_of(kind) if step in options.steps]
  records = trace.records(kind, options.steps)
  layers = measures.layers_of(trace.header, records)
  by_label = measures.specialisation(layers)
  if following := measures.transitions(layers):
    by_label['expert before'] = following
  churn = {}
  if kind != 'train':  # training has new batches at each step
    for one, other in itertools.pairwise(steps):
      pair = trace.records(kind, [one]), trace.records(kind, [other])
      churn[f'{one:,} to {other:,}'] = measures.churn(*pair)
  others = ', '.join(k for k in trace.kinds if k != kind) or 'none'
  print(
    f'{options.trace}: {kind!r} at {len(steps):,} steps, {steps[0]:,} to '
    f'{steps[-1]:,}. Other kinds of records: {others}.'
  )
  if trace.header.note:
    print(f'Note: {trace.header.note}')
  console = wide_console()
  for table in tables(layers, by_label, churn):
    if table.rows:
      table.show(console)
  output = pathlib.Path(options.output).expanduser()
  output.mkdir(parents=True, exist_ok=True)
  for name, figure in pictures(layers):
    plot_style.save(figure, output / f'{name}.png')
  print(f'\nThe pictures are in {output}. {plot_style.HOW_TO_READ}')


def tables(
  layers: Layers, by_label: ByLabel, churn: Mapping[str, Mapping[int, float]]
) -> Iterator[ValueTable]:
  """The tables of a trace; some of them may have no rows, and are not shown.

  Args:
    layers: The choices in the trace.
    by_label: The information of labels on experts, by the name of the label and
      by layer.
    churn: The shares of first choices that changed, by the two steps and by
      layer.
  """
  yield ValueTable(
    'Load of experts',
    'The load of an expert is the number of choices that fall on it, before '
    'any is dropped, over the mean of its layer. CV is the standard deviation '
    'over the mean. The entropy of the load over ln E is 1 if all experts are '
    'chosen equally often; that of the router is a mean over tokens, and needs '
    'logits.',
    [_load_row(n, layer) for n, layer in layers.items()],
  )
  yield ValueTable(
    'Choices that are not served',
    'An unserved token has no expert at all, because its choices were dropped '
    'or no expert took it. Quarters are places in the row. Choices that a '
    'policy for second choices did not send count as not served.',
    [_drop_row(n, layer) for n, layer in layers.items()],
  )
  yield ValueTable(
    'What a label says about the expert of the first choice',
    'Mutual is the mutual information in nats, shuffled that of shuffled '
    'labels with its deviation, and net the difference; adjusted, it is a '
    'share of the most that it can be. Accuracy is the share of best guesses '
    'that are right.',
    [
      {
        'label': name, 'layer': n, **info._asdict(), 'net': info.net,
        'adjusted': info.adjusted,
      }
      for name, infos in by_label.items()
      for n, info in infos.items()
    ],
  )  # fmt: skip
  yield ValueTable(
    'Consecutive tokens with the same expert',
    'Shares of pairs of neighbours in a document whose first choices, or any '
    'of them, are the same expert. Chance compares with a random other token '
    'of the batch; uniform is what even loads and random choices give; '
    'different is the share of pairs of different ids.',
    [
      {'layer': n, **measures.persistence(layer)._asdict()}
      for n, layer in layers.items()
    ],
  )
  yield ValueTable(
    'Experts that tokens choose together',
    'Chance is what the loads alone give if partners do not matter. The last '
    'column is of the pair that is most above it.',
    [_pair_row(n, x) for n, x in layers.items() if x.expert.shape[1] > 1],
  )
  yield ValueTable(
    'Choices that changed',
    'Churn is the share of the same tokens that have another first choice.',
    [
      {'steps': name, 'layer': n, 'churn': share}
      for name, by_layer in churn.items()
      for n, share in by_layer.items()
    ],
  )


def _load_row(number: int, layer: Layer) -> Row:
  load, summary = layer.load, load_summary(layer.load)
  relative = load / load.mean() if load.any() else load * math.nan
  return {
    'layer': number,
    'experts': len(load),
    'least': float(relative.min()),
    'median': float(np.median(relative)),
    'most': float(relative.max()),
    'CV': summary['load_cv'],
    'unused': summary['unused_experts'],
    'entropy / ln E': measures.load_evenness(load),
    'router entropy / ln E': measures.router_evenness(layer.logits),
  }


def _drop_row(number: int, layer: Layer) -> Row:
  expert, kept = layer.expert, layer.kept
  quarters = measures.parts_of(layer.tokens.column, layer.length, _QUARTERS)
  by_rank = measures.drop_rates_by_rank(expert, kept)
  by_quarter = measures.drop_rates(expert, kept, quarters, _QUARTERS)
  return {
    'layer': number,
    'not served': float(measures.drop_rates(expert, kept)[0]),
    **{f'choice {k + 1}': float(rate) for k, rate in enumerate(by_rank[:2])},
    'tokens unserved': measures.unserved_rate(expert, kept),
    **{f'quarter {i + 1}': float(rate) for i, rate in enumerate(by_quarter)},
  }


def _pair_row(number: int, layer: Layer) -> Row:
  pairs = measures.pair_counts(layer.expert, len(layer.load))
  upper = np.triu_indices(len(pairs), 1)
  chance = measures.expected_pairs(pairs)[upper]
  ratios = measures.shares(pairs[upper], chance)
  return {
    'layer': number,
    'pairs of choices': int(pairs[upper].sum()),
    'possible pairs': len(chance),
    'never chosen': int((pairs[upper] == 0).sum()),
    'most / chance': float(ratios[chance > 0].max(initial=0)),
  }


def pictures(layers: Layers) -> Iterator[tuple[str, Figure]]:
  """Yields the pictures of the choices in a trace, by name.

  Pictures of pairs of choices or of layers are drawn only if there are pairs.
  The colour of a cell in a heat map is what was counted over what chance gives,
  on a logarithmic scale, which the text `plot_style.HOW_TO_READ` explains.
  Hatched cells would hold fewer than 5 tokens by chance, too few to tell.

  Args:
    layers: The choices in a trace.
  """
  n = max(len(layer.load) for layer in layers.values())
  relative = np.full((len(layers), n), math.nan)
  for row, layer in zip(relative, layers.values(), strict=True):
    row[: len(layer.load)] = layer.load / max(layer.load.mean(), 1e-300)
  size = _WIDTH, 1.6 + 0.28 * len(layers)
  labels = 'Load of each expert / mean load of the layer', 'expert', 'layer'
  figure, (axes,), _ = plot_style.heat_maps({'': relative}, labels, 1, size)
  axes.set_yticks(range(len(layers)), labels=map(str, layers))
  yield 'load', figure
  pairs = {
    f'layer {n}': _over(pairs, measures.expected_pairs(pairs))
    for n, layer in layers.items()
    if (pairs := measures.pair_counts(layer.expert, len(layer.load))).any()
  }
  if pairs:
    title = 'Tokens that chose both experts / chance'
    yield 'co_activation', _panels(pairs, (title, 'expert', 'expert'))
  flows = {
    f'layer {a} to {b}': _over(table, expected_freq(table))
    for (a, b), table in measures.flows(layers).items()
  }
  if flows:
    title = 'Tokens from an expert to an expert\nof the next layer / chance'
    yield 'transitions', _panels(flows, (title, 'next expert', 'expert'))


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
  real, spans = record.documents[row] > 0, []
  texts = _texts(record.tokens[row][real], tokenizer)
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
  panels: Mapping[str, Ratios], labels: tuple[str, str, str]
) -> Figure:
  """A figure of heat maps of ratios, by title, in a grid, with square cells.

  `labels` has the figure's title and the labels of the x axis and the y axis.
  """
  columns = min(4, len(panels))
  lines = math.ceil(len(panels) / columns)
  side = _WIDTH / 4 if columns > 2 else 4
  size = max(columns * side, 4.8), 1 + lines * (side * 0.95)
  figure, all_axes, _ = plot_style.heat_maps(panels, labels, columns, size)
  for axes in all_axes:
    axes.set_aspect('equal')
  return figure


def _over(counts: Int[np.ndarray, 'rows columns'], chance: Ratios) -> Ratios:
  """Divides counts by those of chance; NaN where chance gives fewer than 5."""
  undefined = np.full(chance.shape, math.nan)
  return np.divide(counts, chance, out=undefined, where=chance >= _MIN_CHANCE)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  cli.run_command(parse(argv), [])


if __name__ == '__main__':
  main()
