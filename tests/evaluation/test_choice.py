"""Log-likelihoods of answers equal a plain loop; scores made from them."""

import dataclasses
import json
from unittest import mock

import numpy as np
import pytest

from moe_jax import data
from moe_jax.data.layouts import DecoderLayout, EncoderDecoderLayout, Example
from moe_jax.evaluation import ChoiceEvaluation, choice
from moe_jax.evaluation.prompts import EncodedQuestion
from moe_jax.layers.positions import Relative
from moe_jax.layers.routers import Task
from moe_jax.routing.capacity import All, PerToken
from moe_jax.training.evaluate import Setting
from tests.evaluation.settings import measure_of, placing
from tests.models import tiny
from tests.training import tiny as tiny_runs
from tests.training.test_evaluate import stopped_before

ALL = dict(capacity=All())
START = 3
ITEM = data.Item('question', ('answer', 'other'), 0)


def make_examples():
  """Random examples of different lengths, so that some share a row."""
  rng = np.random.default_rng(5)
  sizes = [(3, 2), (1, 1), (6, 4), (2, 5), (4, 1)]
  return [
    Example(*(rng.integers(0, tiny.V, n).astype(np.int32) for n in size))
    for size in sizes
  ]


def likelihoods_of(model, examples, layout, tasks=()):
  """The likelihoods of examples, each of which is a question's one answer."""
  put = placing(2, microbatches=2)
  setting = mock.Mock(spec=Setting, model=model, put=put)
  questions = [EncodedQuestion([e], 0, False, ITEM) for e in examples]
  variables = {'params': tiny.params_of(model)}
  return np.concatenate(
    choice.log_likelihoods(setting, variables, questions, layout, tasks)
  )


def padded(rows, length):
  tokens = np.zeros((len(rows), length), np.int32)
  mask = np.zeros_like(tokens)
  for row, (ids, real) in enumerate(zip(rows, map(len, rows))):
    tokens[row, :real], mask[row, :real] = ids, 1
  return tokens, mask


def by_loop(logits, starts, targets):
  """Log-likelihoods by definition: a sum over the answer's tokens."""
  log_likelihoods = []
  for row, start, answer in zip(
    np.asarray(logits, np.float64), starts, targets
  ):
    total = 0.0
    for i, token in enumerate(answer):
      z = row[start + i]
      total += z[token] - np.log(np.exp(z - z.max()).sum()) - z.max()
    log_likelihoods.append(total)
  return log_likelihoods


@pytest.mark.parametrize(
  'kind', ['decoder', pytest.param('encoder_decoder', marks=pytest.mark.slow)]
)
def test_log_likelihoods_equal_a_loop(kind):
  model = tiny.build(ALL, kind=kind, positions=Relative())
  params, examples = tiny.params_of(model), make_examples()
  if kind == 'decoder':
    layout = DecoderLayout(tiny.T)
    inputs = padded([np.concatenate(example) for example in examples], tiny.T)
    # The logits at the token before the answer predict its first token.
    starts = [len(e.inputs) - 1 for e in examples]
  else:
    layout, starts = EncoderDecoderLayout(8, 6, START), [0] * len(examples)
    shifted = [np.append(START, e.targets[:-1]) for e in examples]
    halves = zip(padded([e.inputs for e in examples], 8), padded(shifted, 6))
    inputs = [array for pair in halves for array in pair]
  logits, _ = tiny.apply(model)(params, *inputs)
  expected = by_loop(logits, starts, [e.targets for e in examples])
  log_likelihoods = likelihoods_of(model, examples, layout)
  np.testing.assert_allclose(log_likelihoods, expected, rtol=1e-5)


def test_log_likelihoods_of_examples_of_several_tasks():
  # Examples that share a row keep their own tasks.
  moe = ALL | dict(router=Task(gates='renormalized'))
  options = dataclasses.replace(tiny.options(moe), num_tasks=2)
  model, tasks = options.build(), [0, 1, 1, 0, 1]

  def of_tasks(task_ids):
    layout = DecoderLayout(tiny.T)
    return likelihoods_of(model, make_examples(), layout, task_ids)

  by_task = np.stack([of_tasks([0] * 5), of_tasks([1] * 5)])
  assert (np.abs(by_task[0] - by_task[1]) > 1e-2).all()
  np.testing.assert_allclose(of_tasks(tasks), by_task[tasks, range(5)], 1e-5)


def test_how_often_the_right_answer_is_the_likeliest():
  scores = [np.log(p) for p in ([0.2, 0.5], [0.6, 0.1], [0.3, 0.3, 0.2])]
  scores.append(np.log([0.1, 0.2, 0.3, 0.4]))
  # The four are right, wrong, right (the first of two equals) and wrong.
  metrics = choice.accuracy_row(scores, [1, 1, 0, 2])
  assert metrics['accuracy'] == 50 and metrics['items'] == 4
  assert metrics['standard_error'] == pytest.approx(100 * (0.25 / 4) ** 0.5)
  assert metrics['chance'] == pytest.approx(100 * (1 + 1 / 3 + 1 / 4) / 4)


class Bench:
  """A file of questions, and a decoder of bytes with random weights."""

  def __init__(self, folder):
    self.folder, self.model = folder, {}

  def write(self, name, *items):
    keys = 'prompt', 'answers', 'label'
    lines = [json.dumps(dict(zip(keys, item))) for item in items]
    (self.folder / name).write_text('\n'.join(lines))
    return data.ChoiceFilesSource(str(self.folder / name))

  def choice(self, **options):
    run = tiny_runs.options(data={'seq_len': 15}, model=self.model).filled(257)
    put = placing(run.batch_size, microbatches=run.batch_size)
    entry = ChoiceEvaluation(**options)
    return measure_of('quiz', entry, run, self.folder, put=put)


@pytest.fixture
def bench(tmp_path):
  return Bench(tmp_path)


@pytest.mark.slow
def test_scores_are_divided_as_asked(bench):
  source = bench.write('q.jsonl', ('ab', ['x', 'yü', 'long'], 1))
  scores = {}
  for normalize in choice.NORMALIZES:
    measure = bench.choice(source=source, normalize=normalize)
    params = tiny.params_of(measure.setting.model)
    (scores[normalize],) = measure.scores({'params': params})
  # Each byte is a token.
  np.testing.assert_allclose(scores['none'] / [1, 3, 4], scores['tokens'])
  np.testing.assert_array_equal(scores['bytes'], scores['tokens'])
  assert (scores['none'] < 0).all()


def test_examples_are_other_ones_each_time_and_spread(bench):
  questions = [(f'q{i}', ['x', 'y'], 0) for i in range(3)]
  shots = [(f's{i}', ['u', 'v'], 1) for i in range(12)]
  source = bench.write('q.jsonl', *questions)
  options = dict(num_shots=2, shots_source=bench.write('s.jsonl', *shots))
  measure = bench.choice(source=source, answer_prefix='=', **options)
  inputs = (q.examples[0].inputs.tolist() for q in measure.questions)
  prompts = [bytes(ids).decode() for ids in inputs]
  # 12 examples for 3 questions with 2 each are taken in steps of 2. A row of 15
  # has room for 16 tokens with the answer, one too few for 's4=v' before the
  # last question.
  assert prompts == [
    's0=v\n\ns6=v\n\nq0=', 's2=v\n\ns8=v\n\nq1=', 's10=v\n\nq2='
  ]  # fmt: skip
  variables = {'params': tiny.params_of(measure.setting.model)}
  stopped_before(0, measure, variables)
  row = measure(variables, 7)
  assert (row['shots'], row['cut_items'], row['items']) == (5 / 3, 0, 3)
  limited = bench.choice(source=source, num_items=2)
  assert [q.item.prompt for q in limited.questions] == ['q0', 'q1']


def test_without_overrides_nothing_is_dropped(bench):
  source = bench.write('q.jsonl', ('ab', ['x', 'y'], 1))
  bench.model = {'moe': {'capacity': {'per_token': {'factor': 0.3}}}}
  assert bench.choice(source=source).setting.model.stacks.moe.capacity == All()
  overrides = {'moe': {'capacity': {'per_token': {'factor': 0.7}}}}
  measure = bench.choice(source=source, model_overrides=overrides)
  assert measure.setting.model.stacks.moe.capacity == PerToken(0.7)


def test_a_model_that_routes_by_task_is_refused(bench):
  source = bench.write('q.jsonl', ('ab', ['x', 'y'], 1))
  plain = bench.choice(source=source).setting
  model = tiny.options(dict(router=Task(), **ALL), num_tasks=2).build()
  with pytest.raises(ValueError, match=r"evals.quiz of kind 'choice': the mod"):
    ChoiceEvaluation().measure(dataclasses.replace(plain, model=model))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'num_shots': 1}, 'num_shots=1 of .*no train split; choose another'),
    ({'num_shots': 9}, 'evals.quiz: num_shots=9 of 1 train items'),
    ({}, 'has no effect unless num_shots is at least 1'),
  ],
)
def test_examples_that_are_not_there_are_refused(bench, options, message):
  source = bench.write('q.jsonl', ('ab', ['x', 'y'], 1))
  if options != {'num_shots': 1}:
    options = {**options, 'shots_source': source}
  with pytest.raises(ValueError, match=message):
    bench.choice(source=source, **options)
