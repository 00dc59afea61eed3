"""Says what the routers of a run did, from a trace of their choices.

    python -m moe_jax.analysis.routes runs/tiny/trace --output=runs/tiny/routes
    python -m moe_jax.analysis.routes runs/a/trace --against=runs/b/trace \
      --kind=valid --output=comparison

Tables are printed; the folder gets six pictures: load, drops, entropy,
information, co_activation and transitions.
"""

import argparse
import itertools
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging

from moe_jax import command_line
from moe_jax.analysis import plot_style, routing_plots, text_tables, traces
from moe_jax.analysis import routing_measures as measures
from moe_jax.analysis.routing_measures import Agreement, Information, Layer
from moe_jax.analysis.text_tables import Value, ValueTable
from moe_jax.analysis.traces import Trace
from moe_jax.errors import InputError
from moe_jax.routing.load_summary import load_summary

# Kinds of records in which a choice is dropped where training drops it.
_PREFERRED_KINDS = ('train', 'train_capacity')
_BEFORE = 'expert before'
_QUARTERS = 4
_MAX_STEPS = 50  # steps between which churn is measured
Layers = Mapping[int, Layer]
Row = dict[str, Value]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Parses the command line."""
  parser = command_line.Parser(
    prog=command_line.program('moe_jax.analysis.routes'),
    **command_line.about(__doc__),
  )
  add = parser.add_argument
  add('trace', metavar='TRACE', help='folder of a trace')
  add('--output', required=True, help='folder for the pictures')
  add(
    '--kind',
    default='',
    help="records of this kind: 'train', 'generate' or an evaluation's name; "
    f'default: {" or ".join(_PREFERRED_KINDS)}, if there are any',
  )
  text = 'steps from FIRST on and before LAST; either may be left out'
  add('--steps', type=_steps, metavar='FIRST:LAST', default=None, help=text)
  text = (
    'folder of another trace of the same batches, whose choices are compared'
  )
  add('--against', metavar='TRACE', help=text)
  add('--traceback', action='store_true', help='shows where an error is raised')
  return parser.parse_args(argv)


def _steps(text: str) -> range:
  first, colon, last = text.partition(':')
  try:
    steps = range(int(first or 0), int(last or 2**62))
  except ValueError:
    steps = range(0)
  if not colon or not steps or steps.start < 0:
    raise argparse.ArgumentTypeError(
      f'{text!r} is not FIRST:LAST with 0 <= FIRST < LAST'
    )
  return steps


def run(options: argparse.Namespace) -> None:
  """Prints the tables of a trace, and saves its pictures.

  Raises:
    ValueError: The trace is bad, or does not fit the other options.
  """
  trace = traces.read(options.trace)
  kind = options.kind or _default_kind(trace, options.trace)
  steps = _present(trace, kind, options.steps)
  layers = measures.layers_of(trace.header, trace.records(kind, steps))
  by_label = measures.specialisation(layers)
  if following := measures.transitions(layers):
    by_label[_BEFORE] = following
  changes = _changes(trace, kind, steps)
  if options.against:
    changes[f'against {options.against}'] = measures.changes(
      trace.records(kind, steps),
      traces.read(options.against).records(kind, steps),
    )
  others = ', '.join(k for k in trace.kinds if k != kind) or 'none'
  print(
    f'{options.trace}: {kind!r} at {len(steps):,} steps, {steps[0]:,} to '
    f'{steps[-1]:,}. Other kinds of records: {others}.'
  )
  if trace.header.note:
    print(f'Note: {trace.header.note}')
  console = text_tables.wide_console()
  for title, (note, rows) in tables(layers, by_label, changes).items():
    if rows:
      console.print(_table(title, note, rows).terminal())
      console.print(f'{note}\n', highlight=False)
  output = pathlib.Path(options.output).expanduser()
  output.mkdir(parents=True, exist_ok=True)
  for name, figure in routing_plots.pictures(layers, by_label):
    (output / f'{name}.png').write_bytes(plot_style.picture(figure))
  print(f'\nThe pictures are in {output}. {plot_style.HOW_TO_READ}')


def _default_kind(trace: Trace, folder: str) -> str:
  if not trace.header.layers:
    raise InputError(f'{folder} is of a model without sparse layers')
  if not trace.kinds:
    raise InputError(f'{folder} has no records')
  preferred = [kind for kind in _PREFERRED_KINDS if kind in trace.kinds]
  return (preferred or trace.kinds)[0]


def _present(trace: Trace, kind: str, steps: range | None) -> list[int]:
  if kind not in trace.kinds:
    raise InputError(f'unknown kind {kind!r}; have {[*trace.kinds]}')
  present = [s for s in trace.steps_of(kind) if steps is None or s in steps]
  if not present:
    raise InputError(f'no records of {kind!r} at steps {steps}')
  return present


def _changes(
  trace: Trace, kind: str, steps: Sequence[int]
) -> dict[str, dict[int, Agreement]]:
  """The agreement of an evaluation's choices from step to step.

  Where there are more than 50 steps, an even selection with the first and the
  last is compared. The batches of training are others at each step.
  """
  if kind == _PREFERRED_KINDS[0]:
    return {}
  indices = np.linspace(0, len(steps) - 1, min(len(steps), _MAX_STEPS))
  selected = [steps[i] for i in indices.round().astype(int)]
  return {
    f'{before:,} to {after:,}': measures.changes(
      trace.records(kind, [before]), trace.records(kind, [after])
    )
    for before, after in itertools.pairwise(selected)
  }


def tables(
  layers: Layers,
  by_label: Mapping[str, Mapping[int, Information]],
  changes: Mapping[str, Mapping[int, Agreement]],
) -> dict[str, tuple[str, list[Row]]]:
  """Sentences on the columns of each table and its rows, by title.

  Args:
    layers: The choices in the trace.
    by_label: The information of labels on experts, by layer.
    changes: The agreement of choices with other ones, by layer.
  """
  return {
    'Load of experts': (
      'The load of an expert is the number of choices that fall on it, before '
      'any is dropped, over the mean of its layer. CV is the standard '
      'deviation over the mean. The entropy of the load over ln E is 1 if all '
      'experts are chosen equally often; that of the router is a mean over '
      'tokens, and needs logits. Gates are means over served choices.',
      [_load_row(n, layer) for n, layer in layers.items()],
    ),
    'Choices that are not served': (
      'An unserved token has no expert at all, because its choices were '
      'dropped or no expert took it. Quarters are places in the row. Choices '
      'that a policy for second choices did not send count as not served.',
      [_drop_row(n, layer) for n, layer in layers.items()],
    ),
    'What a label says about the expert of the first choice': (
      'Mutual is the mutual information in nats, shuffled that of shuffled '
      'labels with its deviation, and net the difference: as a share of the '
      'entropy of the experts and, adjusted, of the most that it can be. '
      'Accuracy is the share of best guesses that are right.',
      [
        {
          'label': name, 'layer': n, **info._asdict(), 'net': info.net,
          'net / entropy': info.fraction, 'adjusted': info.adjusted,
        }
        for name, infos in by_label.items()
        for n, info in infos.items()
      ],
    ),
    'Consecutive tokens with the same expert': (
      'Shares of pairs of neighbours in a document whose first choices, or any '
      'of them, are the same expert. Chance compares with a random other token '
      'of the batch; uniform is what even loads and random choices give; '
      'different is the share of pairs of different ids.',
      [
        {'layer': n, **measures.persistence(layer)._asdict()}
        for n, layer in layers.items()
      ],
    ),
    'Experts that tokens choose together': (
      'Chance is what the loads alone give if partners do not matter. The last '
      'column is the relative entropy of the pairs to it: 0 if loads explain '
      'them.',
      [_pair_row(n, x) for n, x in layers.items() if x.expert.shape[1] > 1],
    ),
    'Choices that changed': (
      'Churn is the share of the same tokens that have another first choice; '
      'the overlap is the share of choices that both have. Experts of models '
      'that were trained apart have different numbers.',
      [
        {
          'steps': name, 'layer': n, 'tokens': one.tokens,
          'churn': one.churn, 'overlap': one.overlap,
        }
        for name, by_layer in changes.items()
        for n, one in by_layer.items()
      ],
    ),
  }  # fmt: skip


def _load_row(number: int, layer: Layer) -> Row:
  load, summary = layer.load, load_summary(layer.load)
  relative = load / load.mean() if load.any() else load * math.nan
  gates = measures.mean_gates(layer.expert, layer.gate, layer.kept)
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
    **{f'gate {k + 1}': float(gate) for k, gate in enumerate(gates[:2])},
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
  return {
    'layer': number,
    'pairs of choices': int(pairs[upper].sum()),
    'possible pairs': len(chance),
    'never chosen': int((pairs[upper] == 0).sum()),
    'nats from chance': measures.relative_entropy(pairs[upper], chance),
  }


def _table(title: str, note: str, rows: Sequence[Row]) -> ValueTable:
  """A table whose columns are all that any row has, in order."""
  names = list(dict.fromkeys(name for row in rows for name in row))
  forms = {int: ',d', float: '.3f', str: ''}
  columns = {
    name.replace('_', ' '): next(
      forms[type(row[name])] for row in rows if name in row
    )
    for name in names
  }
  cells = [[row.get(name) for name in names] for row in rows]
  return ValueTable(title, title, note, columns, cells)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  options = parse(argv)
  logging.set_verbosity(logging.WARNING)
  with command_line.reported(options.traceback):
    run(options)


if __name__ == '__main__':
  main()
