"""Tensors are loaded into shards; checkpoints that do not fit are refused."""

import json

import jax
import numpy as np
import pytest

from moe_jax import interop, partitioning
from moe_jax.interop import checkpoint_folder, loading
from tests.interop import oracle
from tests.interop.folders import assert_equal

torch = pytest.importorskip('torch')
files = pytest.importorskip('safetensors.torch')


@pytest.fixture(scope='module')
def sharded(tmp_path_factory):
  """A checkpoint in several files."""
  folder = tmp_path_factory.mktemp('mixtral')
  model = oracle.make('mixtral', num_local_experts=8)
  model.save_pretrained(folder, max_shard_size='50KB')
  assert len(list(folder.glob('model-*-of-*.safetensors'))) >= 4
  return folder


@pytest.mark.slow
def test_a_mesh_of_eight_devices(sharded):
  mesh = partitioning.make_mesh(dict(expert=4, tensor=2))
  checkpoint = checkpoint_folder.open_checkpoint(sharded)
  params = loading.load_variables(checkpoint, mesh=mesh)['params']
  experts = params['layers']['layer_0']['moe']['experts']
  for name, value in experts.items():
    shards = value.addressable_shards
    assert len(shards) == 8, name
    assert all(8 * shard.data.nbytes == value.nbytes for shard in shards), name
  # Every shard equals that part of the array on a single device.
  assert_equal(params, interop.load(sharded).variables['params'])


def rewritten(tmp_path, kind, change):
  """A small checkpoint whose tensors were changed by `change`."""
  oracle.make(kind).save_pretrained(tmp_path)
  path = tmp_path / 'model.safetensors'
  tensors = files.load_file(path)
  change(tensors)
  files.save_file(tensors, path)


def test_all_that_is_wrong_is_listed(tmp_path):
  def change(tensors):
    gate = 'model.layers.1.block_sparse_moe.gate.weight'
    del tensors[gate], tensors['model.norm.weight']
    tensors['model.layers.0.self_attn.q_proj.bias'] = torch.zeros(24)
    tensors['lm_head.weight'] = torch.zeros(53, 23)
    tensors['model.embed_tokens.weight'] = torch.zeros(53, 24, dtype=torch.int8)

  rewritten(tmp_path, 'mixtral', change)
  with pytest.raises(ValueError, match='does not hold the mixtral m') as caught:
    interop.load(tmp_path)
  lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
  for line, part in zip(
    lines,
    (
      'missing: model.layers.1.block_sparse_moe.gate.weight [5, 24]',
      'missing: model.norm.weight [24], for final_norm/scale',
      'shape: lm_head.weight is [53, 23], the config asks for [53, 24]',
      'type: model.embed_tokens.weight is I8',
      'unknown: model.layers.0.self_attn.q_proj.bias [24]',
    ),
    strict=True,
  ):
    assert line.startswith(part)


def test_copies_of_the_embedding_must_be_copies(tmp_path):
  def change(tensors):
    shared = tensors['shared.weight']
    tensors['encoder.embed_tokens.weight'] = shared.clone()
    tensors['lm_head.weight'] = shared + (torch.arange(53) == 52)[:, None]

  rewritten(tmp_path, 'switch_transformers', change)
  with pytest.raises(ValueError) as caught:
    interop.load(tmp_path)
  lines = str(caught.value).splitlines()[1:]
  assert lines == ['  tied: lm_head.weight differs from shared.weight']


def pickled(model, folder):
  model.config.save_pretrained(folder)
  torch.save(model.state_dict(), folder / 'pytorch_model.bin')


# Other kinds with stacked experts are in a slow test of `test_parity.py`.
@pytest.mark.parametrize(
  'kind',
  [
    'mixtral',
    'switch_transformers',
    *(pytest.param(x, marks=pytest.mark.slow) for x in ('gpt_oss', 'nllb-moe')),
  ],
)
def test_spellings_of_other_releases(kind, tmp_path):
  # PyTorch names parameters otherwise: Mixtral's experts are one tensor, and
  # copies of embeddings exist.
  model = oracle.make(kind)
  old, new = tmp_path / 'old', tmp_path / 'new'
  old.mkdir()
  pickled(model, old)
  model.save_pretrained(new)
  assert_equal(interop.load(old).variables, interop.load(new).variables)


def test_a_model_without_its_head(tmp_path):
  model = oracle.make('mixtral', tie_word_embeddings=True)
  model.model.save_pretrained(tmp_path / 'bare')
  model.save_pretrained(tmp_path / 'whole')
  variables = interop.load(tmp_path / 'bare').variables
  assert_equal(variables, interop.load(tmp_path / 'whole').variables)


def test_numbers_of_another_width(tmp_path):
  model = oracle.make('mixtral').half()
  model.save_pretrained(tmp_path)
  params = interop.load(tmp_path).variables['params']
  assert params['embedding'].dtype == np.float32
  expected = model.model.embed_tokens.weight.float().detach().numpy()
  np.testing.assert_array_equal(params['embedding'], expected)
  params = interop.load(tmp_path, dtype='bfloat16').variables['params']
  check_bfloat16(params)


def check_bfloat16(params):
  moe = params['layers']['layer_0']['moe']
  assert moe['experts']['w_in'].dtype == jax.numpy.bfloat16
  assert moe['router']['w'].dtype == np.float32


def test_a_config_without_a_dtype_has_that_of_its_files(tmp_path):
  oracle.make('mixtral').bfloat16().save_pretrained(tmp_path)
  path = tmp_path / 'config.json'
  config = json.loads(path.read_text())
  assert config.pop('dtype') == 'bfloat16'
  path.write_text(json.dumps(config))
  loaded = interop.load(tmp_path)
  check_bfloat16(loaded.variables['params'])
  assert loaded.options.numerics.dtype == 'bfloat16'
