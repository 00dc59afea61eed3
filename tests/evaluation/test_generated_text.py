"""Runs with evaluations of every kind: their results, files and errors."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from moe_jax import data, evaluation, generation, run_config
from moe_jax.configs import base
from moe_jax.data.sources.python_stdlib import split_of
from moe_jax.evaluation import GenerateEvaluation
from moe_jax.runs import metrics
from moe_jax.training import loop
from tests.data.tokenizers import models as sentencepieces
from tests.evaluation import settings
from tests.models import tiny as tiny_models
from tests.training import tiny
from tests.training.conftest import _equal_runs_share_programs  # noqa: F401
from tests.training.test_evaluate import stopped_before

MODULES = 'asyncio,email,json'
PAIRS = dict(
  data=dict(
    task=dict(kind='seq2seq'),
    source=dict(
      kind='python_stdlib_docstrings',
      python_stdlib_docstrings=dict(modules=MODULES),
    ),
    seq_len=24, target_len=12,
  ),
  model=dict(
    kind='encoder_decoder', positions=dict(kind='relative'), scan_layers=False,
    num_layers=1, moe=dict(layers='all', num_experts=4),
  ),
)  # fmt: skip


def config(**evals):
  """Config of a tiny encoder-decoder on pairs with every kind of evaluation."""
  source = dict(docstring_choice=dict(modules=MODULES))
  c = tiny.config(total_steps=4, **PAIRS).unlock()
  c.checkpoint.every_steps = 2
  c.sample.num_tokens = 0
  c.evals = {
    'train_capacity': base.evaluation(every_steps=2, num_batches=1),
    'texts': base.generate_evaluation(2, num_examples=5, num_tokens=6),
    'choice': base.choice_evaluation(source=source, num_items=3, num_shots=1),
    **evals,
  }
  return c.lock()


def train(config, workdir, **kwargs):
  devices = jax.devices()[:1]
  return loop.train_and_evaluate(
    run_config.read(config), workdir, devices=devices, **kwargs
  )


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  return workdir, train(config(), workdir)


def rows_of(workdir, name):
  """Pairs (step, row) of the evaluation `name`; keys are without prefix."""
  rows = []
  for row in metrics.read_metrics(workdir / metrics.FILE_NAME):
    prefix = f'eval/{name}/'
    values = {k.removeprefix(prefix): v for k, v in row.items() if prefix in k}
    if values:
      rows.append((row['step'], values))
  return rows


def spread_pairs(count=5):
  options = run_config.read(config())
  pairs = list(data.read_pairs(options.data, 'validation'))
  return [pairs[i * len(pairs) // count] for i in range(count)]


@pytest.mark.slow
def test_a_run_is_evaluated_from_its_folder(run):
  workdir, _ = run
  entries = run_config.read(config()).evals
  for name, steps in (('train_capacity', 2), ('texts', 2), ('choice', 4)):
    # Choices have a period of 0 and are evaluated at the end only.
    rows = rows_of(workdir, name)
    assert [step for step, _ in rows] == list(range(steps, 5, 2))
    scores = evaluation.evaluate(workdir, entries[name])
    _, expected = rows[-1]
    for key, value in expected.items():
      np.testing.assert_allclose(scores[key], value, rtol=1e-5, err_msg=key)
  before = (workdir / 'texts_examples.txt').read_text()
  assert (workdir / 'evaluate_examples.txt').read_text() == before
  older = evaluation.evaluate(workdir, entries['texts'], step=2)
  assert older == pytest.approx(rows_of(workdir, 'texts')[0][1])


def setting(tmp_path, **overrides):
  options = tiny.options(**overrides).filled(258)
  return settings.setting(options, tmp_path, name='x')


@pytest.mark.parametrize('task', ['seq2seq', 'prefix_lm'])
def test_an_example_of_a_mixture_has_the_task_of_its_source(tmp_path, task):
  kinds = {
    'seq2seq': ('instructions', 'task', ('copy', 'add')),
    'prefix_lm': ('python_stdlib', 'modules', ('asyncio', 'email')),
  }
  kind, key, names = kinds[task]
  sources = {name: {'kind': kind, key: name} for name in names}
  data_overrides = dict(source=dict(python_stdlib=dict(modules='')))
  data_overrides |= dict(task=dict(kind=task), mixture=dict(sources=sources))
  run_setting = setting(tmp_path, data=data_overrides | dict(seq_len=64))
  pairs = GenerateEvaluation(num_examples=6).pairs(run_setting)
  tasks = [pair.task for pair in pairs]
  assert tasks == sorted(tasks) and set(tasks) == set(names)
  if task == 'seq2seq':
    options = run_setting.data.mixture.sources
    for pair in pairs:
      source_pairs = options[pair.task].pairs().pairs('validation')
      assert (pair.inputs, pair.target) in set(source_pairs)


def test_a_pair_without_tokens_is_not_asked(tmp_path):
  # A SentencePiece model like T5's makes no token of a space.
  (tmp_path / 'spiece.model').write_bytes(sentencepieces.unigram())
  sources, asked = {}, []
  for name, answers in (('x', 'a 9'), ('y', '2')):
    lines = []
    for answer in answers:
      # The inputs are the first ones whose hash gives them their split.
      inputs = (f'{name} cat {answer} {i}' for i in itertools.count())
      validation = next(i for i in inputs if split_of(i) == 'validation')
      train = next(i for i in inputs if split_of(i) == 'train')
      lines += [(train, 'hat'), (validation, answer)]
      asked += [(name, validation)] * (answer != ' ')
    path = tmp_path / f'{name}.jsonl'
    path.write_text(
      '\n'.join(json.dumps({'inputs': i, 'targets': t}) for i, t in lines)
    )
    sources[name] = data.JsonlSource(str(path))
  options = data.DataOptions(
    mixture=data.MixtureOptions(sources=sources),
    tokenizer=data.FileOptions(str(tmp_path)),
    task=data.Seq2SeqTask(),
    cache_dir=str(tmp_path / 'cache'),
  )
  run_setting = dataclasses.replace(
    setting(tmp_path), data=options, dataset=data.load(options)
  )
  pairs = GenerateEvaluation(num_examples=0).pairs(run_setting)
  assert [(pair.task, pair.inputs) for pair in pairs] == asked
  assert [pair.target for pair in pairs] == ['a', '9', '2']


@pytest.mark.slow
def test_outputs_are_what_the_model_says_alone(tmp_path):
  entry = GenerateEvaluation(num_examples=5, num_tokens=6)
  measure = entry.measure(setting(tmp_path, **PAIRS))
  model = measure.setting.model
  # Parameters are random, so that other inputs give other outputs.
  params = tiny_models.params_of(model)
  model, variables = generation.prepare(model, {'params': params})
  # The five examples are a batch of 4, and one of 1.
  outputs = measure.outputs({'params': params})
  assert len(outputs) == 5 and len(set(outputs)) > 2
  pairs = spread_pairs()
  for i in (0, 2, 4):
    inputs, _ = pairs[i]
    # Inputs are cut as in training, to 24 tokens with the end of text.
    ids = [*inputs.encode()[:23], 256]
    (tokens,) = generation.generate(
      model, variables, ids, num_tokens=6, start_id=256, stop_ids=[256]
    ).rows
    text = bytes(i for i in tokens.tolist() if i < 256)
    assert outputs[i] == text.decode(errors='replace')
  stopped_before(1, measure, {'params': params})
  row = measure({'params': params}, 7)
  assert list(row) == ['bleu', 'chrf', 'rouge_l', 'exact_match', 'examples']
  assert row['examples'] == 5 and row['exact_match'] == 0
  text = (tmp_path / 'x_examples.txt').read_text(encoding='utf-8')
  assert text.startswith('step 7, 5 validation pairs\nbleu ')
  assert text.count('\ninputs: ') == text.count('\noutputs: ') == 5


def test_a_decoder_of_prefixes_goes_on_with_windows(tmp_path):
  entry = GenerateEvaluation(num_examples=4)
  prefix_run = setting(tmp_path, data={'task': {'kind': 'prefix_lm'}})
  measure = entry.measure(prefix_run)
  corpus = prefix_run.dataset.splits['validation']
  assert len(measure.pairs) == 4
  second_pairs = entry.measure(prefix_run).pairs
  for i, (pair, second_pair) in enumerate(zip(measure.pairs, second_pairs)):
    np.testing.assert_array_equal(pair.ids, second_pair.ids)
    # The text is that of the row that `loss` reads: the inputs and then the
    # targets of its first example.
    row = corpus[i * len(corpus) // 4]
    first = row['segment_ids'] == 1
    text = [row['tokens'][0], *row['targets'][first]]
    text = bytes(t for t in text if t < 256).decode(errors='replace')
    assert pair.inputs + pair.target == text
    assert pair.target and len(pair.ids) == (
      first.sum() - row['loss_weights'][first].sum() + 1
    )


def test_what_is_missing_is_said_at_set_up(tmp_path):
  workdir = tmp_path / 'run'
  lm = tiny.config().unlock()
  lm.evals.texts = base.generate_evaluation()
  with pytest.raises(ValueError, match='are text, which LmTask does not have'):
    train(lm.lock(), workdir)
  assert not workdir.exists()
