"""Whole runs in this process: resume, SIGTERM, NaN, a corrupt checkpoint."""

import contextlib
import dataclasses
import itertools
import json
import shutil
import signal
import sys

import jax
import numpy as np
import pytest

from moe_jax import run_config
from moe_jax.configs import base
from moe_jax.data import DataError, tokenizers
from moe_jax.runs import metrics, retention, signals
from moe_jax.training import loop, setup
from moe_jax.training.evaluate import EvaluationOptions
from moe_jax.training.setup import Hook
from tests.generation.folders import damage
from tests.training import tiny
from tests.training.hooks import InEvaluation, SigtermAt, StepHook, StepMetrics

DROPOUT = {'dropout': 0.1, **tiny.router(jitter=0.1)}
OPTIONS = tiny.options(model=DROPOUT)


def train_and_evaluate(options, workdir, **kwargs):
  devices = jax.devices()[:1]
  return loop.train_and_evaluate(options, workdir, devices=devices, **kwargs)


@pytest.fixture(scope='module')
def watched(tmp_path_factory):
  """The folder of a run, its last state, and the metrics of its steps."""
  workdir, hook = tmp_path_factory.mktemp('unbroken'), StepMetrics()
  return workdir, train_and_evaluate(OPTIONS, workdir, hooks=[hook]), hook.steps


@pytest.fixture(scope='module')
def unbroken(watched):
  return watched[:2]


def assert_equal(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


def test_a_row_has_the_means_of_its_steps(watched):
  workdir, _, steps = watched
  rows = metrics.read_metrics(workdir / metrics.FILE_NAME)
  evals = [row for row in rows if 'eval/train_capacity/loss' in row]
  assert [row['step'] for row in evals] == [3, 6]
  # With L=2 and 'every 2' layer 0 is dense and has no metrics of a router.
  assert not any('layer_0' in key for row in rows for key in row)
  train = [row for row in rows if 'train/loss' in row]
  assert [row['step'] for row in train] == [2, 4, 6]
  np.testing.assert_allclose(sum(train[-1]['train/layer_1/load']), 1, atol=1e-5)
  for row, pair in zip(train, zip(steps[::2], steps[1::2]), strict=True):
    nats = sum(step.sums.cross_entropy for step in pair)
    weight = sum(step.sums.weight for step in pair)
    np.testing.assert_allclose(row['train/loss'], nats / weight, rtol=1e-6)
    # These are those of its last step.
    for name in ('grad_norm', 'learning_rate'):
      assert row[f'train/{name}'] == getattr(pair[-1], name)
    assert row['train/total_loss'] == pair[-1].loss
    # A step has four rows of 24 tokens.
    tokens = row['train/tokens_per_second'] * row['train/step_seconds']
    np.testing.assert_allclose(tokens, 4 * 24, rtol=1e-6)


@pytest.mark.as_users_compile
def test_stopped_by_sigterm_and_gone_on_with(unbroken, tmp_path):
  workdir, state = unbroken
  stopped = train_and_evaluate(OPTIONS, tmp_path, hooks=[SigtermAt(3)])
  assert int(stopped.step) == 3
  assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
  assert not eval_rows(tmp_path)
  resumed = train_and_evaluate(OPTIONS, tmp_path)
  assert_equal(resumed, state)
  # The evaluation that the signal left out is made up.
  assert eval_rows(tmp_path) == eval_rows(workdir)
  # Rows of steps that both wrote are equal, and each step has one.
  rows, expected = (
    [
      (row['step'], row['train/total_loss'])
      for row in metrics.read_metrics(folder / metrics.FILE_NAME)
      if 'train/total_loss' in row
    ]
    for folder in (tmp_path, workdir)
  )
  unbroken_loss = dict(expected)
  same = {step: loss for step, loss in rows if step in unbroken_loss}
  assert same.items() <= unbroken_loss.items() and rows[-1][0] in same
  assert len({step for step, _ in rows}) == len(rows)


def eval_rows(workdir):
  """The rows of evaluations."""
  rows = metrics.read_metrics(workdir / metrics.FILE_NAME)
  return [row for row in rows if any(key.startswith('eval/') for key in row)]


@pytest.mark.parametrize(
  ('event', 'step'), [('sigterm', 3), ('sigterm', 6), ('kill after', 6)]
)
def test_an_evaluation_that_was_cut_short_costs_no_step(
  unbroken, tmp_path, event, step
):
  # There is a checkpoint of step 6, and only SIGTERM makes one of step 3.
  workdir, state = unbroken
  ended, hook = setup.Ended(), InEvaluation(event, step, 'train_capacity')
  with contextlib.suppress(KeyboardInterrupt):
    stopped = train_and_evaluate(OPTIONS, tmp_path, hooks=[hook, ended])
    assert int(stopped.step) == step
  assert not ended.ended
  assert best_metrics(tmp_path, step) == {}
  steps = StepMetrics()
  resumed = train_and_evaluate(OPTIONS, tmp_path, hooks=[steps, ended])
  assert ended.ended and len(steps.steps) == 6 - step
  assert_equal(resumed, state)
  assert eval_rows(tmp_path) == eval_rows(workdir)
  assert best_metrics(tmp_path, 6) == best_metrics(workdir, 6)


def best_metrics(workdir, step):
  """The numbers that decide which checkpoint is the best."""
  directory = retention.Directory(workdir / 'checkpoints')
  return directory.manifest(step).metrics


@pytest.fixture
def ctrl_c():
  """Handles SIGINT as a new interpreter does."""
  old_handler = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
  signal.signal(signal.SIGINT, old_handler)


@pytest.mark.as_users_compile
def test_ctrl_c_saves_and_says_how_to_go_on(unbroken, ctrl_c, tmp_path, capsys):
  with pytest.raises(loop.Interrupted, match='at step 3 and saved: the same'):
    train_and_evaluate(OPTIONS, tmp_path, hooks=[SigtermAt(3, signal.SIGINT)])
  assert 'another Ctrl-C stops at once' in capsys.readouterr().err
  assert_equal(train_and_evaluate(OPTIONS, tmp_path), unbroken[1])


def test_ctrl_c_saves_though_nobody_reads_what_it_says(
  ctrl_c, closed_pipe, monkeypatch
):
  # The terminal sends the signal to `tee` of `2>&1 | tee log`, too.
  monkeypatch.setattr(sys, 'stderr', closed_pipe)
  with (
    signals.catching_sigterm() as stopped,
    signals.catching_interrupt() as interrupted,
  ):
    signal.raise_signal(signal.SIGINT)
    assert stopped() and interrupted
  closed_pipe.flush()  # as the interpreter does at its end


def test_a_second_ctrl_c_ends_a_cell_and_not_its_kernel(ctrl_c, monkeypatch):
  monkeypatch.setattr(sys, 'ps1', '>>> ', raising=False)
  with signals.catching_sigterm(), signals.catching_interrupt() as interrupted:
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
  assert interrupted


def test_a_callers_own_handler_of_ctrl_c_stays(ctrl_c):
  received = []
  signal.signal(signal.SIGINT, lambda *_: received.append(True))
  with signals.catching_interrupt() as interrupted:
    signal.raise_signal(signal.SIGINT)
  assert received == [True] and not interrupted
  signal.signal(signal.SIGINT, signal.default_int_handler)


def test_resume_goes_on_with_another_config(tmp_path):
  train_and_evaluate(OPTIONS, tmp_path, hooks=[SigtermAt(3)])
  other = tiny.options(model=DROPOUT, checkpoint={'every_steps': 3}, seed=7)
  with pytest.raises(
    ValueError, match=r'differs(.|\n)*seed: 0 -> 7(.|\n)*--resume'
  ):
    train_and_evaluate(other, tmp_path)
  state = train_and_evaluate(other, tmp_path, resume=True)
  assert int(state.step) == 6
  assert int(state.seed) == 7  # of the noise, as of the order of the data
  steps = [
    json.loads((tmp_path / name).read_text())['checkpoint']['every_steps']
    for name in ('config.0.json', 'config.json')
  ]
  assert steps == [2, 3]


class Reads(StepHook):
  """Keeps the tokens of steps, which change nothing but their number."""

  def __init__(self, metrics):
    self.tokens, self.metrics = [], metrics

  def step(self, train_step, state, batch):
    self.tokens.extend(np.asarray(batch['tokens']))
    signal.raise_signal(signal.SIGTERM)  # one step, which is saved
    return state.replace(step=state.step + 1), self.metrics


def test_another_batch_size_neither_skips_rows_nor_has_them_again(
  watched, tmp_path
):
  hook, size = Reads(watched[2][0]), OPTIONS.batch_size
  for batch_size in (size, 2 * size, size // 2, size):
    options = tiny.options(model=DROPOUT, batch_size=batch_size)
    train_and_evaluate(options, tmp_path, hooks=[hook], resume=True)
  rows = setup.data.load(OPTIONS.data).splits['train']
  batches = setup.data.pipeline.batch_dataset(
    rows, batch_size=len(hook.tokens), seed=OPTIONS.seed
  )
  np.testing.assert_array_equal(hook.tokens, batches[0]['tokens'])


def test_another_seq_len_goes_on_at_the_same_share_of_the_data(
  watched, tmp_path, capsys
):
  hook, T = Reads(watched[2][0]), OPTIONS.data.seq_len
  train_and_evaluate(OPTIONS, tmp_path, hooks=[hook])
  hook.tokens.clear()
  shorter = tiny.options(model=DROPOUT, data={'seq_len': T // 2})
  train_and_evaluate(shorter, tmp_path, hooks=[hook], resume=True)
  before, after = (
    setup.data.load(options.data).splits['train']
    for options in (OPTIONS, shorter)
  )
  size = OPTIONS.batch_size
  batches = setup.data.pipeline.batch_dataset(
    after,
    batch_size=size,
    seed=OPTIONS.seed,
    offset=size * len(after) // len(before),
  )
  np.testing.assert_array_equal(hook.tokens, batches[0]['tokens'])
  assert f'the data has {len(after):,} rows' in capsys.readouterr().out


def test_fewer_steps_than_are_taken_are_refused_and_change_nothing(
  unbroken, tmp_path, capsys
):
  workdir = shutil.copytree(unbroken[0], tmp_path / 'run')
  message = r'a checkpoint of step 6, and total_steps=4: give at least as many'
  with pytest.raises(ValueError, match=message):
    shorter = tiny.options(model=DROPOUT, total_steps=4)
    train_and_evaluate(shorter, workdir, resume=True)
  # The run's own config still goes on in the folder.
  assert int(train_and_evaluate(OPTIONS, workdir).step) == 6
  # A damaged checkpoint after the last step is passed over.
  damage(workdir, 6)
  shorter = tiny.options(model=DROPOUT, total_steps=5)
  capsys.readouterr()
  assert int(train_and_evaluate(shorter, workdir, resume=True).step) == 5
  output = capsys.readouterr().out
  assert 'passed over the checkpoint of step 6' in output
  assert 'step 4: 4 of 5 steps are done, 1 still to be taken' in output
  assert 'the schedule of a run of 5 steps, no longer that of 6' in output


def test_other_data_and_other_tokens_are_refused(unbroken, tmp_path):
  workdir = shutil.copytree(unbroken[0], tmp_path / 'run')
  modules = {'python_stdlib': {'modules': f'{tiny.MODULES},http'}}
  other = tiny.options(model=DROPOUT, data={'source': modules})
  with pytest.raises(ValueError, match='two corpora must not mix'):
    train_and_evaluate(other, workdir, resume=True)
  # As many ids, of which each means something else than in training.
  tokenizers.Chars(map(chr, range(257))).save(workdir / 'tokenizer.json')
  kept = (workdir / 'tokenizer.json').read_bytes()
  with pytest.raises(ValueError, match=r'tokens of chars:.* is of bytes'):
    train_and_evaluate(OPTIONS, workdir, resume=True)
  assert (workdir / 'tokenizer.json').read_bytes() == kept
  # A file that a kill has left half written does not end the run.
  (workdir / 'tokenizer.json').write_bytes(kept[:99])
  train_and_evaluate(OPTIONS, workdir, resume=True)
  assert tokenizers.load(workdir / 'tokenizer.json').identity == 'bytes'


class BadRow(Hook):
  """A row of the training data that cannot be read."""

  def __init__(self, error):
    self.error = error

  def start(self, run):
    rows = run.dataset.splits['train']
    calls = itertools.count()

    def draw(*args):
      if next(calls) == 3:
        raise self.error
      return type(rows).draw(rows, *args)

    rows.draw = draw


@pytest.mark.parametrize('error', [KeyError('row 7'), SystemExit()])
def test_a_row_that_cannot_be_read_ends_the_run_with_its_name(error, tmp_path):
  name = type(error).__name__
  with pytest.raises(DataError, match=f'batch 3 could not be made: {name}'):
    train_and_evaluate(OPTIONS, tmp_path, hooks=[BadRow(error)])
  # Three batches were made, and the state after two steps is saved.
  assert (tmp_path / 'checkpoints' / '2' / 'manifest.json').exists()


@dataclasses.dataclass(frozen=True)
class Text(EvaluationOptions):
  """An evaluation whose result is no number."""

  def measure(self, setting):
    return lambda variables, step: {'a': 'b'}


def test_an_evaluation_without_numbers_is_refused_by_name(tmp_path):
  config = tiny.config(model=DROPOUT, checkpoint={'keep_best': False})
  config.evals = {'mine': base.entry(Text)}
  with pytest.raises(ValueError, match="eval/mine/a='b' is neither a number"):
    train_and_evaluate(run_config.read(config), tmp_path)


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    ({'batch_size': 6, 'microbatches': 4}, 'batch_size=6.*microbatches=4'),
    ({'model': {'vocab_size': 100}}, 'vocab_size=100 is smaller.*257'),
    ({'checkpoint': {'best_eval': 'x'}}, "best_eval 'x'.*train_capacity"),
    (
      {'data': {'source': {'kind': 'files', 'files': {'pattern': 'no/*.txt'}}}},
      r'no/\*\.txt',
    ),
    (
      {
        'evals': {
          'train_capacity': {'model_overrides': {'ffn': {'hidden': 24}}}
        }
      },
      r'train_capacity(.|\n)*changes parameters(.|\n)*w_in.*24',
    ),
    (
      {'early_stopping': {'patience': 2}, 'checkpoint': {'keep_best': False}},
      'patience=2 needs checkpoint.keep_best=True',
    ),
    (
      {
        'early_stopping': {'patience': 2},
        'evals': {'train_capacity': {'every_steps': 0}},
      },
      'only at the end',
    ),
    ({'init_from': {'workdir': 'x', 'best': True, 'step': 1}}, 'one of them'),
    # Devices that would do the same work.
    (
      {'mesh': {'expert': 2}, 'sharding': {'batch': '', 'expert': ''}},
      r'mesh\.expert=2: no row of',
    ),
  ],
)
def test_bad_options_fail_before_there_is_a_workdir(
  overrides, message, tmp_path
):
  workdir = tmp_path / 'run'
  with pytest.raises(ValueError, match=message):
    loop.train_and_evaluate(
      tiny.options(**overrides),
      workdir,
      devices=jax.devices()[: 1 + ('mesh' in overrides)],
    )
  assert not workdir.exists()
