"""Runs that end early: by hand, through the loop, killed and gone on with."""

import dataclasses

import jax
import pytest

from moe_jax import finetuning, run_config
from moe_jax.config import option
from moe_jax.configs import base
from moe_jax.runs import metrics
from moe_jax.runs.checkpointer import Checkpointer
from moe_jax.runs.retention import CheckpointOptions, Directory
from moe_jax.training import loop, trained
from moe_jax.training.early_stopping import EarlyStopping, EarlyStoppingOptions
from moe_jax.training.evaluate import EvaluationOptions
from moe_jax.training.setup import Ended
from tests.training import tiny
from tests.training.hooks import InEvaluation, Kill, SigtermAt

NAN = float('nan')


def counted(values, highest=False, metric='m', **options):
  """An `EarlyStopping` that was given values of steps 1, 2, ..."""
  checkpoint = CheckpointOptions(
    best_eval='e', best_metric=metric, best_is_highest=highest
  )
  early = EarlyStopping(EarlyStoppingOptions(**options), checkpoint)
  ended = []
  for step, value in enumerate(values, 1):
    early.add(step, value)
    early.add(step, None)  # a step without that evaluation
    ended.append(early.ended)
  return early, ended


@pytest.mark.parametrize(
  ('values', 'options', 'ends', 'best'),
  [
    ([3.0, 2.0, 2.0, 2.5], dict(patience=2), 4, 2),
    ([3.0, 2.0, 2.5, 1.0, 2.5], dict(patience=2), None, 4),
    # An accuracy; the first of equals is the best.
    ([0.2, 0.5, 0.5, 0.4], dict(patience=2, highest=True), 4, 2),
    # 2.8 and 2.7 are the best so far, and not better by 0.5 than 3; 2.4 is.
    ([3.0, 2.8, 2.7, 2.4], dict(patience=3, min_change=0.5), None, 4),
    ([3.0, 2.8, 2.7, 2.6], dict(patience=3, min_change=0.5), 4, 4),
    ([NAN, 3.0, NAN, NAN], dict(patience=2), 4, 2),
    ([NAN, NAN], dict(patience=2), 2, 0),
    ([1.0, 2.0, 3.0, 4.0], dict(patience=0), None, 0),
  ],
)
def test_patience_by_hand(values, options, ends, best):
  early, ended = counted(values, **options)
  expected = [ends is not None and n >= ends for n in range(1, len(ended) + 1)]
  assert ended == expected
  assert [n for n in range(1, 9) if early.is_best(n)] == [best] * (best > 0)


@pytest.mark.parametrize(
  ('changes', 'ends'),
  [
    ({}, True),
    ({'patience': 1}, True),
    ({'patience': 3}, False),  # an ended run goes on with more patience
    ({'metric': 'n'}, False),
    ({'highest': True}, False),
    ({'min_change': 0.5}, False),
  ],
)
def test_counts_of_another_rule_are_not_gone_on_with(changes, ends):
  early, _ = counted([3.0, 2.0, 2.5, 2.5], patience=2)
  other, _ = counted([], **{'patience': 2, **changes})
  other.restore(early.extra)
  assert other.ended == ends
  assert counted([1.0, 2.0], patience=0)[0].extra == {}  # nothing is kept


@dataclasses.dataclass(frozen=True)
class Scripted(EvaluationOptions):
  """An evaluation with a number for each step."""

  scores: tuple[float, ...] = option((), 'Score after each step.')

  def measure(self, setting):
    return lambda variables, step: {'score': self.scores[step - 1]}


SCORES = (0.1, 0.3, 0.2, 0.3, 0.1, 0.9, 0.9, 0.9, 0.9)


def options(patience=3, **overrides):
  config = tiny.config(
    total_steps=9,
    log_every_steps=3,
    sample={'num_tokens': 0},
    checkpoint={'every_steps': 0, 'keep_newest': 1},
    model=tiny.ONE_LAYER,
    **overrides,
  ).unlock()
  config.evals = {
    'scripted': base.entry(Scripted, every_steps=1, scores=SCORES),
    'final': base.evaluation(every_steps=0, num_batches=1),
  }
  config.checkpoint.best_eval = 'scripted'
  config.checkpoint.best_metric = 'score'
  config.checkpoint.best_is_highest = True
  config.early_stopping.patience = patience
  return run_config.read(config.lock())


def train(options, workdir, *hooks, **kwargs):
  ended = Ended()
  state = loop.train_and_evaluate(
    options,
    workdir,
    hooks=[*hooks, ended],
    devices=jax.devices()[:1],
    initial=finetuning.initial,
    **kwargs,
  )
  return int(state.step), ended.ended


def final_steps(workdir):
  """The steps at which the evaluation for the end of a run took place."""
  return [r['step'] for r in rows_of(workdir) if 'eval/final/loss' in r]


def has_ended(workdir, step):
  """Whether a run ended early at a checkpoint, as its manifest says."""
  manifest = Directory(workdir / 'checkpoints').manifest(step)
  return manifest.extra['early_stopping']['ended']


@pytest.fixture(scope='module')
def early(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('early')
  return workdir, train(options(), workdir)


def scores_of(workdir):
  """(step, score) of each row of the evaluation that decides."""
  name = 'eval/scripted/score'
  return [(r['step'], r[name]) for r in rows_of(workdir) if name in r]


def rows_of(workdir):
  return [
    {k: v for k, v in row.items() if 'second' not in k}
    for row in metrics.read_metrics(workdir / metrics.FILE_NAME)
  ]


def test_a_run_ends_early_with_all_evaluations(early):
  workdir, ended = early
  assert ended == (5, True)
  rows = rows_of(workdir)
  assert scores_of(workdir) == list(enumerate(SCORES[:5], 1))
  # The evaluation at the end has run, and the last averages are written.
  assert final_steps(workdir) == [5]
  assert [r['step'] for r in rows if 'train/loss' in r] == [3, 5]
  with Checkpointer(workdir / 'checkpoints') as checkpoints:
    assert checkpoints.steps() == [2, 5]  # the best is kept
  assert trained.best_step(workdir) == 2


def test_a_run_that_has_ended_early_says_so_and_may_go_on(
  early, tmp_path, capsys
):
  workdir, _ = early
  rows = rows_of(workdir)
  assert train(options(), workdir) == (5, True)
  output = capsys.readouterr().out
  assert 'ended early at step 5: scripted/score has not been better in 3' in (
    output
  )
  assert 'best 0.3 at step 2' in output
  assert rows_of(workdir) == rows


def test_a_killed_run_ends_where_the_unbroken_one_did(early, tmp_path):
  workdir, _ = early
  with pytest.raises(KeyboardInterrupt):
    train(options(), tmp_path, Kill(5))
  # The run goes on from the best checkpoint, of step 2, with its counts.
  with Checkpointer(tmp_path / 'checkpoints') as checkpoints:
    assert checkpoints.steps() == [2]
  assert train(options(), tmp_path) == (5, True)
  assert scores_of(tmp_path) == scores_of(workdir)


@pytest.mark.parametrize(
  ('hook', 'scores'),
  # At step 5 the patience is at an end.
  [(SigtermAt(5), 4), (InEvaluation('sigterm', 5, 'final'), 5)],
)
def test_what_sigterm_left_out_is_measured_once_before_an_early_end(
  early, tmp_path, hook, scores
):
  workdir, ended = early
  assert train(options(), tmp_path, hook) == (5, False)
  assert len(scores_of(tmp_path)) == scores and not final_steps(tmp_path)
  assert train(options(), tmp_path) == ended
  assert scores_of(tmp_path) == scores_of(workdir)
  assert final_steps(tmp_path) == [5]
  assert trained.best_step(tmp_path) == trained.best_step(workdir) == 2
  assert has_ended(tmp_path, 5)


def test_less_patience_ends_a_run_as_an_early_end_does(tmp_path, capsys):
  assert train(options(), tmp_path, SigtermAt(4)) == (4, False)
  # After 0.3 at step 2 there are one measurement, and that of step 4.
  with pytest.raises(KeyboardInterrupt):
    train(options(), tmp_path, Kill(5))
  assert not has_ended(tmp_path, 4) and not final_steps(tmp_path)
  assert train(options(patience=2), tmp_path, resume=True) == (4, True)
  assert 'step 4: ending early: scripted/score' in capsys.readouterr().out
  assert has_ended(tmp_path, 4) and final_steps(tmp_path) == [4]
  assert len(scores_of(tmp_path)) == 4  # nothing is measured twice
  assert train(options(patience=2), tmp_path) == (4, True)
  assert final_steps(tmp_path) == [4]


def test_a_run_begins_with_the_best_of_another(early, tmp_path, capsys):
  config = options(init_from={'workdir': str(early[0]), 'best': True})
  train(config, tmp_path)
  assert f'the parameters of step 2 of {early[0]}' in capsys.readouterr().out


def test_a_number_that_the_evaluation_lacks_is_named(tmp_path):
  named = options()
  checkpoint = dataclasses.replace(named.checkpoint, best_metric='scores')
  misspelled = dataclasses.replace(named, checkpoint=checkpoint)
  message = "unknown checkpoint.best_metric 'scores'; did you mean 'score'"
  with pytest.raises(ValueError, match=message):
    train(misspelled, tmp_path)
  # The numbers that the evaluation has are written, and no step is lost.
  assert scores_of(tmp_path) == [(1, SCORES[0])]
  assert train(named, tmp_path, resume=True) == (5, True)
  assert scores_of(tmp_path) == list(enumerate(SCORES[:5], 1))
