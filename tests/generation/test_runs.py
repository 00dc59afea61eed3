"""A run's folder to a model, and what a run decides about its prompts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.config import merge
from moe_jax.data import tokenizers
from moe_jax.data.extra_ids import extend
from moe_jax.generation import runs
from moe_jax.interop import runs as interop_runs
from moe_jax.training import workdir as workdir_lib
from moe_jax.training.checkpoint import Checkpointer
from tests.generation import folders
from tests.models import tiny
from tests.training import tiny as tiny_runs


def test_the_newest_good_checkpoints_parameters_are_read(tmp_path):
  params = folders.write(tmp_path, steps=(2, 5))
  loaded = runs.load(tmp_path)
  assert (loaded.step, loaded.skipped, loaded.imported) == (5, [], False)
  assert loaded.model == tiny_runs.model_of(tiny_runs.config())
  assert loaded.variables.keys() == {'params'}
  jax.tree.map(
    np.testing.assert_array_equal, loaded.variables['params'], params[5]
  )
  assert loaded.tokenizer.identity == 'bytes'
  assert loaded.config.model.vocab_size == 257
  old = runs.load(tmp_path, step=2).variables['params']
  jax.tree.map(np.testing.assert_array_equal, old, params[2])
  folders.damage(tmp_path, 5)
  loaded = runs.load(tmp_path)
  assert loaded.step == 2 and loaded.skipped[0][0] == 5


def test_names_are_those_of_the_run():
  names = workdir_lib.CONFIG, workdir_lib.TOKENIZER, workdir_lib.CHECKPOINTS
  assert names == (runs.CONFIG, runs.TOKENIZER, runs.CHECKPOINTS)
  assert interop_runs.FILES == runs.IMPORTED


def test_what_is_no_run_is_said(tmp_path):
  with pytest.raises(ValueError, match=r'it has no config\.json'):
    runs.load(tmp_path)
  folders.write(tmp_path, steps=())
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(ValueError, match='no finished checkpoint'):
    runs.load(tmp_path)
  (tmp_path / 'config.json').write_text('{"model": {"width": 3}}')
  with pytest.raises(ValueError, match=r'config\.json is no config of a run'):
    runs.load(tmp_path)


def test_another_models_checkpoint_is_refused(tmp_path):
  folders.write(tmp_path, steps=())
  state = {'params': {'embedding': jnp.zeros((2, 3))}}
  with Checkpointer(tmp_path / 'checkpoints', keep_best=False) as checkpoints:
    checkpoints.save(1, state)
  with pytest.raises(ValueError, match='holds another state'):
    runs.load(tmp_path)


def test_prompts_are_documents_or_inputs():
  # Inputs end as the task's do; those of a language model are documents.
  tokenizer = extend(
    tokenizers.Bytes(), num_sentinels=0, modes=(), end_inputs=True
  )
  config = tiny_runs.config()
  assert runs.encode(config, tokenizer, 'ab').tolist() == [97, 98]
  for options, task in ((dict(imported=True), 'lm'), ({}, 'seq2seq')):
    config = merge(config, {'data': {'task': task}})
    ids = runs.encode(config, tokenizer, 'ab', **options)
    assert ids.tolist() == [97, 98, 256]


def test_ids_that_the_tokenizer_lacks_have_no_text():
  assert runs.decode(tokenizers.Bytes(), np.array([97, 400, 98])) == 'ab'


@pytest.mark.parametrize(
  ('model', 'expected'),
  [
    (dict(positions='rotary'), 24),
    (dict(positions='relative'), 24),
    (dict(positions='sinusoidal'), 0),
    (dict(positions='learned'), 0),
    (dict(kind='encoder_decoder', positions='relative'), 0),
  ],
)
def test_the_window_is_a_row_where_positions_are_distances(model, expected):
  config = tiny_runs.config(model=model)
  built = tiny_runs.model_of(config)
  assert runs.window(config, built) == expected
  assert runs.window(config, built, imported=True) == 0


def test_what_fits_learned_positions():
  # T=10 positions; the last new token is never read.
  model = tiny.build(positions='learned')
  for length, wanted, kept, num_tokens in (
    (3, 5, 3, 5), (4, 7, 4, 7), (4, 8, 4, 7), (9, 40, 5, 6), (30, 1, 10, 1),
  ):  # fmt: skip
    prompt = np.arange(length)
    found, n = runs.fit(model, prompt, wanted)
    np.testing.assert_array_equal(found, prompt[length - kept :])
    assert n == num_tokens
    assert len(found) + n - 1 <= 10
  found, n = runs.fit(tiny.build(), np.arange(30), 50)
  assert (len(found), n) == (30, 50)
  halves = tiny.build(positions='learned', kind='encoder_decoder')
  found, n = runs.fit(halves, np.arange(30), 50)
  np.testing.assert_array_equal(found, np.arange(10))
  assert n == 10


def test_special_ids_are_the_tokenizers():
  decoder = tiny.build()
  halves = tiny.build(kind='encoder_decoder', positions='relative')
  tokenizer = tokenizers.Bytes()
  assert runs.special_ids(decoder, tokenizer) == {'stop_ids': (256,)}
  assert runs.special_ids(halves, tokenizer) == {
    'stop_ids': (256,),
    'start_id': 256,
  }
  with pytest.raises(ValueError, match='no id that starts a decoder'):
    runs.special_ids(halves, tokenizers.Chars('ab'))
