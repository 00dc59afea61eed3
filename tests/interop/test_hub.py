"""Repositories of the hub, read from its cache: no test uses the network."""

import json
import pathlib

import huggingface_hub
import pytest

from moe_jax import interop
from moe_jax.interop import checkpoint_folder
from tests.interop import oracle

COMMIT = 'c0ffee' + 34 * '0'


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """An empty cache of the hub's client, which stays offline."""
  constants = huggingface_hub.constants
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
  return tmp_path / 'hub'


def repository(cache, name) -> pathlib.Path:
  """The folder for the files of a repository's main branch."""
  folder = cache / f'models--{name.replace("/", "--")}'
  (folder / 'refs').mkdir(parents=True)
  (folder / 'refs' / 'main').write_text(COMMIT)
  (folder / 'snapshots' / COMMIT).mkdir(parents=True)
  return folder / 'snapshots' / COMMIT


@pytest.mark.slow
def test_a_repository_is_loaded_like_a_folder(cache, tmp_path):
  model = oracle.make('mixtral')
  model.save_pretrained(repository(cache, 'who/what'))
  _, imported, variables = interop.load('who/what')
  assert imported.vocab_size == model.config.vocab_size
  assert variables['params']['embedding'].shape == (53, 24)
  with pytest.raises(ValueError, match='the hub does not give it'):
    interop.load('who/what', revision='other')


def test_a_config_is_refused_before_weights_are_fetched(cache):
  folder = repository(cache, 'who/what')
  (folder / 'config.json').write_text(json.dumps({'model_type': 'gpt2'}))
  with pytest.raises(ValueError, match=r"unknown model_type in .*'gpt2'; have"):
    interop.load('who/what')


@pytest.mark.parametrize(
  ('files', 'stems'),
  [
    (['model.safetensors', 'pytorch_model.bin'], ['model']),
    (['model-1-of-2.safetensors', 'pytorch_model.bin'], ['model']),
    (['pytorch_model-1-of-2.bin'], ['model', 'pytorch_model']),
  ],
)
def test_safetensors_are_asked_for_first(files, stems, tmp_path, monkeypatch):
  for name in files:
    (tmp_path / name).touch()
  requests = []

  def snapshot_download(name, revision, allow_patterns):
    assert (name, revision) == ('who/what', 'v2')
    requests.append(allow_patterns)
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
  assert checkpoint_folder.fetch_folder('who/what', revision='v2') == tmp_path
  assert [patterns[-1].split('-')[0] for patterns in requests] == stems
  assert all({'*.json', '*.jinja'} <= set(patterns) for patterns in requests)
