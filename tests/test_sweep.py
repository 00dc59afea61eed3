"""Sweeps: what is compared by hand, what is refused, and one that trains."""

import json
import os
import re
import signal
import time

import pytest

from moe_jax import cli, items, sweep
from moe_jax.items import Item
from tests import programs

SHRUNK = 'configs/tiny_switch.py:runlocal'
# Losses of three arms with seeds 5, 6 and 7.
LOSSES = {4: [1.3, 1.34, 1.29], 8: [1.2, 1.25, 1.18], 16: [1.31, 1.3, 1.33]}


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
  monkeypatch.chdir(programs.ROOT)


def words(output, *others, experts='4,8,16', seeds='5,6,7'):
  """The words of a sweep over the number of experts."""
  sweeps = ['--sweep', f'model.moe.num_experts={experts}', f'--seeds={seeds}']
  return [f'--config={SHRUNK}', f'--output={output}', *sweeps, *others]


def finish(output, losses):
  """Writes the runs of a sweep as if all had been trained."""
  for num_experts, by_seed in losses.items():
    for seed, loss in zip('567', by_seed):
      folder = output / f'num_experts={num_experts},seed={seed}'
      folder.mkdir(parents=True)
      rows = [
        {'step': 1, 'train/loss': 9.0, 'train/layer_1/load': [1, 2]},
        {'step': 2, 'eval/all_tokens/loss': 9.0},
        {'step': 4, 'eval/all_tokens/loss': loss},
      ]
      text = ''.join(json.dumps(row) + '\n' for row in rows)
      (folder / 'metrics.jsonl').write_text(text)
      overrides = {'model.moe.num_experts': str(num_experts), 'seed': seed}
      Item(SHRUNK, overrides, str(folder)).note_finished()


def test_arms_are_compared_in_pairs(tmp_path, capsys):
  finish(tmp_path, LOSSES)
  sweep.main(words(tmp_path, '--metric=all_tokens/loss'))
  # The differences of 8 experts are -0.10, -0.09 and -0.11: their standard
  # deviation is 0.01, and Student's 0.975 quantile with 2 degrees is 4.303.
  half_width = 4.303 * 0.01 / 3**0.5
  output = capsys.readouterr().out
  lines = [line.split('│')[1:-1] for line in output.splitlines()]
  cells = [[cell.strip() for cell in line] for line in lines if line]
  assert ['num_experts=4', '3', '1.3100', '', ''] in cells
  assert [
    *('num_experts=8', '3', '1.2100'),
    *(f'-0.1000 ± {half_width:.4f}', 'lower'),
  ] in cells
  # Differences of 0.01, -0.04 and 0.04.
  last = [row for row in cells if row[0] == 'num_experts=16']
  assert last[0][2:] == ['1.3133', '+0.0033 ± 0.1004', 'not resolved']
  stored = json.loads((tmp_path / sweep.TABLE).read_text())
  assert stored['metric'] == 'all_tokens/loss'
  arm = stored['arms'][1]
  assert arm['values'] == {'5': 1.2, '6': 1.25, '7': 1.18}
  assert arm['difference'] == pytest.approx(-0.1)
  assert arm['half_width'] == pytest.approx(half_width, rel=1e-3)


def test_an_arm_is_compared_on_the_seeds_that_both_have():
  rows = sweep.compare({'a': {'0': 1.0, '1': 2.0}, 'b': {'1': 5.0, '2': 7.0}})
  assert rows[1]['difference'] == 3.0
  # A single difference has no interval, and a lost arm no mean.
  assert rows[1]['half_width'] is None
  assert rows[1]['verdict'] == 'not resolved'
  lost = sweep.compare({'a': {'0': 1.0}, 'b': {}})[1]
  assert lost == {'arm': 'b', 'values': {}}
  nan = sweep.compare(
    {'a': {'0': 1.0, '1': 1.0}, 'b': dict.fromkeys('01', NAN)}
  )
  assert nan[1]['values'] == {'0': None, '1': None}
  assert nan[1]['mean'] is None and nan[1]['verdict'] == 'not resolved'


NAN = float('nan')


def test_what_is_wrong_is_said(tmp_path, capsys):
  finish(tmp_path, LOSSES)
  with pytest.raises(SystemExit):
    sweep.main(words(tmp_path, '--metric=all_tokens/los'))
  (error,) = capsys.readouterr().err.splitlines()
  assert "did you mean 'eval/all_tokens/loss'?" in error


# Settings that are 0, so that nothing but training steps is run.
NOT_RUN = [
  f'--config.{key}=0'
  for key in (
    *('sample.num_tokens', 'evals.train_capacity.every_steps'),
    *('evals.capacity_2.every_steps', 'evals.all_tokens.every_steps'),
  )
]


@pytest.mark.slow
def test_two_arms_with_two_seeds_are_trained_once(tmp_path, capsys):
  others = [*NOT_RUN, '--metric=train/loss']
  command = words(tmp_path, *others, experts='0,2', seeds='0,1')
  sweep.main(command)
  first = capsys.readouterr().out
  assert first.count('trains; see') == 4
  stored = json.loads((tmp_path / sweep.TABLE).read_text())
  assert [len(arm['values']) for arm in stored['arms']] == [2, 2]
  assert stored['arms'][1]['verdict'] in sweep.VERDICTS.values()
  sweep.main(command)
  again = capsys.readouterr().out
  assert 'trains' not in again
  assert first.splitlines()[-8:] == again.splitlines()[-8:]
  # In a folder of another run nothing is trained, and the others go on.
  taken = tmp_path / 'num_experts=3,seed=0'
  (tmp_path / 'num_experts=2,seed=0').rename(taken)
  command = words(tmp_path, *others, experts='0,3', seeds='0')
  with pytest.raises(SystemExit) as error:
    sweep.main(command)
  assert error.value.code == 1
  output, messages = capsys.readouterr()
  assert f'{taken} failed: moe_jax: {taken} holds a run' in messages
  assert re.search(r'num_experts=3 +│ +0 ', output)


@pytest.mark.slow
def test_sigterm_stops_a_sweep_and_its_run(tmp_path):
  others = [*NOT_RUN, '--metric=train/loss', '--config.total_steps=100000']
  process = programs.started(
    '-m', 'moe_jax.sweep', *words(tmp_path, *others), stdout=None
  )
  folder = tmp_path / 'num_experts=4,seed=5'
  rows = folder / 'metrics.jsonl'
  while not (rows.exists() and rows.stat().st_size):
    assert process.poll() is None
    time.sleep(0.1)
  os.kill(process.pid, signal.SIGTERM)
  _, messages = process.communicate(timeout=120)
  assert process.returncode == cli.STOPPED
  assert messages == 'moe_jax: stopped; the same command goes on\n'
  assert list((folder / 'checkpoints').glob('[0-9]*'))
  assert [path.name for path in tmp_path.iterdir()] == [folder.name]
  assert not (folder / items.FINISHED).exists()
