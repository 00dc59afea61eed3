"""The routing report: tables of the loads and choices in each sparse layer.

Its numbers are sums over the batches of an evaluation. Not here: the evaluation
(`moe_jax.hooks`), and loads over the steps of training (`plots.py`).
"""

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Num
from rich.console import Console

from moe_jax.analysis.text_tables import ValueTable, markdown_lines
from moe_jax.errors import InputError
from moe_jax.routing.load_summary import load_summary

Row = dict[str, Any]

_LAYERS_TITLE = 'What the router of each sparse layer did'
_LAYERS_NOTE = """\
Every token chooses one or more experts; a choice is dropped if its expert is
full. The load of an expert is the number of choices that fall on it, before any
is dropped. The entropy is that of the router's probabilities over experts,
averaged over tokens; a router that is undecided among all experts has the
entropy `ln E`."""

_TOKENS_TITLE = 'Which tokens the busiest experts take'
_TOKEN_SHARE = """\
The percentage behind a token is the part of that token's own choices that fall
on this expert."""
_TOKENS_NOTE = f"""\
Choices are counted before any is dropped. The share of an expert is its part of
all choices. {_TOKEN_SHARE}"""
_TEXT = ['tokens, most frequent first']  # columns that are aligned left
_TOKENS_HEADINGS = ['layer', 'expert', 'share', *_TEXT]


@dataclasses.dataclass(frozen=True, eq=False)
class LayerStats:
  """The statistics of the router of one sparse layer in an evaluation.

  Attributes:
    layer: Number of the layer among all layers of the model, from 0.
    load: Number of choices of each expert before any is dropped.
    kept: Number of choices of each expert that are served.
    drop_rate: Dropped choices over all choices; see
      `moe_jax.routing.drop_rate`.
    drop_rate_by_choice: Drop rate of the first choices of tokens, of the second
      ones, and so on.
    entropy: Entropy in nats of the router's probabilities, averaged over
      tokens.
    router_logit_rms: Root mean square of the router's logits.
    token_counts: Number of times that each token id chose each expert, before
      any choice is dropped; None where it was not counted.
  """

  layer: int
  load: Num[np.ndarray, 'E']
  kept: Num[np.ndarray, 'E']
  drop_rate: float
  drop_rate_by_choice: Num[np.ndarray, 'K']
  entropy: float
  router_logit_rms: float
  token_counts: Num[np.ndarray, 'V E'] | None

  def __post_init__(self):
    """Raises ValueError where two fields differ in E, or more is kept."""
    layer_name, load, kept = f'layer {self.layer}', self.load, self.kept
    if kept.shape != load.shape:
      raise InputError(f'{layer_name}: kept {kept.shape} but load {load.shape}')
    if (kept > load).any():
      raise InputError(f'{layer_name}: kept={kept} exceeds load={load}')
    counts = self.token_counts
    if counts is not None and counts.shape[1:] != load.shape:
      raise InputError(
        f'{layer_name}: token_counts {counts.shape} must be [V, E={len(load)}]'
      )


def routing_table(
  layers: Sequence[LayerStats],
  token_name: Callable[[int], str],
  *,
  num_busiest: int = 3,
  num_tokens: int = 6,
) -> list[Row]:
  """The numbers of the report, a row for each layer, ready for JSON.

  A row has the keys `layer`, `num_experts`, `drop_rate`,
  `drop_rate_by_choice`, `load_max_over_mean`, `load_cv`, `entropy` (in nats),
  `entropy_fraction` (of ln E), `router_logit_rms`, `unused_experts` and
  `busiest`. The last one lists the busiest experts, each with `expert`, its
  `share` of all choices, and `tokens`: the most frequent ones, each with `id`,
  `name`, `count` and the `share` of its own choices that fall on this expert.
  Ties go to the lower number. Numbers that are undefined are None.

  Args:
    layers: The statistics of each sparse layer.
    token_name: The function from a token id to the name that is shown for it.
    num_busiest: The most experts that are listed.
    num_tokens: The most tokens that are listed for each of them.
  """
  return [
    _table_row(stats, token_name, num_busiest, num_tokens) for stats in layers
  ]


def to_markdown(table: Sequence[Row]) -> str:
  """The report as Markdown: a table of layers, then one of their busy experts.

  Args:
    table: Rows of `routing_table`. A row may have a `warning`, too, which is
      printed above the first table.
  """
  lines = ['# Routing report', '', f'## {_LAYERS_TITLE}', '', _LAYERS_NOTE, '']
  for warning in sorted({row['warning'] for row in table if 'warning' in row}):
    lines += [f'**Warning:** {warning}.', '']
  lines += markdown_lines(list(_COLUMNS), map(_layer_cells, table))
  lines += ['', f'## {_TOKENS_TITLE}', '', _TOKENS_NOTE, '']
  lines += markdown_lines(
    _TOKENS_HEADINGS, _expert_cells(table, _markdown_name), _TEXT
  )
  return '\n'.join(lines) + '\n'


def tables(table: Sequence[Row]) -> list[ValueTable]:
  """The tables of `to_markdown`, whose names show blanks."""
  layers = map(_layer_cells, table)
  experts = _expert_cells(table, _visible)
  return [
    _text_table('layers', _LAYERS_TITLE, _LAYERS_NOTE, list(_COLUMNS), layers),
    _text_table(
      'tokens', _TOKENS_TITLE, _TOKENS_NOTE, _TOKENS_HEADINGS, experts
    ),
  ]


def _text_table(name, title, note, headings, cells) -> ValueTable:
  columns = {heading: '' if heading in _TEXT else '>' for heading in headings}
  return ValueTable(name, title, note.replace('`', ''), columns, list(cells))


def print_report(console: Console, table: Sequence[Row]) -> None:
  """Prints the tables of `to_markdown`, and a note on percentages."""
  console.print(*(one.terminal() for one in tables(table)))
  if any(busy['tokens'] for row in table for busy in row['busiest']):
    console.print(_TOKEN_SHARE.replace('\n', ' '), highlight=False)


def write_report(workdir: str | os.PathLike[str], table: Sequence[Row]) -> None:
  """Writes `routing_report.md` and `routing_report.json` into a folder."""
  folder = pathlib.Path(workdir)
  text = json.dumps(list(table), indent=2, allow_nan=False, ensure_ascii=False)
  (folder / 'routing_report.json').write_text(text + '\n', encoding='utf-8')
  (folder / 'routing_report.md').write_text(
    to_markdown(table), encoding='utf-8'
  )


def _table_row(
  stats: LayerStats,
  token_name: Callable[[int], str],
  num_busiest: int,
  num_tokens: int,
) -> Row:
  load = np.asarray(stats.load, np.float64)
  num_experts, total = len(load), load.sum()
  most = math.log(num_experts)
  return {
    'layer': stats.layer,
    'num_experts': num_experts,
    'drop_rate': _finite(stats.drop_rate),
    'drop_rate_by_choice': list(map(_finite, stats.drop_rate_by_choice)),
    'entropy': _finite(stats.entropy),
    'entropy_fraction': _finite(stats.entropy / most if most else math.nan),
    'router_logit_rms': _finite(stats.router_logit_rms),
    **{key: _finite(value) for key, value in load_summary(load).items()},
    'busiest': [
      {
        'expert': expert,
        'share': float(load[expert] / total),
        'tokens': _tokens(stats.token_counts, expert, token_name, num_tokens),
      }
      for expert in _largest(load, num_busiest)
    ],
  }


def _tokens(
  counts: np.ndarray | None,
  expert: int,
  token_name: Callable[[int], str],
  at_most: int,
) -> list[Row]:
  """The tokens that an expert takes most often."""
  if counts is None:
    return []
  return [
    {
      'id': token,
      'name': token_name(token),
      'count': int(counts[token, expert]),
      'share': float(counts[token, expert] / counts[token].sum()),
    }
    for token in _largest(counts[:, expert], at_most)
  ]


def _largest(values: Num[np.ndarray, 'n'], at_most: int) -> list[int]:
  """Indices of the largest values above 0; ties go to the lower index."""
  order = np.argsort(-values.astype(np.float64), kind='stable')[:at_most]
  return [int(index) for index in order if values[index] > 0]


def _finite(value: Any) -> int | float | None:
  """A number as Python's; None for NaN and infinity, which JSON lacks."""
  value = value if isinstance(value, int) else float(value)
  return value if math.isfinite(value) else None


def _number(value: float | None, digits: int) -> str:
  return '-' if value is None else f'{value:.{digits}f}'


def _percent(value: float | None, digits: int = 0) -> str:
  return '-' if value is None else f'{100 * value:.{digits}f}%'


def _by_choice(row: Row) -> str:
  return ' / '.join(_percent(rate, 1) for rate in row['drop_rate_by_choice'])


# The columns of the table of layers: each heading, and the text of its cell.
_COLUMNS: dict[str, Callable[[Row], str]] = {
  'layer': lambda row: str(row['layer']),
  'dropped': lambda row: _percent(row['drop_rate'], 1),
  'dropped by choice': _by_choice,
  'load max / mean': lambda row: _number(row['load_max_over_mean'], 2),
  'load CV': lambda row: _number(row['load_cv'], 3),
  'entropy (nats)': lambda row: _number(row['entropy'], 3),
  'entropy / ln E': lambda row: _number(row['entropy_fraction'], 3),
  'logit RMS': lambda row: _number(row['router_logit_rms'], 2),
  'unused experts': lambda row: (
    f'{row["unused_experts"]} of {row["num_experts"]}'
  ),
}


def _layer_cells(row: Row) -> list[str]:
  return [cell(row) for cell in _COLUMNS.values()]


def _expert_cells(
  table: Sequence[Row], show_name: Callable[[str], str]
) -> Iterator[list[str]]:
  """The cells of each busy expert of each layer."""
  for row in table:
    for busy in row['busiest']:
      tokens = (
        f'{show_name(token["name"])} {_percent(token["share"])}'
        for token in busy['tokens']
      )
      yield [
        str(row['layer']),
        str(busy['expert']),
        _percent(busy['share']),
        ', '.join(tokens),
      ]


def _visible(name: str) -> str:
  r"""A name whose blanks show: `␣` for a space, `\n` for a line's end."""
  if not name:
    return "''"
  return ''.join(
    c if c.isprintable() else c.encode('unicode_escape').decode()
    for c in name.replace(' ', '␣')
  )


def _markdown_name(name: str) -> str:
  """A name as a code span, in which only bars of a table are escaped."""
  text = _visible(name).replace('|', r'\|')
  # The fence of a span is longer than any run of backticks within.
  runs = [len(run) for run in re.findall('`+', text)]
  fence = '`' * (1 + max(runs, default=0))
  return f'{fence} {text} {fence}' if runs else f'{fence}{text}{fence}'
