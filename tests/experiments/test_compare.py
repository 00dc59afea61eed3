"""Runs side by side: their groups, and differences by pairs of seeds."""

import pytest

from experiments import compare
from moe_jax.runs import metrics, workdir
from tests.training import tiny

# Last losses of two configs, each with the seeds 0, 1 and 2: the second config
# is lower by 0.25, 0.5 and 0.75, so by 0.5 with Student's half width 0.621.
LOSSES = {4: [3.0, 3.5, 4.0], 8: [2.75, 3.0, 3.25]}
KEY = 'model.moe.num_experts'


def folder_of(path, rows=(), **overrides):
  """A run's folder with these rows of metrics, each (step, values)."""
  workdir.claim(path, tiny.config(**overrides))
  if rows:
    with metrics.MetricsWriter(path, resume_step=None) as writer:
      for step, values in rows:
        writer.write(step, values)
  return path


def run_of(path, num_experts, seed, loss):
  rows = [(2, {'train/loss': loss}), (2, {'eval/main/loss': loss})]
  model = {'moe': {'num_experts': num_experts}}
  folder = folder_of(path, rows, seed=seed, total_steps=2, model=model)
  (folder / workdir.TOKENIZER).write_text('{"kind": "bytes"}')
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


def tables_of(folders):
  groups = compare.grouped([compare.read(folder) for folder in folders])
  return list(compare.tables(groups))


def test_runs_of_one_config_are_a_group(runs):
  members, configs, _, _ = tables_of([runs[3], *runs[:3]])
  seeds = [(row['group'], row['seed']) for row in members]
  assert seeds == [('A', '0'), ('B', '0'), ('B', '1'), ('B', '2')]
  assert configs == [{'key': KEY, 'A': '8', 'B': '4'}]


def test_differences_are_paired_by_seed(runs):
  # The order of the seeds says nothing.
  _, _, last, paired = tables_of([*runs[:3], runs[5], runs[3], runs[4]])
  assert {
    'groups': 'B minus A',
    'metric': 'eval/main/loss',
    'seeds': '3',
    'difference': '-0.5000 ± 0.6210',
    'so': 'not told apart',
  } in paired
  values = {'A': '3.5000 ± 1.2421', 'B': '3.0000 ± 0.6210'}
  assert {'last value': 'eval/main/loss', **values} in last


def test_a_seed_that_only_one_group_has_is_in_no_pair(runs):
  # Seeds 0 and 2 differ by -0.25 and -0.75; 12.706 standard errors of 0.25.
  *_, paired = tables_of([*runs[:3], runs[3], runs[5]])
  assert {row['difference'] for row in paired} == {'-0.5000 ± 3.1766'}


def test_starts_of_other_lengths_are_other_groups(tmp_path):
  # By name the long start of seed 1 would come before the short one.
  starts = {
    (0, 1): 'seed0-aaaaaaaaaa', (0, 9): 'seed0-cccccccccc',
    (1, 1): 'seed1-bbbbbbbbbb', (1, 9): 'seed1-0000000000',
  }  # fmt: skip
  runs = []
  for (seed, steps), name in sorted(starts.items(), key=lambda item: item[1]):
    start = folder_of(tmp_path / 'starts' / name, seed=seed, total_steps=steps)
    rows = [(1, {'train/loss': 3.0 if steps == 1 else 2.0})]
    init_from = {'workdir': str(start)}
    path = tmp_path / f'{seed}_{steps}'
    runs.append(folder_of(path, rows, seed=seed, init_from=init_from))
  _, configs, last, _ = tables_of(runs)
  assert [row['key'] for row in configs] == ['init_from.workdir']
  assert last[0]['A'].startswith('3.0000') and last[0]['B'].startswith('2.0000')


def test_what_cannot_be_compared_is_refused(runs, tmp_path, capsys):
  other = run_of(tmp_path / 'other', 4, seed=0, loss=1.0)
  (other / workdir.TOKENIZER).write_text('{"kind": "chars"}')
  for folder, message in (
    (folder_of(tmp_path / 'new'), 'has not been trained yet'),
    (other, 'different tokenizers'),
    (runs[0], 'given twice'),
  ):
    with pytest.raises(SystemExit):
      compare.main([str(runs[0]), str(folder)])
    output = capsys.readouterr()
    assert message in output.err and not output.out
