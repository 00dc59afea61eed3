"""Loading the model of a run's folder, and how the run encodes prompts."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
import tokenizers as hf

from moe_jax import partitioning
from moe_jax.data import LmTask, PrefixLmTask, Seq2SeqTask, Ul2Task, tokenizers
from moe_jax.data.layouts import RowShape
from moe_jax.generation import trained_run
from moe_jax.layers.positions import Learned, Relative
from moe_jax.runs.checkpointer import Checkpointer, CheckpointError
from moe_jax.training import trained
from tests.generation import folders
from tests.models import tiny
from tests.training import tiny as tiny_runs


def test_the_newest_good_checkpoints_parameters_are_read(tmp_path):
  params = folders.write(tmp_path, steps=(2, 5))
  loaded = trained.load(tmp_path)
  assert (loaded.step, loaded.skipped) == (5, [])
  assert not trained_run.is_imported(loaded.folder)
  assert loaded.model == tiny_runs.model_of(tiny_runs.options())
  assert loaded.variables.keys() == {'params'}
  jax.tree.map(
    np.testing.assert_array_equal, loaded.variables['params'], params[5]
  )
  assert loaded.tokenizer.identity == 'bytes'
  assert loaded.options.model.vocab_size == 257
  old_params = trained.load(tmp_path, step=2).variables['params']
  jax.tree.map(np.testing.assert_array_equal, old_params, params[2])
  folders.damage(tmp_path, 5)
  loaded = trained.load(tmp_path)
  assert loaded.step == 2 and loaded.skipped[0][0] == 5


def test_parameters_alone_in_another_type_on_a_mesh(tmp_path):
  params = folders.write(tmp_path, steps=(3,))[3]
  mesh = partitioning.make_mesh(dict(data=1, fsdp=2, expert=2, tensor=2))
  loaded = trained.load(tmp_path, dtype='bfloat16', mesh=mesh)
  types = {'dtype': 'bfloat16', 'param_dtype': 'bfloat16'}
  bfloat16_options = tiny_runs.options(model={'numerics': types})
  assert loaded.model == tiny_runs.model_of(bfloat16_options)
  loaded_params = tiny.leaves(loaded.variables['params'])
  saved = tiny.leaves(params)
  for name, array in loaded_params.items():
    # Parameters that the model always keeps in float32 are not rounded.
    is_float32 = array.dtype == jnp.float32
    assert is_float32 == ('router' in name or 'norm' in name), name
    np.testing.assert_array_equal(array, saved[name].astype(array.dtype))
  kernel = loaded_params['layers/layer_1/moe/experts/w_in']
  assert kernel.addressable_shards[0].data.shape == (1, 2, 8, 10)
  assert loaded_params['embedding'].addressable_shards[0].data.shape == (257, 4)
  folders.damage(tmp_path, 3)
  with pytest.raises(CheckpointError, match='no good checkpoint'):
    trained.load(tmp_path, dtype='bfloat16')


def test_what_training_alone_needs_is_not_read(tmp_path):
  params = {'w': jnp.asarray(np.random.default_rng(0).random(1000, 'f4'))}
  moments = np.random.default_rng(1).random(400_000, 'f4')  # 1.6 MB
  state = {'params': params, 'opt_state': {'m': jnp.asarray(moments)}}
  with Checkpointer(tmp_path) as checkpoints:
    checkpoints.save(1, state)
    weights = {'params': {'w': jax.ShapeDtypeStruct((1000,), jnp.bfloat16)}}
    num_read = {}
    for name, abstract in (('params', weights), ('all', state)):
      before = bytes_read()
      restored = checkpoints.restore(abstract, partial=True, cast=True).state
      num_read[name] = bytes_read() - before
  np.testing.assert_array_equal(restored['opt_state']['m'], moments)
  assert num_read['all'] > moments.nbytes * 0.8
  assert num_read['params'] < 100_000


def bytes_read():
  """Bytes that tensorstore has read from files; the manifest reads others."""
  (metric,) = tensorstore.experimental_collect_matching_metrics(
    '/tensorstore/kvstore/file/bytes_read', include_zero_metrics=True
  )
  return metric['values'][0]['value']


def test_what_is_no_run_is_said(tmp_path):
  with pytest.raises(ValueError, match=r'it has no config\.json'):
    trained.load(tmp_path)
  folders.write(tmp_path, steps=())
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(ValueError, match='no finished checkpoint'):
    trained.load(tmp_path)


def test_a_config_that_was_edited_is_refused(tmp_path):
  folders.write(tmp_path)
  path, sha256 = (tmp_path / name for name in ('config.json', 'config.sha256'))
  config = json.loads(path.read_text())
  path.write_text(json.dumps(config))  # other blanks
  trained.load(tmp_path)
  # No shape of a parameter depends on it.
  config['model']['moe']['num_selected'] += 1
  path.write_text(json.dumps(config))
  with pytest.raises(ValueError, match=r'config\.json has changed .*\.sha256'):
    trained.load(tmp_path)
  sha256.unlink()  # as in runs of earlier versions
  trained.load(tmp_path)


@pytest.mark.parametrize(
  ('task', 'ends'),
  [(Seq2SeqTask(), [1]), (PrefixLmTask(), []), (Ul2Task(), []), (LmTask(), [])],
)
def test_prompts_begin_as_rows_of_training_do(task, ends):
  # The tokenizer begins inputs with <s>, which documents have not. Pairs are
  # read from streams of documents.
  vocabulary = {'<s>': 0, '</s>': 1, 'a': 2, 'b': 3, '<unk>': 4}
  model = hf.models.WordLevel(vocabulary, unk_token='<unk>')
  words = hf.Tokenizer(model)
  words.pre_tokenizer = hf.pre_tokenizers.Whitespace()
  words.add_special_tokens(['<s>', '</s>'])
  words.post_processor = hf.processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', 0)]
  )
  tokenizer = task.vocabulary(tokenizers.Json(words.to_str()), RowShape(64))
  assert tokenizer.encode('a b').tolist() == [2, 3]
  assert trained_run.encode(task, tokenizer, 'a b').tolist() == [2, 3, *ends]
  if isinstance(task, Ul2Task):
    ids = trained_run.encode(task, tokenizer, '[S] a b').tolist()
    assert ids == [tokenizer.token_id('[S]'), 2, 3]
  ids = trained_run.encode(task, tokenizer, 'a b', imported=True)
  assert ids.tolist() == [0, 2, 3, *ends]


def test_ids_that_the_tokenizer_lacks_have_no_text():
  assert trained_run.decode(tokenizers.Bytes(), np.array([97, 400, 98])) == 'ab'


@pytest.mark.parametrize(
  ('positions', 'expected'),
  [('rotary', 24), ('relative', 24), ('sinusoidal', 0), ('learned', 0)],
)
def test_the_window_is_a_row_where_positions_are_distances(positions, expected):
  options = tiny_runs.options(model={'positions': {'kind': positions}})
  built = tiny_runs.model_of(options)
  assert trained_run.window(options.data, built) == expected
  assert trained_run.window(options.data, built, imported=True) == 0
  halves = tiny.build(kind='encoder_decoder', positions=Relative())
  assert trained_run.window(options.data, halves) == 0


def test_what_fits_learned_positions():
  # There are T=10 positions; the last new token is never read.
  model = tiny.build(positions=Learned())
  for length, max_tokens, num_kept, num_tokens in (
    (3, 5, 3, 5), (4, 7, 4, 7), (4, 8, 4, 7), (9, 40, 5, 6), (30, 1, 10, 1),
  ):  # fmt: skip
    prompt = np.arange(length)
    fitting_prompt, n = trained_run.fit(model, prompt, max_tokens)
    np.testing.assert_array_equal(fitting_prompt, prompt[length - num_kept :])
    assert n == num_tokens
    assert len(fitting_prompt) + n - 1 <= 10
  fitting_prompt, n = trained_run.fit(tiny.build(), np.arange(30), 50)
  assert (len(fitting_prompt), n) == (30, 50)
  halves = tiny.build(positions=Learned(), kind='encoder_decoder')
  fitting_prompt, n = trained_run.fit(halves, np.arange(30), 50)
  np.testing.assert_array_equal(fitting_prompt, np.arange(10))
  assert n == 10


def test_special_ids_are_the_tokenizers():
  decoder = tiny.build()
  halves = tiny.build(kind='encoder_decoder', positions=Relative())
  tokenizer = tokenizers.Bytes()
  assert trained_run.special_ids(decoder, tokenizer) == {'stop_ids': (256,)}
  special_ids = trained_run.special_ids(halves, tokenizer)
  assert special_ids == {'stop_ids': (256,), 'start_id': 256}
  with pytest.raises(ValueError, match='no id that starts a decoder'):
    trained_run.special_ids(halves, tokenizers.Chars('ab'))
