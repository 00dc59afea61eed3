"""Numbers of the routing report, computed by hand."""

import io
import json
import math

import jaxtyping
import numpy as np
import pytest
from rich.console import Console

from moe_jax.analysis.routing_report import (
  LayerStats,
  print_report,
  routing_table,
  to_markdown,
  write_report,
)
from moe_jax.routing.load_summary import load_summary

# Counts of four tokens and three experts; token 2 does not occur, and expert 2
# gets no token.
COUNTS = np.array(
  [
    [6, 2, 0],
    [6, 0, 0],
    [0, 0, 0],
    [1, 5, 0],
  ]
)
NAMES = [' ', '|', 'never seen', '[b]`x']


def stats(**changes):
  fields = {
    'layer': 3,
    'load': COUNTS.sum(axis=0),  # [13, 7, 0]
    'kept': np.array([9, 7, 0]),
    'drop_rate': 0.2,
    'drop_rate_by_choice': np.array([0.1, 0.3]),
    'entropy': math.log(3) / 2,
    'router_logit_rms': 1.25,
    'token_counts': COUNTS,
  }
  return LayerStats(**fields | changes)


def table(**changes):
  return routing_table([stats(**changes)], NAMES.__getitem__)


def test_load_summary_by_hand():
  # The mean is 2, and deviations of 2, 0, -1, -1 have a variance of 6/4.
  summary = load_summary(np.array([4, 2, 1, 1]))
  assert summary['load_cv'] == pytest.approx(math.sqrt(1.5) / 2)
  assert summary['load_max_over_mean'] == 2.0
  assert summary['unused_experts'] == 0
  # The coefficient of variation is 0 for even loads; with all on one of five
  # experts it is sqrt(E - 1) and the largest share E times even.
  assert load_summary(np.full(5, 0.2)) == {
    'load_cv': pytest.approx(0, abs=1e-12),
    'load_max_over_mean': pytest.approx(1),
    'unused_experts': 0,
  }
  assert load_summary(np.array([0.0, 7.0, 0.0, 0.0, 0.0])) == {
    'load_cv': 2.0,
    'load_max_over_mean': 5.0,
    'unused_experts': 4,
  }


def test_load_summary_of_nothing_is_undefined():
  summary = load_summary(np.zeros(3))
  assert math.isnan(summary['load_cv'])
  assert math.isnan(summary['load_max_over_mean'])
  assert summary['unused_experts'] == 3


@pytest.mark.parametrize('load', [[1.0, -1.0], [1.0, math.nan], []])
def test_load_summary_refuses_what_is_no_load(load):
  with pytest.raises(ValueError, match='load'):
    load_summary(np.array(load))


def test_table_by_hand():
  (row,) = table()
  busiest = row.pop('busiest')
  assert row == {
    'layer': 3,
    'num_experts': 3,
    'drop_rate': 0.2,
    'drop_rate_by_choice': [0.1, 0.3],
    'entropy': pytest.approx(math.log(3) / 2),
    'entropy_fraction': pytest.approx(0.5),
    'router_logit_rms': 1.25,
    # The mean is 20/3; deviations 19/3, 1/3, -20/3 have a variance of 762/27.
    'load_max_over_mean': pytest.approx(1.95),
    'load_cv': pytest.approx(math.sqrt(762 / 27) / (20 / 3)),
    'unused_experts': 1,
  }
  # Expert 2 got no token and is not listed, and neither are tokens without an
  # expert. Tokens 0 and 1 tie at 6: the lower id comes first.
  assert busiest == [
    {
      'expert': 0,
      'share': 0.65,
      'tokens': [
        {'id': 0, 'name': ' ', 'count': 6, 'share': 0.75},
        {'id': 1, 'name': '|', 'count': 6, 'share': 1.0},
        {'id': 3, 'name': '[b]`x', 'count': 1, 'share': pytest.approx(1 / 6)},
      ],
    },
    {
      'expert': 1,
      'share': 0.35,
      'tokens': [
        {'id': 3, 'name': '[b]`x', 'count': 5, 'share': pytest.approx(5 / 6)},
        {'id': 0, 'name': ' ', 'count': 2, 'share': 0.25},
      ],
    },
  ]


def test_choices_that_were_not_sent_are_not_dropped():
  # A fifth of the choices is not served, as they were never sent.
  (row,) = table(drop_rate=0.0, drop_rate_by_choice=np.zeros(2))
  assert row['drop_rate'] == 0.0
  assert '| 3 | 0.0% | 0.0% / 0.0% |' in to_markdown([row])


def test_table_can_be_cut():
  (row,) = routing_table(
    [stats()], NAMES.__getitem__, num_busiest=1, num_tokens=2
  )
  (busy,) = row['busiest']
  assert [token['id'] for token in busy['tokens']] == [0, 1]


def test_undefined_numbers_are_none():
  # A single expert has no entropy; without tokens there is no rate.
  (row,) = table(
    load=np.zeros(1),
    kept=np.zeros(1),
    drop_rate=math.nan,
    drop_rate_by_choice=np.array([math.nan]),
    entropy=0.0,
    token_counts=None,
  )
  for key in ['drop_rate', 'entropy_fraction', 'load_cv']:
    assert row[key] is None
  assert row['drop_rate_by_choice'] == [None]
  assert row['busiest'] == []
  assert '| 3 | - | - | - | - | 0.000 | - | 1.25 | 1 of 1 |' in to_markdown(
    [row]
  )


def test_markdown_has_a_row_per_layer_and_per_busy_expert():
  lines = to_markdown(
    routing_table([stats(), stats(layer=5)], NAMES.__getitem__)
  ).splitlines()
  numbers = '20.0% | 10.0% / 30.0% | 1.95 | 0.797 | 0.549 | 0.500 | 1.25'
  assert f'| 3 | {numbers} | 1 of 3 |' in lines
  assert f'| 5 | {numbers} | 1 of 3 |' in lines
  # Blanks in a token's name are shown, a bar does not end its cell and a
  # backtick not its code span.
  assert r'| 3 | 0 | 65% | `␣` 75%, `\|` 100%, `` [b]`x `` 17% |' in lines
  assert '| 5 | 1 | 35% | `` [b]`x `` 83%, `␣` 25% |' in lines
  heads = [i for i, line in enumerate(lines) if line.startswith('| layer')]
  for head in heads:
    bars = [line.count(' |') for line in lines[head : head + 3]]
    assert len(set(bars)) == 1


def test_names_that_would_not_show(tmp_path):
  names = ['\n', '', '\x00é', 'a b']
  (row,) = routing_table([stats()], names.__getitem__)
  text = to_markdown([row])
  assert r'`\n` 75%' in text
  assert "`''` 100%" in text
  assert '`a␣b` 17%' in text


def test_terminal_shows_the_same_without_reading_markup():
  out = io.StringIO()
  print_report(Console(file=out, width=120), table())
  (layer,) = [line for line in out.getvalue().splitlines() if '0.797' in line]
  assert ' '.join(layer.split()) == (
    '3 20.0% 10.0% / 30.0% 1.95 0.797 0.549 0.500 1.25 1 of 3'
  )
  assert '3       0    65%  ␣ 75%, | 100%, [b]`x 17%' in out.getvalue()


def test_written_files_read_back(tmp_path):
  rows = table(entropy=math.nan)
  write_report(tmp_path, rows)
  assert json.loads((tmp_path / 'routing_report.json').read_text()) == rows
  assert (tmp_path / 'routing_report.md').read_text() == to_markdown(rows)


def test_more_kept_than_assigned_is_refused():
  with pytest.raises(ValueError, match=r'layer 3: kept=\[14  7  0\] exceeds'):
    stats(kept=np.array([14, 7, 0]))


def test_fields_of_another_size_are_refused(monkeypatch):
  # This turns off the import hook of the tests, which checks annotations.
  monkeypatch.setattr(jaxtyping.config, 'jaxtyping_disable', True)
  with pytest.raises(ValueError, match=r'kept \(2,\) but load \(3,\)'):
    stats(kept=np.array([9, 7]))
  with pytest.raises(ValueError, match=r'\(3, 4\) must be \[V, E=3\]'):
    stats(token_counts=COUNTS.T)
