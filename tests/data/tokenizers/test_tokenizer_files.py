"""One option reads tokenizers of runs, of Hugging Face and of SentencePiece."""

import pytest

from moe_jax.data import tokenizers
from moe_jax.data.tokenizers import extra_ids
from tests.data.tokenizers import models
from tests.interop.folders import write_tokenizer

TEXT = 'the cat\n'


def run_folder(path, tokenizer):
  path.mkdir(exist_ok=True)
  (path / 'config.json').write_text('{}')
  tokenizer.save(path / 'tokenizer.json')
  return path


@pytest.mark.parametrize(
  'tokenizer',
  [
    tokenizers.Bytes(),
    tokenizers.Chars(TEXT),
    tokenizers.SentencePiece(models.bpe()),
    tokenizers.TrainedOptions('bpe', 270).fit([TEXT]),
    tokenizers.TrainedOptions('unigram', 270).fit([TEXT] * 9),
  ],
  ids=lambda t: t.kind,
)
def test_runs(tokenizer, tmp_path):
  """A run's folder and file give its tokenizer without the EOS after inputs."""
  extended = extra_ids.extend(tokenizer, end_inputs=True)
  folder = run_folder(tmp_path, extended)
  for path in (folder, folder / 'tokenizer.json'):
    options = tokenizers.FileOptions(str(path))
    copy = options.fit(iter(['no text is read']))
    assert copy.encode_inputs(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    # The next task finds the ids of the last one, with the same meaning.
    again = extra_ids.extend(copy, end_inputs=True)
    assert again.identity == extended.identity
    assert again.vocab_size == options.known_vocab_size() == extended.vocab_size


def test_ids_of_tasks_are_not_added_twice():
  letters = tokenizers.Chars('ab')
  first = extra_ids.extend(
    letters, num_sentinels=2, modes=('S', 'X'), end_inputs=True
  )
  assert first.names == ('<eos>', '<extra_id_0>', '<extra_id_1>', '[S]', '[X]')
  plain = extra_ids.without_endings(first)
  assert plain.encode_inputs('a[S]').tolist() == [0, 5]
  again = extra_ids.extend(
    plain, num_sentinels=3, modes=('S',), end_inputs=True
  )
  assert again.names == (*first.names, '<extra_id_2>')
  assert again.sentinel_ids == (3, 4, 7)
  assert again.eos_id == first.eos_id == 2


def test_models_of_others(tmp_path):
  write_tokenizer(tmp_path, 'mixtral')
  from_folder = tokenizers.read(tmp_path)
  from_file = tokenizers.read(tmp_path / 'tokenizer.json')
  assert (
    from_folder.special.chat_template and from_file.eos_id == from_folder.eos_id
  )
  assert from_folder.encode(TEXT).tolist() == from_file.encode(TEXT).tolist()
  # A tokenizer.json is read before any other file of its folder.
  (tmp_path / 'tokenizer.model').write_bytes(b'')
  assert tokenizers.read(tmp_path).identity == from_folder.identity


def folder_of(tmp_path, files):
  for name, content in files.items():
    if isinstance(content, bytes):
      (tmp_path / name).write_bytes(content)
    else:
      (tmp_path / name).write_text(content)
  return tmp_path


@pytest.mark.parametrize(
  ('files', 'name', 'message'),
  [
    (
      {},
      'missing.model',
      r'no file .*missing\.model in .*give the path of a f',
    ),
    ({}, '', r'has no tokenizer\.json and no \*\.model, only \[\]'),
    (
      {'notes.txt': 'x'},
      '',
      r"only \['notes\.txt'\]; give the path of a folde",
    ),
    ({'notes.txt': 'x'}, 'notes.txt', 'notes.txt is no SentencePiece model'),
    ({'a.model': '', 'b.model': ''}, '', 'several models, a.model, b.model'),
    ({'a.model': ''}, '', 'a.model is no SentencePiece model: '),
    ({'tokenizer.json': '{'}, '', 'tokenizer.json is no JSON'),
    ({'tokenizer.json': b'{\xff'}, '', 'tokenizer.json is not UTF-8'),
    ({'tokenizer.json': '{}'}, '', 'not a tokenizers JSON file'),
    ({'tokenizer.json': '{"kind": "x"}'}, '', "unknown tokenizer kind 'x'"),
    (
      {'tokenizer.json': '{"kind": "sentencepiece", "model": "x"}'},
      '',
      'holds no saved tokenizer: ',
    ),
  ],
)
def test_bad_files(files, name, message, tmp_path):
  path = folder_of(tmp_path, files) / name
  options = tokenizers.FileOptions(str(path))
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
