"""Says what the routers of a run did, from a trace of their choices.

    python -m moe_jax.analysis.routes runs/tiny/trace --output=runs/tiny/routes

Tables are printed; the folder gets six pictures: load, drops, entropy,
information, co_activation and transitions.
"""

import argparse
import itertools
import math
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from absl import logging

from moe_jax import cli
from moe_jax.analysis import plot_style, routing_plots, traces
from moe_jax.analysis import routing_measures as measures
from moe_jax.analysis.routing_measures import ByLabel, Layer, Layers
from moe_jax.analysis.routing_report import Row, ValueTable, wide_console
from moe_jax.errors import InputError
from moe_jax.routing.stats import load_summary

# Kinds of records that are made with the capacity of training, so that a choice
# is dropped there where training drops it.
_PREFERRED_KINDS = ('train', 'train_capacity')
_QUARTERS = 4


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
  add('--traceback', action='store_true', help='shows where an error is raised')
  return parser.parse_args(argv)


def _steps(text: str) -> range:
  ends = re.fullmatch(r'(\d*):(\d*)', text)
  steps = ends and range(int(ends[1] or 0), int(ends[2] or 2**62))
  if not steps:
    raise argparse.ArgumentTypeError(
      f'{text!r} is not FIRST:LAST with 0 <= FIRST < LAST'
    )
  return steps


def run(options: argparse.Namespace) -> None:
  """Prints the tables of a trace, and saves its pictures.

  Raises:
    ValueError: The trace cannot be read, or does not fit the other options.
  """
  trace = traces.read(options.trace)
  if not trace.header.layers:
    raise InputError(f'{options.trace} is of a model without sparse layers')
  if not trace.kinds:
    raise InputError(f'{options.trace} has no records')
  preferred = [kind for kind in _PREFERRED_KINDS if kind in trace.kinds]
  kind = options.kind or (preferred or trace.kinds)[0]
  records = trace.records(kind, options.steps)
  steps = [step for step in trace.steps_of(kind) if step in options.steps]
  if kind in trace.kinds and not steps:
    raise InputError(f'no records of {kind!r} at steps {options.steps}')
  layers = measures.layers_of(trace.header, records)
  loads = [_load_row(n, layer) for n, layer in layers.items()]
  drops = [_drop_row(n, layer) for n, layer in layers.items()]
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
  for table in tables(layers, loads, drops, by_label, churn):
    if table.rows:
      console.print(table.terminal())
      console.print(f'{table.note}\n', highlight=False)
  output = pathlib.Path(options.output).expanduser()
  output.mkdir(parents=True, exist_ok=True)
  for name, figure in routing_plots.pictures(layers, by_label, loads, drops):
    (output / f'{name}.png').write_bytes(plot_style.picture(figure))
  print(f'\nThe pictures are in {output}. {plot_style.HOW_TO_READ}')


def tables(
  layers: Layers,
  loads: Sequence[Row],
  drops: Sequence[Row],
  by_label: ByLabel,
  churn: Mapping[str, Mapping[int, float]],
) -> Iterator[ValueTable]:
  """The tables of a trace, some of which may have no rows.

  Args:
    layers: The choices in the trace.
    loads, drops: The rows of the tables of loads and of dropped choices.
    by_label: The information of labels on experts, by layer.
    churn: The shares of first choices that changed, by layer.
  """
  yield ValueTable(
    'Load of experts',
    'The load of an expert is the number of choices that fall on it, before '
    'any is dropped, over the mean of its layer. CV is the standard deviation '
    'over the mean. The entropy of the load over ln E is 1 if all experts are '
    'chosen equally often; that of the router is a mean over tokens, and needs '
    'logits.',
    loads,
  )
  yield ValueTable(
    'Choices that are not served',
    'An unserved token has no expert at all, because its choices were dropped '
    'or no expert took it. Quarters are places in the row. Choices that a '
    'policy for second choices did not send count as not served.',
    drops,
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


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  options = parse(argv)
  logging.set_verbosity(logging.WARNING)
  with cli.reported(options.traceback):
    run(options)


if __name__ == '__main__':
  main()
