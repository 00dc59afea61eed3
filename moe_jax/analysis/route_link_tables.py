"""Tables of choices that go together: experts, layers, neighbours, labels.

Not here: loads, drops and churn (`route_tables.py`), and the numbers
(`route_findings.py`).
"""

from collections.abc import Mapping

import numpy as np

from moe_jax.analysis import route_findings, route_measures
from moe_jax.analysis.route_measures import Information
from moe_jax.analysis.route_sums import RouteSums
from moe_jax.analysis.text_tables import Value, ValueTable

_MAX_LISTED = 5  # pairs and flows that are listed for each layer


def co_activation_table(
  sums: RouteSums, expected: Mapping[int, np.ndarray]
) -> ValueTable:
  """The table of pairs of experts that tokens choose, against chance.

  Args:
    sums: The sums.
    expected: `route_measures.expected_pairs` of each layer with pairs.
  """
  rows = []
  for number, chance in expected.items():
    pairs = sums.layers[number].pairs
    upper = np.triu_indices(len(pairs), 1)
    observed, chance = pairs[upper], chance[upper]
    count = max(1, len(observed) // 100)
    top = np.sort(observed)[::-1][:count].sum() / observed.sum()
    rows.append(
      [
        number,
        int(observed.sum()),
        len(observed),
        int((observed == 0).sum()),
        float(top),
        float(np.sort(chance)[::-1][:count].sum() / chance.sum()),
        route_measures.relative_entropy(observed, chance),
      ]
    )
  return ValueTable(
    'co_activation',
    'Experts that tokens choose together',
    'Pairs of experts of one token. Chance is what the loads alone give if '
    'partners do not matter and no token chooses an expert twice. The last '
    'column is the relative entropy of the pairs to chance: 0 if loads explain '
    'them.',
    {
      'layer': 'd',
      'pairs of choices': ',d',
      'possible pairs': ',d',
      'never chosen': ',d',
      'share of the top 1 %': '.1%',
      'by chance': '.1%',
      'nats from chance': '.4f',
    },
    rows,
  )


def pair_table(
  sums: RouteSums, expected: Mapping[int, np.ndarray]
) -> ValueTable:
  """The pairs that exceed chance by the most tokens.

  The arguments are those of `co_activation_table`.
  """
  rows = []
  for number, chance in expected.items():
    pairs = sums.layers[number].pairs
    excess = np.triu(pairs - chance, 1)
    for a, b in _largest(excess):
      count = int(pairs[a, b])
      rows.append([number, a, b, count, chance[a, b], count / chance[a, b]])
  return ValueTable(
    'pairs',
    'Pairs of experts that exceed chance by the most tokens',
    '',
    {
      'layer': 'd',
      'expert': 'd',
      'with': 'd',
      'tokens': ',d',
      'by chance': ',.0f',
      'ratio': '.2f',
    },
    rows,
  )


_INFORMATION = {
  'entropy': '.3f',
  'MI': '.4f',
  'MI of shuffled': '.4f',
  '±': '.4f',
  'net': '.4f',
  'net / entropy': '.1%',
  'adjusted': '.1%',
  'best guess': '.1%',
  'of shuffled': '.1%',
  'base rate': '.1%',
}
_INFORMATION_NOTE = (
  'MI is the mutual information in nats; ± is the standard deviation over '
  'shuffles of the labels, and net is MI less the mean of the shuffles. Net '
  'MI is given as a fraction of the entropy of the experts and, adjusted, as '
  'a fraction of the most that MI can exceed the shuffles by. The best guess, '
  'the most frequent expert of each label, is right in this share of cases; '
  'the base rate is the share in which the most frequent expert of all is '
  'right.'
)


def transition_table(
  sums: RouteSums, following: Mapping[int, Information]
) -> ValueTable:
  """The table of how well the choice in one layer predicts the next.

  Args:
    sums: The sums.
    following: The information on each layer, as `route_findings.transitions`
      returns it.
  """
  rows = [
    [sums.layers[number].previous, number, *_info_cells(info)]
    for number, info in following.items()
  ]
  columns = {'from layer': 'd', 'to layer': 'd', **_INFORMATION}
  title = 'How well the expert in one layer predicts that in the next'
  note = 'Labels are the experts of first choices one sparse layer before. '
  return ValueTable(
    'transitions', title, note + _INFORMATION_NOTE, columns, rows
  )


def flow_table(sums: RouteSums) -> ValueTable:
  """The flows from layer to layer that exceed chance by the most tokens."""
  rows = []
  for number, layer in sums.layers.items():
    table = layer.following
    if layer.previous is None or not table.any():
      continue
    chance = route_measures.independent(table)
    for a, b in _largest(table - chance):
      count = int(table[a, b])
      share = count / table[a].sum()
      ratio = count / chance[a, b]
      rows.append([layer.previous, a, number, b, count, share, ratio])
  return ValueTable(
    'flows',
    'Flows between layers that exceed chance by the most tokens',
    'The share is that of the tokens of the first expert that go on to the '
    'second; the ratio is to what independent layers would give.',
    {
      'from layer': 'd',
      'expert': 'd',
      'to layer': 'd',
      'next expert': 'd',
      'tokens': ',d',
      'share': '.1%',
      'ratio': '.2f',
    },
    rows,
  )


def repeat_table(sums: RouteSums) -> ValueTable:
  """The table of consecutive tokens that choose the same experts."""
  repeats = {n: route_findings.persistence(s) for n, s in sums.layers.items()}
  return ValueTable(
    'repeats',
    'Consecutive tokens with the same expert',
    'Shares of pairs of neighbours in a document. Chance compares with a '
    'random other token of the batch; even is what even loads and random '
    'choices give. Different ids are the pairs of neighbours whose ids differ.',
    {
      'layer': 'd',
      'pairs': ',d',
      'same first choice': '.1%',
      'by chance': '.1%',
      'even': '.1%',
      'any in common': '.1%',
      'any, by chance': '.1%',
      'any, even': '.1%',
      'same first, different ids': '.1%',
    },
    [[number, *values] for number, values in repeats.items()],
  )


def specialisation_table(
  by_label: Mapping[str, Mapping[int, Information]],
) -> ValueTable:
  """The table of labels and experts; `by_label` is from `specialisation`."""
  rows = [
    [name, number, info.labels, *_info_cells(info)]
    for name, layers in by_label.items()
    for number, info in layers.items()
  ]
  columns = {'label': '', 'layer': 'd', 'labels': ',d', **_INFORMATION}
  title = 'What a token says about the expert of its first choice'
  note = (
    'Labels of tokens are shuffled among tokens, those of documents among '
    'documents. '
  )
  return ValueTable(
    'specialisation', title, note + _INFORMATION_NOTE, columns, rows
  )


def _info_cells(info: Information) -> list[Value]:
  return [
    info.entropy,
    info.mutual,
    info.shuffled,
    info.deviation,
    info.net,
    info.fraction,
    info.adjusted,
    info.accuracy,
    info.accuracy_shuffled,
    info.base_rate,
  ]


def _largest(values: np.ndarray) -> list[tuple[int, int]]:
  """Indices of the largest values above 0 of a matrix; ties: the first."""
  order = np.argsort(-values, axis=None, kind='stable')[:_MAX_LISTED]
  indices = zip(*np.unravel_index(order, values.shape), strict=True)
  return [(int(a), int(b)) for a, b in indices if values[a, b] > 0]
