"""One option reads tokenizers of runs, of Hugging Face and of SentencePiece."""

import pytest

from moe_jax.data import tokenizers
from tests.data.tokenizers import models
from tests.interop.folders import write_tokenizer


def test_models_of_others(tmp_path):
  write_tokenizer(tmp_path, 'mixtral')
  from_folder = tokenizers.read(tmp_path)
  from_file = tokenizers.read(tmp_path / 'tokenizer.json')
  assert from_folder.special.chat_template
  assert from_file.eos_id == from_folder.eos_id
  ids = from_folder.encode('the cat\n').tolist()
  assert ids == from_file.encode('the cat\n').tolist()
  # A tokenizer.json is read before any other file of its folder.
  (tmp_path / 'tokenizer.model').write_bytes(b'')
  assert tokenizers.read(tmp_path).identity == from_folder.identity


def test_a_folder_without_one_model_is_refused(tmp_path):
  options = tokenizers.FileOptions(str(tmp_path))
  for name, message in (
    ('a.txt', r"no tokenizer\.json and no \*\.model, only \['a\.txt'"),
    ('a.model', 'a.model is no SentencePiece model'),
    ('b.model', 'several models, a.model, b.model'),
    ('tokenizer.json', 'tokenizer.json is no JSON'),
  ):
    (tmp_path / name).write_text('{' * name.endswith('json'))
    for read in (options.identity, options.known_vocab_size):
      with pytest.raises(ValueError, match=f'tokenizer file: .*{message}'):
        read()


def test_links_and_endless_files_are_refused(tmp_path, monkeypatch):
  (tmp_path / 'secret').write_bytes(models.bpe())
  folder = tmp_path / 'folder'
  folder.mkdir()
  (folder / 'spiece.model').symlink_to(tmp_path / 'secret')
  with pytest.raises(ValueError, match=r'a link to .* not followed'):
    tokenizers.read(folder)
  monkeypatch.setattr('moe_jax.data.plain_files.MOST_BYTES', 100)
  with pytest.raises(ValueError, match='at most 100 are read'):
    tokenizers.read(tmp_path / 'secret')
