"""Sections of a report on a trace: sentences, pictures and tables.

Not here: sections on changes of choices (`route_comparisons.py`), and how they
are printed and written (`route_page.py`).
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from moe_jax.analysis import (
  plot_style,
  plots,
  route_findings,
  route_lines,
  route_link_tables,
  route_plots,
  route_tables,
)
from moe_jax.analysis.route_findings import Findings
from moe_jax.analysis.text_tables import ValueTable
from moe_jax.routing.load_summary import load_summary


class Section(NamedTuple):
  """One section of a report.

  Attributes:
    name: A short name, which names of files may have.
    title: One line.
    sentences: Sentences on what the pictures mean and what stands out.
    figures: The pictures by their names.
    tables: The tables; those with many rows come last.
    texts: Coloured texts by their titles, as HTML; the page alone has them.
  """

  name: str
  title: str
  sentences: list[str]
  figures: dict[str, Figure]
  tables: list[ValueTable]
  texts: Mapping[str, str] = MappingProxyType({})


def sections(findings: Findings) -> list[Section]:
  """The sections on one trace, without those that it has nothing for."""
  makers: list[Callable[[Findings], Section | None]] = [
    _load,
    _pairs,
    _layers,
    _neighbours,
    _labels,
    _drops,
    _gates,
  ]
  candidates = (make(findings) for make in makers)
  return [section for section in candidates if section is not None]


def _load(findings: Findings) -> Section:
  sums = findings.sums
  loads = {n: load_summary(layer.load) for n, layer in sums.layers.items()}
  most = {n: summary['load_max_over_mean'] for n, summary in loads.items()}
  unused = sum(summary['unused_experts'] for summary in loads.values())
  experts = sum(layer.info.num_experts for layer in sums.layers.values())
  sentences = [
    'Each cell of the first picture is an expert, whose load is over the mean '
    f'of its layer. {plot_style.HOW_TO_READ} '
    'Beside it, the bar holds the middle 80 % of the experts of a layer.',
    f'The busiest expert gets {span(most, ".1f")} times the mean load of its '
    f'layer. Of the {experts:,} experts of all layers, {unused:,} are never '
    'chosen.',
  ]
  figures = {'load': route_plots.load_figure(sums)}
  if len(sums.times) > 1:
    sentences.append(
      'The second picture is the load over steps; a router that settles shows '
      'horizontal stripes.'
    )
    figures['load_over_time'] = plots.load_figure(_load_rows(findings))
  return Section(
    'load',
    'Load',
    sentences,
    figures,
    [
      route_tables.load_table(sums),
      route_tables.batch_load_table(sums),
      route_tables.expert_table(sums),
    ],
  )


def _load_rows(findings: Findings) -> list[dict[str, object]]:
  """Shares of load as the metrics of a run have them."""
  rows: list[dict[str, object]] = []
  for i, step in enumerate(findings.sums.times):
    row: dict[str, object] = {'step': float(step)}
    for number, layer in findings.sums.layers.items():
      load = layer.over_time[i]
      share = load / load.sum() if load.any() else load * math.nan
      row[f'train/layer_{number}/load'] = share
    rows.append(row)
  return rows


def _pairs(findings: Findings) -> Section | None:
  if not findings.expected:
    return None
  table = route_link_tables.co_activation_table(
    findings.sums, findings.expected
  )
  nats: dict[Any, Any] = {row[0]: row[-1] for row in table.rows}
  return Section(
    'pairs',
    'Experts that are chosen together',
    [
      'A token that chooses several experts chooses pairs of them. A cell is '
      'the number of tokens of a pair over what the loads of the two explain. '
      f'{plot_style.HOW_TO_READ}',
      'Experts that always go together do the work of one.',
      f'Pairs are {span(nats, ".3f")} nats away from what loads explain; 0 '
      'would be no preference at all, beyond the noise of few tokens.',
    ],
    {
      'co_activation': route_plots.co_activation_figure(
        findings.sums, findings.expected
      )
    },
    [table, route_link_tables.pair_table(findings.sums, findings.expected)],
  )


def _layers(findings: Findings) -> Section | None:
  if not findings.following:
    return None
  sums, infos = findings.sums, findings.following
  net = {n: 100 * info.fraction for n, info in infos.items()}
  gain = {
    n: 100 * (info.accuracy - info.base_rate) for n, info in infos.items()
  }
  sequences = {sums.layers[n].info.sequence for n in infos}
  flows = {
    f'flow{"_" * bool(s)}{s}': route_plots.flow_figure(sums, s)
    for s in sorted(sequences)
  }
  return Section(
    'layers',
    'From layer to layer',
    [
      'The first choice of a token in one sparse layer may tell that in the '
      'next. If it does, the experts of the next layer could be fetched '
      'before their router has run.',
      f'The choice in one layer tells {span(net, ".1f")} % of the entropy of '
      'the next one. Guessing the expert that follows most often is right '
      f'for {span(gain, ".1f")} percentage points more of the tokens than '
      'always guessing the busiest expert.',
      'In the heat maps, rows are experts of one layer and columns those of '
      'the next; in the picture of flows, thick lines are many tokens and dark '
      'lines are far from chance.',
    ],
    {
      'prediction': route_lines.prediction_figure(infos),
      **flows,
      'transitions': route_plots.transition_figure(sums),
    },
    [
      route_link_tables.transition_table(sums, infos),
      route_link_tables.flow_table(sums),
    ],
  )


def _neighbours(findings: Findings) -> Section | None:
  layers = findings.sums.layers
  repeats = {n: route_findings.persistence(s) for n, s in layers.items()}
  if not any(one.pairs for one in repeats.values()):
    return None
  ratio = {n: _ratio(one.first, one.first_chance) for n, one in repeats.items()}
  any_ratio = {n: _ratio(one.any, one.any_chance) for n, one in repeats.items()}
  return Section(
    'neighbours',
    'Consecutive tokens',
    [
      'Neighbours in a text may go to the same expert more often than by '
      'chance, which makes hot spots on devices, and which caches of experts '
      'can use. Chance is measured with a random other token of the same '
      'batch, which has the same loads.',
      f'Consecutive tokens share their first choice {span(ratio, ".2f")} '
      'times as often as random tokens do, and any expert '
      f'{span(any_ratio, ".2f")} times as often. The line for different ids '
      'leaves out runs of one token, such as spaces.',
    ],
    {'repeats': route_lines.repeat_figure(findings.sums)},
    [route_link_tables.repeat_table(findings.sums)],
  )


def _labels(findings: Findings) -> Section:
  readings = []
  for name, layers in findings.labels.items():
    share = {n: 100 * info.adjusted for n, info in layers.items()}
    readings.append(f'the {name} {span(share, ".1f")} %')
  return Section(
    'labels',
    'What experts specialise in',
    [
      'If a label of a token, such as its id, tells the expert, the two have '
      'mutual information. Few tokens of a label look as if they agreed, so '
      'the same is measured with shuffled labels and taken away. 0 is no '
      'specialisation; 100 % means that the label determines the expert. Bars '
      'are the standard deviation of shuffles.',
      'As a part of the most that labels could tell, over layers: '
      + '; '.join(readings)
      + '.',
    ],
    {'specialisation': route_lines.information_figure(findings.labels)},
    [route_link_tables.specialisation_table(findings.labels)],
  )


def _drops(findings: Findings) -> Section:
  layers = findings.sums.layers
  unsent = any(s.info.second_policy != 'all' for s in layers.values())
  dropped, unserved = (
    {n: 100 * float(rates(s.by_column, 1)[0]) for n, s in layers.items()}
    for rates in (route_findings.drop_rates, route_findings.unserved_rates)
  )
  title = 'Drops by place'
  if not any(rate > 0 for rate in (*dropped.values(), *unserved.values())):
    sentence = 'No choice is dropped, and no token is without an expert.'
    return Section('drops', title, [sentence], {}, [])
  return Section(
    'drops',
    title,
    [
      'Choices are dropped where an expert has no room left. If tokens are '
      'served in the order of their row, those at its end are dropped more; '
      'the place in the document shows the effect on texts.',
      f'{span(dropped, ".1f")} % of choices are '
      f'{"not served" if unsent else "dropped"}, and '
      f'{span(unserved, ".1f")} % of tokens have no expert at all.',
      *[route_tables.UNSENT] * unsent,
    ],
    {'drops': route_lines.drop_figure(findings.sums)},
    [route_tables.drop_table(findings.sums)],
  )


def _gates(findings: Findings) -> Section:
  layers = findings.sums.layers
  means = {n: route_findings.gates(s).means for n, s in layers.items()}
  first = {n: (*mean, math.nan)[0] for n, mean in means.items()}
  return Section(
    'gates',
    'Gates and entropy',
    [
      'A gate is the weight of the output of an expert. Gates near 1 say that '
      'the router is sure. The entropy of the load over ln E is 1 if all '
      'experts are chosen equally often over the whole trace. The entropy of '
      'the router is the mean over single tokens, and small if the router is '
      'sure of the expert of each.',
      f'The mean gate of served first choices is {span(first, ".2f")}.',
    ],
    {'gates': route_lines.gate_figure(findings.sums)},
    [route_tables.gate_table(findings.sums)],
  )


def span(values: Mapping[int, float], form: str) -> str:
  """The least and the largest value: '1.2 (layer 3) to 4.5 (layer 7)'.

  Args:
    values: The values by layer; NaN are left out.
    form: The format of a value.
  """
  finite = {n: v for n, v in values.items() if not math.isnan(v)}
  if not finite:
    return 'unknown'
  low, high = (pick(finite, key=lambda n: finite[n]) for pick in (min, max))
  least, most = format(finite[low], form), format(finite[high], form)
  if least == most:
    return least
  return f'{least} (layer {low}) to {most} (layer {high})'


def _ratio(value: float, chance: float) -> float:
  return value / chance if chance else math.nan
