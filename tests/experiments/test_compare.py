"""Runs side by side: their groups, differences and pairs, and their page."""

import json

import pytest

from experiments import compare
from experiments.study import compared_runs, compared_tables
from moe_jax.runs import workdir as workdir_lib
from tests.analysis.test_run_page import Reader, folder_of

# Last losses of two configs, each with the seeds 0, 1 and 2: the second config
# is lower by 0.25, 0.5 and 0.75, so by 0.5 with Student's half width 0.621.
LOSSES = {4: [3.0, 3.5, 4.0], 8: [2.75, 3.0, 3.25]}
KEY = 'model.moe.num_experts'


def run_of(path, num_experts, seed, loss):
  """A folder of two steps, whose training losses are 2 and 1 times a loss."""
  rows = [(step, {'train/loss': 2 * loss / step}) for step in (1, 2)]
  rows.append((2, {'eval/main/loss': loss, 'eval/main/layer_1/load': [1.0]}))
  model = {'moe': {'num_experts': num_experts}}
  folder = folder_of(path, rows, seed=seed, total_steps=2, model=model)
  (folder / workdir_lib.TOKENIZER).write_text('{"kind": "bytes"}')
  layer = {'layer': 1, 'num_experts': num_experts, 'drop_rate': loss / 8}
  layer |= {'drop_rate_by_choice': [0.5], 'entropy': 1.0, 'busiest': []}
  layer |= {'entropy_fraction': 0.5, 'router_logit_rms': 1.0, 'load_cv': 0.5}
  layer |= {'load_max_over_mean': 2.0, 'unused_experts': 0}
  (folder / 'routing_report.json').write_text(json.dumps([layer]))
  return folder


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """Folders of six runs, of two configs with three seeds each."""
  folder = tmp_path_factory.mktemp('runs')
  return [
    run_of(folder / f'{num_experts}_{seed}', num_experts, seed, loss)
    for num_experts, losses in LOSSES.items()
    for seed, loss in enumerate(losses)
  ]


def rows_of(groups, name):
  tables = {table.name: table for table in compared_tables.tables(groups)}
  return [list(row) for row in tables[name].rows]


def test_runs_of_one_config_are_a_group(runs):
  groups = compared_runs.read([runs[3], *runs[:3]])
  seeds = {
    letter: [run.seed for run in group] for letter, group in groups.items()
  }
  assert seeds == {'A': [0], 'B': [0, 1, 2]}
  assert rows_of(groups, 'configs') == [[KEY, '8', '4']]


def test_differences_are_paired_by_seed(runs):
  # The order of the seeds says nothing.
  groups = compared_runs.read([*runs[:3], runs[5], runs[3], runs[4]])
  paired = ['B minus A', 'eval/main/loss', '3', '-0.5000 ± 0.6210']
  assert [*paired, 'not told apart'] in rows_of(groups, 'paired')
  last = ['eval/main/loss', '3.5000 ± 1.2421', '3.0000 ± 0.6210']
  assert last in rows_of(groups, 'metrics')


def test_a_seed_that_only_one_group_has_is_in_no_pair(runs):
  # Seeds 0 and 2 differ by -0.25 and -0.75; 12.706 standard errors of 0.25.
  groups = compared_runs.read([*runs[:3], runs[3], runs[5]])
  paired = ['B minus A', 'eval/main/loss', '2', '-0.5000 ± 3.1766']
  assert [*paired, 'not told apart'] in rows_of(groups, 'paired')


def test_starts_of_other_lengths_are_other_groups(tmp_path):
  # By name the long start of seed 1 would come before the short one.
  names = {
    'short': ('seed0-aaaaaaaaaa', 'seed1-bbbbbbbbbb'),
    'long': ('seed0-cccccccccc', 'seed1-0000000000'),
  }
  runs = []
  for seed in range(2):
    for length in sorted(names, key=lambda length: names[length][seed]):
      start = tmp_path / 'starts' / names[length][seed]
      folder_of(start, seed=seed, total_steps={'short': 1, 'long': 9}[length])
      rows = [(1, {'train/loss': {'short': 3.0, 'long': 2.0}[length]})]
      init_from = {'workdir': str(start)}
      path = tmp_path / f'{seed}_{length}'
      runs.append(folder_of(path, rows, seed=seed, init_from=init_from))
  groups = compared_runs.read(runs)
  losses = [[run.last['train/loss'] for run in g] for g in groups.values()]
  assert losses == [[3.0, 3.0], [2.0, 2.0]]
  ((key, *folders),) = rows_of(groups, 'configs')
  assert key == 'init_from.workdir' and len(set(folders)) == 2


def test_a_run_is_compared_with_the_same_again(runs, tmp_path):
  again = run_of(tmp_path / 'again', 4, seed=0, loss=1.0)
  groups = compared_runs.read([runs[0], again])
  pairs = rows_of(groups, 'paired')
  assert ['B minus A', 'eval/main/loss', '1', '-2.0000'] in [
    row[:4] for row in pairs
  ]


def test_curves_stand_as_text_and_on_the_page(runs, tmp_path, capsys):
  compare.main([str(runs[0]), str(runs[3]), f'--output={tmp_path}'])
  printed = capsys.readouterr().out
  for words in (KEY, 'Losses over steps', '37.5%', '34.4%', 'B minus A'):
    assert words in printed, printed
  # At step 1 training losses are 6 and 5.5.
  assert any(
    line.split() == ['train/loss', '1', '6.0000', '5.5000']
    for line in printed.splitlines()
  )
  text = (tmp_path / compare.PAGE).read_text()
  page = Reader(text)
  assert page.tags.count('svg') == 2  # loss in training and in evaluation
  assert KEY in page.text and '34.4%' in page.text
  assert all(link.startswith('#') for link in page.links)


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    ('no run', 'holds no run'),
    ('no metrics', 'has not been trained yet'),
    ('tokenizer', 'different tokenizers'),
    ('twice', 'given twice'),
    ('alone', 'at least two'),
  ],
)
def test_what_cannot_be_compared_is_refused(
  damage, message, runs, tmp_path, capsys
):
  other = tmp_path / 'other'
  match damage:
    case 'no run':
      other.mkdir()
    case 'no metrics':
      folder_of(other)
    case 'tokenizer':
      run_of(other, 4, seed=0, loss=1.0)
      (other / workdir_lib.TOKENIZER).write_text('{"kind": "chars"}')
    case 'twice':
      other = runs[0]
  argv = [str(runs[0]), str(other), f'--output={tmp_path / "page"}']
  with pytest.raises(SystemExit) as error:
    compare.main(argv[::2] if damage == 'alone' else argv)
  assert error.value.code == 1
  output = capsys.readouterr()
  assert message in output.err and not output.out
