"""What the routers did over an evaluation, a row per sparse layer.

Not here: the evaluation that counts, and loads over training time (`plots`).
"""

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Num
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moe_jax.routing.load_summary import load_summary

_LAYERS_TITLE = 'What the router of each sparse layer did'
_LAYERS_NOTE = """\
Load is assignments (a token's choices of an expert) per expert, before drops.
Entropy is that of the router's probabilities over experts, mean over tokens;
`ln E` is undecided."""
_LAYERS_HEADINGS = [
  'layer',
  'dropped',
  'by choice',
  'load max / mean',
  'load CV',
  'entropy (nats)',
  'entropy / ln E',
  'logit RMS',
  'unused experts',
]

_TOKENS_TITLE = 'What the busiest experts take most'
_TOKENS_NOTE = """\
Before drops. An expert's share is of all assignments; the share behind a token
is how much of that token's assignments go to this expert."""
_TEXT = ['tokens, most frequent first']  # aligned left
_TOKENS_HEADINGS = ['layer', 'expert', 'share', *_TEXT]


@dataclasses.dataclass(frozen=True, eq=False)
class LayerStats:
  """One sparse layer's router over an evaluation.

  Attributes:
    layer: Its index among the model's layers.
    load: Assignments per expert before drops.
    kept: Assignments per expert after drops.
    drop_rate: Fraction dropped of all choices; see `moe_jax.routing.drop_rate`.
    drop_rate_by_choice: Fraction dropped of the first choices, of the second
      ones, ...
    entropy: Of the router's probabilities, nats, mean over tokens.
    router_logit_rms: Root mean square of the router's logits.
    token_counts: How often each token id was assigned to each expert before
      drops; None where nobody counted.
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
    where, load, kept = f'layer {self.layer}', self.load, self.kept
    if kept.shape != load.shape:
      raise ValueError(f'{where}: kept {kept.shape} but load {load.shape}')
    if (kept > load).any():
      raise ValueError(f'{where}: kept={kept} exceeds load={load}')
    counts = self.token_counts
    if counts is not None and counts.shape[1:] != load.shape:
      raise ValueError(
        f'{where}: token_counts {counts.shape} must be [V, E={len(load)}]'
      )


def routing_table(
  layers: Sequence[LayerStats],
  token_name: Callable[[int], str],
  *,
  num_busiest: int = 3,
  num_tokens: int = 6,
) -> list[dict[str, Any]]:
  """The report's numbers, ready for JSON; undefined ones are None.

  Rows have the keys `layer`, `num_experts`, `drop_rate`,
  `drop_rate_by_choice`, `load_max_over_mean`, `load_cv`, `entropy` (nats),
  `entropy_fraction` (of ln E), `router_logit_rms`, `unused_experts` and
  `busiest`: up to `num_busiest` experts that took anything, with `expert`,
  `share` of all assignments, and `tokens`: up to `num_tokens`, most frequent
  first, with `id`, `name`, `count` and `share` of the token's own assignments.
  Ties go to the lower id.
  """
  return [
    _table_row(stats, token_name, num_busiest, num_tokens) for stats in layers
  ]


def to_markdown(table: Sequence[dict[str, Any]]) -> str:
  """GitHub's Markdown: a table by layer, then one of the busiest experts.

  A row may have a `warning` beside `routing_table`'s keys; each is printed.
  """
  lines = ['# Routing report', '', f'## {_LAYERS_TITLE}', '', _LAYERS_NOTE, '']
  for warning in sorted({row['warning'] for row in table if 'warning' in row}):
    lines += [f'**Warning:** {warning}.', '']
  lines += _markdown(_LAYERS_HEADINGS, map(_layer_cells, table))
  lines += ['', f'## {_TOKENS_TITLE}', '', _TOKENS_NOTE, '']
  lines += _markdown(_TOKENS_HEADINGS, _expert_cells(table, _markdown_name))
  return '\n'.join(lines) + '\n'


def print_report(console: Console, table: Sequence[dict[str, Any]]) -> None:
  """The two tables of `to_markdown` on a terminal."""
  layers = _terminal(_LAYERS_TITLE, _LAYERS_HEADINGS, map(_layer_cells, table))
  experts = _terminal(
    _TOKENS_TITLE, _TOKENS_HEADINGS, _expert_cells(table, _visible)
  )
  console.print(layers, experts)


def write_report(
  workdir: str | os.PathLike[str], table: Sequence[dict[str, Any]]
) -> None:
  """Writes `routing_report.md` and `routing_report.json` into the workdir."""
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
) -> dict[str, Any]:
  load = np.asarray(stats.load, np.float64)
  num_experts, total = len(load), load.sum()
  most = math.log(num_experts)
  busiest = _largest(load, num_busiest)
  return {
    'layer': stats.layer,
    'num_experts': num_experts,
    'drop_rate': _finite(stats.drop_rate),
    'drop_rate_by_choice': [
      _finite(rate) for rate in stats.drop_rate_by_choice
    ],
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
      for expert in busiest
    ],
  }


def _tokens(
  counts: np.ndarray | None,
  expert: int,
  token_name: Callable[[int], str],
  at_most: int,
) -> list[dict[str, Any]]:
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
  """Indices of the largest values above 0, ties by index."""
  order = np.argsort(-values.astype(np.float64), kind='stable')[:at_most]
  return [int(index) for index in order if values[index] > 0]


def _finite(value: Any) -> Any:
  """As Python's number; JSON has no NaN, so what is undefined is None."""
  value = value if isinstance(value, int) else float(value)
  return value if math.isfinite(value) else None


def _layer_cells(row: dict[str, Any]) -> list[str]:
  return [
    str(row['layer']),
    _percent(row['drop_rate'], 1),
    ' / '.join(_percent(rate, 1) for rate in row['drop_rate_by_choice']),
    _number(row['load_max_over_mean'], 2),
    _number(row['load_cv'], 3),
    _number(row['entropy'], 3),
    _number(row['entropy_fraction'], 3),
    _number(row['router_logit_rms'], 2),
    f'{row["unused_experts"]} of {row["num_experts"]}',
  ]


def _expert_cells(
  table: Sequence[dict[str, Any]], show_name: Callable[[str], str]
) -> Iterator[list[str]]:
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


def _markdown(
  headings: Sequence[str], rows: Iterable[Sequence[str]]
) -> list[str]:
  rules = [':---' if heading in _TEXT else '---:' for heading in headings]
  return [f'| {" | ".join(cells)} |' for cells in [headings, rules, *rows]]


def _terminal(
  title: str, headings: Sequence[str], rows: Iterable[Sequence[str]]
) -> Table:
  table = Table(
    title=title, title_justify='left', box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
  )
  for heading in headings:
    justify = 'left' if heading in _TEXT else 'right'
    table.add_column(heading, justify=justify)
  for cells in rows:
    # Text, not str: a token may look like rich's markup.
    table.add_row(*map(Text, cells))
  return table


def _number(value: float | None, digits: int) -> str:
  return '-' if value is None else f'{value:.{digits}f}'


def _percent(value: float | None, digits: int = 0) -> str:
  return '-' if value is None else f'{100 * value:.{digits}f}%'


def _visible(name: str) -> str:
  r"""A name without blanks: `␣` is a space, `\n` a line's end, `''` empty."""
  if not name:
    return "''"
  return ''.join(
    '␣'
    if letter == ' '
    else letter
    if letter.isprintable()
    else letter.encode('unicode_escape').decode()
    for letter in name
  )


def _markdown_name(name: str) -> str:
  """A code span, in which a table's cell needs only its bar escaped."""
  text = _visible(name).replace('|', r'\|')
  # A span's fence is longer than any run of backticks within.
  runs = [len(run) for run in re.findall('`+', text)]
  fence = '`' * (1 + max(runs, default=0))
  return f'{fence} {text} {fence}' if runs else f'{fence}{text}{fence}'
