"""The losses and scores of every source of a mixture."""

import dataclasses
import functools
import types

import numpy as np
import pytest

from moe_jax import data
from moe_jax.data import InstructionSource, MixtureOptions
from moe_jax.evaluation import (
  LossEvaluation,
  SourceLosses,
  SourceScores,
  by_source,
)
from tests.evaluation.settings import measure_of
from tests.models import tiny as tiny_models
from tests.training import tiny

TASKS = {'a': 'copy', 'b': 'larger', 'c': 'add', 'd': 'reverse', 'e': 'same'}


def mixture(names='abcd', **changes):
  sizes = dict(num_train=20, num_validation=4)
  sources = {name: InstructionSource(TASKS[name], **sizes) for name in names}
  return MixtureOptions(sources=sources, **changes)


@functools.cache
def run_of(names, held_out=''):
  """A run on a mixture: options, model, variables."""
  changes = {'source': mixture(names).sources[names[0]]}
  if len(names) > 1:
    mixed = mixture(names, held_out=held_out)
    changes = {'source': data.PythonStdlibSource(), 'mixture': mixed}
  kinds = {'task': {'kind': 'seq2seq'}, 'source': {'kind': 'instructions'}}
  run = tiny.options(data={**kinds, 'seq_len': 40}).filled(257)
  run = dataclasses.replace(run, data=dataclasses.replace(run.data, **changes))
  model = run.build()
  variables = {'params': tiny_models.params_of(model)}
  return run, model, variables


def measure(folder, entry, names=tuple('abcd'), **changes):
  run, model, variables = run_of(names, **changes)
  return measure_of('it', entry, run, folder, model=model)(variables, 0)


def test_a_told_summary():
  # Two sources of one cluster, one of another, and a held-out one.
  mixed = mixture(held_out='c')
  values = {'a': 10.0, 'b': 40.0, 'c': 70.0, 'd': 30.0}
  row = by_source.summary_row(values, mixed)
  assert row == {
    **values,
    'cluster.sequences': 20.0,
    'cluster.arithmetic': 55.0,
    'mean': pytest.approx(80 / 3),
    'cluster_mean': 30.0,  # of 20 and 40
    'held_out_mean': 70.0,
    'held_out_cluster_mean': 70.0,
  }
  alone = by_source.summary_row({'x': 3.0}, MixtureOptions())
  assert alone == {'x': 3.0, 'mean': 3.0, 'cluster_mean': 3.0}
  # No source may have the name of a mean.
  means = [name for name in row if name.endswith('mean')]
  assert len(means) == 4
  for name in means:
    with pytest.raises(ValueError, match=f'sources.{name}: .* are names'):
      MixtureOptions(sources={name: InstructionSource('copy')})


def test_the_loss_of_a_source_is_that_of_a_run_on_it_alone(tmp_path):
  for split in ('validation', 'train'):  # `row` is of the training split below
    row = measure(tmp_path, SourceLosses(split=split), held_out='c')
    alone = measure(tmp_path, LossEvaluation(split=split), ('a',))
    assert row['a'] == pytest.approx(alone['loss'], rel=1e-6)
  assert len({row[name] for name in 'abcd'}) == 4
  assert row['held_out_mean'] == row['c']
  assert row['mean'] == pytest.approx(np.mean([row[n] for n in 'abd']))
  with pytest.raises(ValueError, match="'source_losses' needs a mixture"):
    measure(tmp_path, SourceLosses(), ('a',))


# Generated answers take long to compile.
@pytest.mark.slow
def test_the_score_of_a_source_is_that_of_a_run_on_it_alone(tmp_path):
  names, entry = 'ab', SourceScores(num_questions=3, num_tokens=4)
  row = measure(tmp_path, entry, tuple(names))
  for name in names:
    alone = measure(tmp_path, entry, (name,))
    assert row[name] == alone['source'] == alone['mean']
    # With choices, the likelihood of the right one is measured too.
    assert row.get(f'{name}.nats') == pytest.approx(alone.get('source.nats'))
    assert (row.get(f'{name}.chance') == 50) == (name != 'a')
  mean = np.mean([row[name] for name in names])
  assert row['mean'] == pytest.approx(mean)


def test_told_answers_are_counted_in_percent():
  pairs = [
    by_source.Pair(np.zeros(1, np.int32), 'q', target, 'a')
    for target in ('x', 'y', 'x', 'z')
  ]
  answers = ['x', 'y', 'y', ' z ']
  scores = by_source.text_scores(pairs, answers, {'a': 'exact_match'})
  assert scores == {'a': 75}


def test_a_source_that_is_judged_in_two_ways():
  # Either of two scores could be the source's.
  questions = [data.Question('q', 'a'), data.Question('q', 'a', ('a', 'b'))]
  source = types.SimpleNamespace(questions=lambda selection: questions)
  options = dict(task=data.Seq2SeqTask(), mixture=MixtureOptions())
  options = types.SimpleNamespace(source=source, selection=None, **options)
  with pytest.raises(ValueError, match=r"judged by \['choice', 'exact_match'"):
    SourceScores().measure(types.SimpleNamespace(data=options))
