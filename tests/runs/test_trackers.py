"""What Weights & Biases and MLflow are told; neither is installed here."""

import sys
import types

import jax
import pytest

from moe_jax.config import OptionError
from moe_jax.runs import workdir
from moe_jax.runs.metrics import MetricsWriter, read_metrics
from moe_jax.training import setup
from tests.training import tiny

CONFIG = {'seed': 3, 'data': {'seq_len': 8}}


@pytest.fixture
def folder(tmp_path):
  workdir.claim(tmp_path / 'run', CONFIG)
  return tmp_path / 'run'


@pytest.fixture
def calls(monkeypatch):
  """The calls of fake packages, which have the functions that are used."""
  calls = []

  def told(name, result=None):
    return lambda *args, **kwargs: calls.append((name, args, kwargs)) or result

  wandb, mlflow = types.ModuleType('wandb'), types.ModuleType('mlflow')
  run = types.SimpleNamespace(
    id='w7', log=told('wandb.log'), finish=told('wandb.finish')
  )
  info = types.SimpleNamespace(run_id='m8')
  wandb.init = told('wandb.init', run)
  mlflow.start_run = told('mlflow.start', types.SimpleNamespace(info=info))
  mlflow.log_params = told('mlflow.params')
  mlflow.log_metrics = told('mlflow.log')
  mlflow.flush_async_logging = told('mlflow.flush')
  mlflow.end_run = told('mlflow.end')
  monkeypatch.setitem(sys.modules, 'wandb', wandb)
  monkeypatch.setitem(sys.modules, 'mlflow', mlflow)
  monkeypatch.delenv('WANDB_NAME', raising=False)
  monkeypatch.setenv('MLFLOW_RUN_NAME', 'mine')
  return calls


def write(folder, resume_step, step, *trackers):
  with MetricsWriter(
    folder, resume_step=resume_step, trackers=trackers
  ) as writer:
    writer.write(step, {'train/loss': 1.5, 'train/layer_1/load': [0.5, 0.5]})
    writer.write(step, {'train/layer_1/load': [0.5, 0.5]})


def test_weights_and_biases_gets_the_numbers_and_goes_on(folder, calls):
  write(folder, None, 4, 'wandb')
  (_, args, first), *others = calls
  assert not args and first == dict(
    id=None, resume='allow', name='run', dir=folder, config=CONFIG,
    allow_val_change=True,
  )  # fmt: skip
  assert others == [
    ('wandb.log', ({'train/loss': 1.5},), {'step': 4}),
    ('wandb.finish', (), {}),
  ]
  calls.clear()
  write(folder, 4, 5, 'wandb')
  assert calls[0][2]['id'] == 'w7'
  calls.clear()
  write(folder, None, 5, 'wandb')  # a run that begins anew
  assert calls[0][2]['id'] is None


def test_mlflow_gets_the_numbers_and_goes_on(folder, calls):
  write(folder, None, 4, 'mlflow')
  assert calls == [
    ('mlflow.start', (), dict(run_id=None, run_name='mine', nested=True)),
    ('mlflow.params', ({'seed': 3, 'data.seq_len': 8},), {}),
    (
      'mlflow.log',
      ({'train/loss': 1.5},),
      dict(step=4, run_id='m8', synchronous=False),
    ),
    ('mlflow.flush', (), {}),
    ('mlflow.end', (), {}),
  ]
  calls.clear()
  write(folder, 4, 5, 'mlflow')
  # Parameters cannot change, and are not told again.
  assert [name for name, *_ in calls] == [
    'mlflow.start', 'mlflow.log', 'mlflow.flush', 'mlflow.end'
  ]  # fmt: skip
  assert calls[0][2]['run_id'] == 'm8'


def test_a_tracker_that_fails_costs_no_row(folder, calls, monkeypatch, caplog):
  def fail(*args, **kwargs):
    raise RuntimeError('no answer')

  monkeypatch.setattr(sys.modules['mlflow'], 'log_metrics', fail)
  with MetricsWriter(
    folder, resume_step=None, trackers=('mlflow', 'wandb')
  ) as writer:
    for step in (1, 2):
      writer.write(step, {'train/loss': 1.5})
  assert caplog.text.count('MLflow gets no more rows: no answer') == 1
  assert [kwargs for name, _, kwargs in calls if name == 'wandb.log'] == [
    {'step': 1}, {'step': 2}
  ]  # fmt: skip
  assert len(read_metrics(folder / 'metrics.jsonl')) == 2
  monkeypatch.setattr(sys.modules['wandb'], 'init', fail)
  with pytest.raises(ValueError, match="'wandb' cannot begin: no answer"):
    write(folder, None, 1, 'wandb')


def test_a_tracker_that_is_unknown_or_not_installed_is_refused(
  tmp_path, monkeypatch
):
  with pytest.raises(
    OptionError, match=r"unknown tracker 'wand'; did.*'wandb'"
  ):
    tiny.options(trackers='mlflow, wand')
  monkeypatch.setitem(sys.modules, 'wandb', None)
  options = tiny.options(trackers='wandb')
  with pytest.raises(
    ValueError, match=r'wandb is not installed: .*\[trackers\]'
  ):
    setup.set_up(options, tmp_path / 'run', devices=jax.devices()[:1])
  assert not (tmp_path / 'run').exists()
