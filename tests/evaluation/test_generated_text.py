"""Runs with evaluations of every kind: what they write, and their errors."""

import jax
import numpy as np
import pytest

from configs import base
from moe_jax import data, evaluation, generation
from moe_jax.config import merge, to_dataclass
from moe_jax.distributed import Placing
from moe_jax.evaluation import generated_text
from moe_jax.models import build
from moe_jax.runs import metrics
from moe_jax.training import loop
from moe_jax.training.evaluate import Setting
from tests.models import tiny as tiny_models
from tests.training import tiny
from tests.training.test_loop import SigtermAt, assert_equal

MODULES = 'asyncio,email,json'
PAIRS = dict(
  data=dict(
    task='seq2seq',
    source=f'python_stdlib_docstrings:{MODULES}',
    seq_len=24,
    target_len=12,
  ),
  model=dict(
    kind='encoder_decoder',
    positions='relative',
    scan_layers=False,
    moe=dict(num_experts=4),
  ),
)


def config(**evals):
  """Of a tiny encoder-decoder on pairs, with an evaluation of each kind."""
  c = tiny.config(total_steps=4, **PAIRS).unlock()
  c.checkpoint.every_steps = 2
  c.evals = {
    'train_capacity': base.evaluation(every_steps=2, num_batches=1),
    'texts': base.generate_evaluation(2, num_examples=5, max_new_tokens=6),
    'choice': base.choice_evaluation(
      source=f'docstring_choice:{MODULES}', num_items=3, num_shots=1
    ),
    **evals,
  }
  return c.lock()


def train(config, workdir, **kwargs):
  one = jax.devices()[:1]
  return loop.train_and_evaluate(
    config, workdir, devices=one, kinds=evaluation.KINDS, **kwargs
  )


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('run')
  return workdir, train(config(), workdir)


def rows_of(workdir, name):
  """(step, row) of each evaluation `name`, without what stands before keys."""
  found = []
  for row in metrics.read_metrics(workdir / metrics.FILE_NAME):
    values = {
      key.split('/', 2)[2]: value
      for key, value in row.items()
      if key.startswith(f'eval/{name}/')
    }
    if values:
      found.append((row['step'], values))
  return found


def test_every_kind_has_its_rows(run):
  workdir, _ = run
  assert [step for step, _ in rows_of(workdir, 'train_capacity')] == [2, 4]
  texts = rows_of(workdir, 'texts')
  assert [step for step, _ in texts] == [2, 4]
  row = texts[-1][1]
  assert list(row) == ['bleu', 'chrf', 'rouge_l', 'exact_match', 'examples']
  assert row['examples'] == 5 and row['exact_match'] == 0
  ((step, row),) = rows_of(workdir, 'choice')  # its period is 0
  assert step == 4
  assert (row['items'], row['chance']) == (3, 25.0)
  assert row['accuracy'] in (0, 100 / 3, 200 / 3, 100)


def test_examples_are_left_to_be_read(run):
  workdir, _ = run
  text = (workdir / 'texts_examples.txt').read_text(encoding='utf-8')
  assert text.startswith('step 4, 5 validation pairs\nbleu 0.')
  assert 'tok:13a' in text.split('\n\n')[0]
  rest = text
  for inputs, target in spread_pairs():
    _, found, rest = rest.partition(f'\n\ninputs: {inputs}\noutputs: ')
    assert found
    _, found, rest = rest.partition(f'\ntargets: {target}')
    assert found
  assert rest == '\n'


def spread_pairs(count=5):
  data_config = to_dataclass(data.DataConfig, config().data)
  pairs = list(data.read_pairs(data_config, 'validation'))
  return [pairs[i * len(pairs) // count] for i in range(count)]


@pytest.mark.slow
def test_a_run_is_evaluated_from_its_folder(run):
  workdir, _ = run
  entries = config().evals
  for name in ('train_capacity', 'texts', 'choice'):
    found = evaluation.evaluate(workdir, entries[name])
    _, expected = rows_of(workdir, name)[-1]
    for key, value in expected.items():
      np.testing.assert_allclose(found[key], value, rtol=1e-5, err_msg=key)
  before = (workdir / 'texts_examples.txt').read_text()
  assert (workdir / 'evaluate_examples.txt').read_text() == before
  older = evaluation.evaluate(workdir, entries.texts, step=2)
  assert older == pytest.approx(rows_of(workdir, 'texts')[0][1])


@pytest.mark.as_users_compile
@pytest.mark.slow
def test_a_run_that_was_stopped_evaluates_as_one_that_was_not(run, tmp_path):
  workdir, state = run
  stopped = train(config(), tmp_path, hooks=[SigtermAt(3)])
  assert int(stopped.step) == 3
  assert_equal(train(config(), tmp_path), state)
  for name in ('train_capacity', 'texts', 'choice'):
    assert rows_of(tmp_path, name) == rows_of(workdir, name)


def setting(tmp_path, entry, **overrides):
  c = tiny.config(**overrides)
  c = merge(c, {'model': {'vocab_size': 258}})
  dataset = data.load(to_dataclass(data.DataConfig, c.data))
  options = {k: v for k, v in entry.items() if k not in generate_common()}
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  put = Placing(one, c.batch_size)
  return Setting('x', options, c, build(c), dataset, tmp_path, put)


def generate_common():
  return ('kind', 'every_steps', 'model_overrides')


def test_outputs_are_what_the_model_says_alone(tmp_path):
  entry = base.generate_evaluation(num_examples=5, max_new_tokens=6)
  measure = generated_text.make(setting(tmp_path, entry, **PAIRS))
  model = measure.setting.model
  params = tiny_models.params_of(model)  # drawn: another byte, another output
  model, variables = generation.prepare(model, {'params': params})
  expected = []
  for inputs, _ in spread_pairs():
    # Cut as in training: 24 tokens with the EOS, bytes as they are.
    ids = [*inputs.encode()[:23], 256]
    (made,) = generation.generate(
      model, variables, ids, max_new_tokens=6, start_id=256, stop_ids=[256]
    ).rows
    text = bytes(i for i in made.tolist() if i < 256)
    expected.append(text.decode(errors='replace'))
  # A batch of 4, and one of 1.
  assert measure.outputs({'params': params}) == expected
  assert len(set(expected)) > 2


def test_a_decoder_of_prefixes_goes_on_with_windows(tmp_path):
  entry = base.generate_evaluation(num_examples=4)
  made = setting(tmp_path, entry, data={'task': 'prefix_lm'})
  measure = generated_text.make(made)
  corpus = made.dataset.splits['validation']
  assert len(measure.pairs) == 4
  again = generated_text.make(made).pairs
  for i, (pair, other) in enumerate(zip(measure.pairs, again)):
    np.testing.assert_array_equal(pair.ids, other.ids)
    # As `loss` sees the row: its first example, inputs and then targets.
    row = corpus[i * len(corpus) // 4]
    first = row['segment_ids'] == 1
    text = [row['tokens'][0], *row['targets'][first]]
    text = bytes(t for t in text if t < 256).decode(errors='replace')
    assert pair.inputs + pair.target == text
    assert pair.target and len(pair.ids) == (
      first.sum() - row['loss_weights'][first].sum() + 1
    )


@pytest.mark.parametrize(
  ('entry', 'message'),
  [
    (
      {'kind': 'generated'},
      r"kind 'generated'; .*\['choice', 'classify', 'generate', 'loss",
    ),
    ({'every_steps': -1}, 'evals.texts: every_steps=-1'),
    ({'metrics': 'bleu,rouge'}, "texts: unknown metric 'rouge'"),
    ({'max_new_tokens': 0}, 'texts: max_new_tokens=0 must be at least 1'),
    ({'num_examples': -2}, 'texts: num_examples=-2'),
    (
      {'num_beam': 2},
      "GenerateOptions key 'num_beam'; did you mean 'num_beams",
    ),
    ({'model_overrides': {'width': 8}}, 'texts.model_overrides changes'),
  ],
)
def test_a_bad_entry_fails_before_there_is_a_workdir(entry, message, tmp_path):
  texts = base.generate_evaluation().unlock()
  texts.update(entry)
  with pytest.raises(ValueError, match=message):
    train(config(texts=texts), tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_what_is_missing_is_said_at_set_up(tmp_path):
  workdir = tmp_path / 'run'
  lm = tiny.config().unlock()
  lm.evals.texts = base.generate_evaluation()
  with pytest.raises(ValueError, match="task='lm' is none of"):
    train(lm.lock(), workdir)
  # Whoever calls the loop without them has no kinds but 'loss'.
  with pytest.raises(ValueError, match=r"kind 'choice'; have \['loss'\]"):
    loop.train_and_evaluate(config(), workdir, devices=jax.devices()[:1])
  best = merge(config(), {'checkpoint': {'best_eval': 'texts'}})
  with pytest.raises(
    ValueError, match="'texts' is no evaluation of kind 'loss'"
  ):
    train(best, workdir)
  other = merge(config(), {'evals': {'texts': {'metrics': 'bleu,meteor'}}})
  with pytest.raises(
    ValueError, match=r"evals\.texts: unknown metric 'meteor'"
  ):
    train(other, workdir)
  assert not workdir.exists()
