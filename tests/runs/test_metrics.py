"""The record of a run, through resumption, kills, a full disk and trackers."""

import json
import math
import resource
import struct
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from moe_jax.config import OptionError
from moe_jax.runs import workdir
from moe_jax.runs.metrics import MetricsWriter, read_metrics
from moe_jax.training import setup
from tests.training import tiny


def lines(workdir):
  return (workdir / 'metrics.jsonl').read_text().splitlines()


def event_files(workdir):
  return sorted((workdir / 'tensorboard').iterdir())


def events(path):
  data, records = path.read_bytes(), []
  while data:
    (length,) = struct.unpack('<Q', data[:8])
    records.append(Event.FromString(data[12 : 12 + length]))
    data = data[12 + length + 4 :]
  return records


def scalars(path):
  return [
    (event.step, value.tag, value.simple_value)
    for event in events(path)
    for value in event.summary.value
  ]


@pytest.fixture
def file_limit():
  """Returns a function that limits the size of files until the test ends."""
  old = resource.getrlimit(resource.RLIMIT_FSIZE)

  def limit(size):
    soft = old[0] if size is None else size
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, old[1]))

  yield limit
  limit(None)


def test_rows_are_flat_json_and_read_back(tmp_path):
  with MetricsWriter(tmp_path / 'new', resume_step=None) as writer:
    # A training loop has numpy, jax and Python numbers.
    writer.write(
      np.int64(10),
      {
        'train/loss': jnp.float32(1.5),
        'train/learning_rate': np.float64(0.1),
        'train/layer_1/load': jnp.array([0.25, 0.75]),
        'train/layer_1/unused_experts': 0,
        'train/grad_norm': jnp.bfloat16(2.5),
      },
    )
    writer.write(10, {'eval/valid/loss': 1.25})
    # Whole rows are on disk before the file is closed: a kill loses none.
    rows = [
      '{"step": 10, "train/loss": 1.5, "train/learning_rate": 0.1, '
      '"train/layer_1/load": [0.25, 0.75], '
      '"train/layer_1/unused_experts": 0, "train/grad_norm": 2.5}',
      '{"step": 10, "eval/valid/loss": 1.25}',
    ]
    assert lines(tmp_path / 'new') == rows
  read = read_metrics(tmp_path / 'new' / 'metrics.jsonl')
  assert read == [json.loads(row) for row in rows]


def test_what_is_not_finite_stays_json_and_comes_back(tmp_path):
  with MetricsWriter(tmp_path, resume_step=None) as writer:
    writer.write(1, {'a': math.nan, 'b': math.inf, 'c': [-math.inf, 2.0]})
  assert lines(tmp_path) == [
    '{"step": 1, "a": "NaN", "b": "Infinity", "c": ["-Infinity", 2.0]}'
  ]
  (row,) = read_metrics(tmp_path / 'metrics.jsonl')
  assert math.isnan(row['a'])
  assert (row['b'], row['c']) == (math.inf, [-math.inf, 2.0])


def test_resuming_drops_the_rows_that_come_again(tmp_path):
  with MetricsWriter(tmp_path, resume_step=None) as writer:
    for step in (10, 20, 30):
      writer.write(step, {'train/loss': 1 / step})
      writer.write(step, {'eval/valid/loss': 2 / step})
  unbroken = lines(tmp_path)

  # The checkpoint is that of step 20, and a row of this step is kept.
  with MetricsWriter(tmp_path, resume_step=20) as writer:
    assert lines(tmp_path) == unbroken[:4]
    writer.write(30, {'train/loss': 1 / 30})
    writer.write(30, {'eval/valid/loss': 2 / 30})
  assert lines(tmp_path) == unbroken
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {'metrics.jsonl', 'tensorboard'}


def test_a_kill_anywhere_in_the_last_row_is_mended(tmp_path):
  with MetricsWriter(tmp_path, resume_step=None) as writer:
    writer.write(1, {'a': 1})
    writer.write(2, {'a': [2.5, 3]})
  path = tmp_path / 'metrics.jsonl'
  content = path.read_bytes()
  first, last = content.splitlines(keepends=True)
  for size in range(len(first), len(content)):
    path.write_bytes(content[:size])
    # The last row is complete even without its newline.
    steps = [1, 2] if size == len(content) - 1 else [1]
    assert [row['step'] for row in read_metrics(path)] == steps
    with MetricsWriter(tmp_path, resume_step=1) as writer:
      assert path.read_bytes() == first
      writer.write(2, {'a': [2.5, 3]})
    assert path.read_bytes() == first + last


def test_a_row_that_lacks_only_its_newline_gets_it(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1}')
  with MetricsWriter(tmp_path, resume_step=1) as writer:
    writer.write(2, {})
  assert lines(tmp_path) == ['{"step": 1}', '{"step": 2}']


def test_damage_elsewhere_is_told_and_does_not_stop_a_run(tmp_path, caplog):
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(b'{"step": 1}\n\0\0\0\n{"no step": 2}\n{"step": 3}\n')
  with pytest.raises(ValueError, match='line 2 is not a row'):
    read_metrics(path)
  MetricsWriter(tmp_path, resume_step=3).close()
  assert read_metrics(path) == [{'step': 1}, {'step': 3}]
  assert 'dropped unreadable lines [2, 3]' in caplog.text


def test_a_run_from_the_start_keeps_the_old_record_aside(tmp_path):
  MetricsWriter(tmp_path, resume_step=None).close()  # there is no row to keep
  for run in range(3):
    with MetricsWriter(tmp_path, resume_step=None) as writer:
      writer.write(1, {'run': run})
  for name, run in [('metrics.0', 0), ('metrics.1', 1), ('metrics', 2)]:
    assert read_metrics(tmp_path / f'{name}.jsonl') == [{'step': 1, 'run': run}]


def test_tensorboard_gets_numbers_and_forgets_what_comes_again(tmp_path):
  for resume_step in (None, 20, 20):
    with MetricsWriter(tmp_path, resume_step=resume_step) as writer:
      writer.write(30, {'train/loss': 1.5, 'load': [0.5, 0.5], 'flag': True})
      writer.write(31, {'load': [0.5, 0.5]})
  # Each run has its own file, though all begin within a second.
  files = event_files(tmp_path)
  assert len(files) == 3
  for path, first_step in zip(files, (0, 21, 21)):
    start = events(path)[1]
    assert start.session_log.status == SessionLog.START
    assert start.step == first_step
    assert scalars(path) == [(30, 'train/loss', 1.5), (30, 'flag', 1.0)]


def test_a_full_disk_costs_no_row(tmp_path, file_limit, caplog):
  path = tmp_path / 'metrics.jsonl'
  with MetricsWriter(tmp_path, resume_step=None) as writer:
    writer.write(1, {'train/loss': 1.0})
    (event_path,) = event_files(tmp_path)
    # Half of the next row fits, and less than half of the next event.
    file_limit(max(path.stat().st_size, event_path.stat().st_size) + 9)
    for step in range(2, 12):
      writer.write(step, {'train/loss': float(step)})
      assert path.read_bytes().endswith(b'}\n')
    assert len(lines(tmp_path)) < 11
    assert caplog.text.count('metrics.jsonl: rows wait') == 1
    assert caplog.text.count('TensorBoard gets no more rows') == 1
    file_limit(None)
    writer.write(12, {'train/loss': 12.0})
  steps = list(range(1, 13))
  assert [row['step'] for row in read_metrics(path)] == steps


def test_a_rewrite_that_fails_leaves_the_old_file(tmp_path, file_limit):
  with MetricsWriter(tmp_path, resume_step=None) as writer:
    for step in range(5):
      writer.write(step, {'a': 1})
  content = (tmp_path / 'metrics.jsonl').read_bytes()
  file_limit(20)
  with pytest.raises(OSError):
    MetricsWriter(tmp_path, resume_step=3)
  file_limit(None)
  assert (tmp_path / 'metrics.jsonl').read_bytes() == content


@pytest.mark.parametrize('value', ['1.5', None, [1, [2]], ['x']])
def test_other_values_are_refused(tmp_path, value):
  with MetricsWriter(tmp_path, resume_step=None) as writer:
    with pytest.raises(ValueError, match=r'train/x=.* flat list of numbers'):
      writer.write(1, {'train/x': value})
    with pytest.raises(ValueError, match="'step'"):
      writer.write(1, {'step': 2})
  assert lines(tmp_path) == []


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
  with pytest.raises(ValueError, match=r'import of wandb halted.*\[trackers\]'):
    setup.set_up(options, tmp_path / 'run', devices=jax.devices()[:1])
  assert not (tmp_path / 'run').exists()
