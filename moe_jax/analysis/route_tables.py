"""Tables of loads, drops, gates and churn, layer by layer.

Not here: tables of choices that go together (`route_link_tables.py`), the
numbers (`route_findings.py`), and the sentences and pictures that stand beside
them on a page (`route_sections.py`).
"""

import math
from collections.abc import Sequence

import numpy as np

from moe_jax.analysis import route_findings, route_measures
from moe_jax.analysis.route_churn import Change
from moe_jax.analysis.route_sums import LayerSums, RouteSums
from moe_jax.analysis.text_tables import ValueTable
from moe_jax.routing.load_summary import load_summary

_QUARTERS = 4
UNSENT = (
  'In training, choices that a second policy did not send are among them.'
)


def load_table(sums: RouteSums) -> ValueTable:
  """The load of each layer over the whole trace, before drops."""
  rows = []
  for number, layer in sums.layers.items():
    load = layer.load
    percentiles = route_measures.load_percentiles(load)
    summary = load_summary(load)
    maximum = math.log(len(load))
    rows.append(
      [
        number,
        len(load),
        *(percentiles[p] for p in (0, 10, 50, 90)),
        summary['load_max_over_mean'],
        summary['load_cv'],
        summary['unused_experts'],
        route_measures.entropy(load) / maximum if maximum else math.nan,
      ]
    )
  return ValueTable(
    'load',
    'Load of experts in each layer',
    'The load of an expert is the number of choices that fall on it, before '
    'any is dropped, over the mean of its layer: 1 is an even share. The '
    'columns from least to most are percentiles over experts. CV is the '
    'standard deviation over the mean. The entropy of the load over ln E is 1 '
    'if all experts are chosen equally often, and 0 if one takes all.',
    {
      'layer': 'd',
      'experts': 'd',
      'least': '.2f',
      '10 %': '.2f',
      'median': '.2f',
      '90 %': '.2f',
      'most': '.2f',
      'CV': '.3f',
      'unused': 'd',
      'entropy / ln E': '.3f',
    },
    rows,
  )


def batch_load_table(sums: RouteSums) -> ValueTable:
  """Percentiles over batches of how uneven the load of each layer is."""
  rows = []
  for number, layer in sums.layers.items():
    most, cv, unused = (
      np.array([batch[key] for batch in layer.evenness], np.float64)
      for key in ('load_max_over_mean', 'load_cv', 'unused_experts')
    )
    values = [*_percentiles(most, (5, 50, 95, 100)), *_percentiles(cv, (5, 50))]
    rows.append([number, *values, *_percentiles(cv, (95,)), unused.mean()])
  headings = ['5 %', 'median', '95 %', 'largest']
  return ValueTable(
    'load_by_batch',
    'Load within single batches',
    'Percentiles over batches of the load of the busiest expert over the mean '
    'load, and of the CV of the loads. Capacity has to hold what a batch '
    'sends, not what the whole trace does.',
    {
      'layer': 'd',
      **{f'most, {column}': '.2f' for column in headings},
      **{f'CV, {column}': '.3f' for column in headings[:3]},
      'unused, mean': '.1f',
    },
    rows,
  )


def expert_table(sums: RouteSums) -> ValueTable:
  """Choices of every single expert."""
  rows = [
    [number, expert, int(load), int(kept), int(first), _over_mean(layer, load)]
    for number, layer in sums.layers.items()
    for expert, (load, kept, first) in enumerate(
      zip(layer.load, layer.kept, layer.first, strict=True)
    )
  ]
  return ValueTable(
    'experts',
    'Load of every expert',
    'Choices before drops, those that were served, first choices, and the '
    'load over the mean load of the layer.',
    {
      'layer': 'd',
      'expert': 'd',
      'choices': ',d',
      'served': ',d',
      'first choices': ',d',
      'load / mean': '.3f',
    },
    rows,
  )


def drop_table(sums: RouteSums) -> ValueTable:
  """Dropped choices of each layer, by rank and by quarter of the row."""
  ranks = min(2, max(_ranks(layer) for layer in sums.layers.values()))
  rows = []
  for number, layer in sums.layers.items():
    drop_rates = route_findings.drop_rates
    rank_rates = [
      dropped / chosen if chosen else math.nan
      for chosen, dropped in layer.by_rank[:ranks]
    ]
    by_column, by_position = layer.by_column, layer.by_position
    unserved_rates = route_findings.unserved_rates
    rows.append(
      [
        number,
        *map(float, drop_rates(by_column, 1)),
        *map(float, rank_rates),
        *map(float, unserved_rates(by_column, 1)),
        *map(float, drop_rates(by_column, _QUARTERS)),
        *map(float, unserved_rates(by_column, _QUARTERS)[[0, -1]]),
        *map(float, drop_rates(by_position, _QUARTERS)[[0, -1]]),
      ]
    )
  names = ['first choices', 'second choices'][:ranks]
  quarters = [f'row, quarter {i + 1}' for i in range(_QUARTERS)]
  unsent = any(s.info.second_policy != 'all' for s in sums.layers.values())
  columns = [
    'not served' if unsent else 'dropped',
    *names,
    'tokens unserved',
    *quarters,
    'unserved, quarter 1',
    f'unserved, quarter {_QUARTERS}',
    'document, quarter 1',
    f'document, quarter {_QUARTERS}',
  ]
  return ValueTable(
    'drops',
    'Dropped choices by rank and by place',
    'Shares of choices that were not served. An unserved token has no '
    'expert at all, because its choices were dropped or no expert took it. '
    'Quarters of the row are places in it; quarters of the document are places '
    'in the document, in units of the length of a row.' + f' {UNSENT}' * unsent,
    {'layer': 'd', **{name: '.1%' for name in columns}},
    rows,
  )


def gate_table(sums: RouteSums) -> ValueTable:
  """Gates of the served choices, and how decided the router is."""
  rows = []
  for number, layer in sums.layers.items():
    gates = route_findings.gates(layer)
    means = (*gates.means, math.nan, math.nan)[:2]
    rows.append([number, *means, *gates[1:]])
  return ValueTable(
    'gates',
    'Gates and the entropy of routers',
    'Gates of served choices. Percentiles are those of first choices, to '
    "0.01. The entropy of the router's softmax is in nats, averaged over "
    'tokens; it needs logits in the trace. For a router with more columns '
    'than experts, E stands for its number of columns.',
    {
      'layer': 'd',
      'first, mean': '.3f',
      'second, mean': '.3f',
      'first, 10 %': '.2f',
      'first, median': '.2f',
      'first, 90 %': '.2f',
      'router entropy': '.3f',
      'router entropy / ln E': '.3f',
    },
    rows,
  )


def churn_table(name: str, title: str, changes: Sequence[Change]) -> ValueTable:
  """The changes of choices between two steps or two traces.

  Args:
    name: Name of the table's file.
    title: Its title.
    changes: A row is made of each layer of each change.
  """
  rows = [
    [c.step, c.other, number, a.tokens, a.churn, a.churn_all, a.overlap]
    for c in changes
    for number, a in c.layers.items()
  ]
  return ValueTable(
    name,
    title,
    'Shares of the same tokens that have another first choice, and that chose '
    'another set of experts. The overlap is the share of choices that both '
    'have.',
    {
      'step': 'd',
      'against step': 'd',
      'layer': 'd',
      'tokens': ',d',
      'first choice changed': '.1%',
      'any choice changed': '.1%',
      'overlap': '.1%',
    },
    rows,
  )


def _over_mean(layer: LayerSums, load: int) -> float:
  mean = layer.load.mean()
  return float(load / mean) if mean else math.nan


def _percentiles(values: np.ndarray, percents: Sequence[int]) -> list[float]:
  finite = values[np.isfinite(values)]
  if not finite.size:
    return [math.nan] * len(percents)
  return [float(v) for v in np.percentile(finite, percents)]


def _ranks(layer: LayerSums) -> int:
  return max(int((layer.by_rank[:, 0] > 0).sum()), 1)
