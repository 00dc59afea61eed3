"""Every tokenizer keeps its contract: ours, and a user's own.

The oracle is the text itself, which comes back, and a tokenizer's own copies:
saved, pickled, from a run's folder, of another process.
"""

import concurrent.futures
import multiprocessing
import pathlib
import pickle
import sys

import numpy as np
import pytest

from moe_jax.data import (
  TOKENIZERS,
  FileOptions,
  JsonOptions,
  TrainedOptions,
  tokenizers,
)
from moe_jax.data.tokenizers.extra_ids import extend
from tests.data import own_kinds
from tests.data.tokenizers import models

OWN = f'{own_kinds.__name__}:WordsOptions'
WORDS = ['the cat and the hat', 'hat']
# Tokenizers of bytes and of characters give back every one of these texts, and
# no text forges the end of a document.
TEXTS = [*(t.replace('\u2581', ' ') for t in models.TEXTS), *WORDS,
         'a<eos></s><|endoftext|>b']  # fmt: skip


def options_of(kind, folder):
  """Returns the options of a kind, with a file in `folder` if they name one."""
  kind, _, model = kind.partition(' ')
  if kind == 'file':
    (folder / 'a.model').write_bytes(models.bpe())
    return FileOptions(str(folder / 'a.model'))
  if kind == 'json':
    models.byte_level().save(str(folder / 'a.json'))
    return JsonOptions(str(folder / 'a.json'))
  return TrainedOptions(model, 400) if model else TOKENIZERS.get(kind)()


KINDS = [*TOKENIZERS.builtin, 'trained unigram', OWN]


@pytest.fixture(scope='module')
def fitted(tmp_path_factory):
  """The options and a tokenizer of each kind."""
  every = {}
  for kind in KINDS:
    options = options_of(kind, tmp_path_factory.mktemp('tokenizer'))
    every[kind] = options, options.fit(WORDS * 5 if kind == OWN else TEXTS * 5)
  return every


def texts_of(kind):
  return WORDS if kind == OWN else TEXTS


def encoded(tokenizer, texts):
  return [tokenizer.encode(text).tolist() for text in texts]


@pytest.mark.parametrize('kind', KINDS)
def test_texts_come_back_from_it_and_its_copies(kind, fitted, tmp_path):
  _, tokenizer = fitted[kind]
  tokenizer.save(tmp_path / 't.json')
  copy = pickle.loads(pickle.dumps(tokenizer))
  for t in (tokenizer, tokenizers.load(tmp_path / 't.json'), copy):
    assert t.to_json() == tokenizer.to_json()
    assert t.identity == tokenizer.identity
    assert (t.eos_id, t.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size)
    for text in texts_of(kind):
      ids = t.encode(text)
      assert ids.dtype == np.int32 and ids.ndim == 1
      assert np.isin(ids, np.arange(t.vocab_size)).all()
      assert t.eos_id not in ids.tolist()
      ends = [] if t.eos_id is None else [t.eos_id]
      assert t.decode([*ids, *ends]) == text  # an end of text has no text
      assert all(map(t.token_name, ids))
    assert t.encode('').shape == (0,)
    for outside in (-1, t.vocab_size):
      for function in (t.token_name, lambda i: t.decode([0, i])):  # noqa: B023
        with pytest.raises(ValueError, match=f'token {outside} not in'):
          function(outside)
  batch = tokenizer.encode_batch(iter(texts_of(kind)))
  assert [ids.tolist() for ids in batch] == encoded(tokenizer, texts_of(kind))


@pytest.mark.parametrize('kind', KINDS)
def test_options_know_the_tokenizer(kind, fitted):
  options, tokenizer = fitted[kind]
  assert options.known_vocab_size() in (None, tokenizer.vocab_size)
  others = [pair for other, pair in fitted.items() if other != kind]
  assert options.identity() not in [o.identity() for o, _ in others]
  assert tokenizer.identity not in [t.identity for _, t in others]


@pytest.mark.parametrize('kind', KINDS)
def test_a_runs_folder_has_it_with_the_ids_of_a_task(kind, fitted, tmp_path):
  """The folder gives the same ids, without the EOS that ended inputs."""
  _, tokenizer = fitted[kind]
  changes = dict(num_sentinels=3, modes='RS', end_inputs=True)
  extended = extend(tokenizer, **changes)
  more = extend(tokenizer, **changes | {'num_sentinels': 4})
  assert len({t.identity for t in (tokenizer, extended, more)}) == 3
  text, *_ = texts_of(kind)
  assert [*extended.encode_inputs(text)] == [
    *tokenizer.encode(text), extended.eos_id,
  ]  # fmt: skip
  (tmp_path / 'config.json').write_text('{}')
  extended.save(tmp_path / 'tokenizer.json')
  for path in (tmp_path, tmp_path / 'tokenizer.json'):
    options = FileOptions(str(path))
    copy = options.fit(iter(['no text is read']))
    for read in (copy.encode, copy.encode_inputs):
      assert [*read(text)] == [*tokenizer.encode(text)]
    batch = extended.encode_batch(texts_of(kind))
    assert [ids.tolist() for ids in batch] == encoded(copy, texts_of(kind))
    assert copy.decode(extended.sentinel_ids[:2]) == '<extra_id_0><extra_id_1>'
    # The next task finds the ids of the last one, with the same meaning.
    again = extend(copy, **changes)
    assert again.to_json() == extended.to_json()
    assert again.identity == extended.identity
    assert again.vocab_size == options.known_vocab_size() == extended.vocab_size


def of_this_process(kind, folder):
  tokenizer = options_of(kind, folder).fit(WORDS * 5)
  return tokenizer.identity, encoded(tokenizer, WORDS)


@pytest.mark.slow
def test_another_process_has_equal_tokenizers(fitted, monkeypatch, tmp_path):
  # The other process has another order of sets, and more threads.
  monkeypatch.setenv('PYTHONHASHSEED', '1')
  monkeypatch.setenv('RAYON_NUM_THREADS', '4')
  spawn = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
    for kind in KINDS:
      theirs = pool.submit(of_this_process, kind, tmp_path)
      assert theirs.result() == of_this_process(kind, tmp_path)
      given = pool.submit(encoded, fitted[kind][1], texts_of(kind))
      assert given.result() == encoded(fitted[kind][1], texts_of(kind))


def test_a_kill_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'tokenizer.json'
  tokenizers.Bytes().save(path)

  def killed(file, text, **_):
    file.write_bytes(text[:9].encode())
    raise KeyboardInterrupt

  monkeypatch.setattr(pathlib.Path, 'write_text', killed)
  with pytest.raises(KeyboardInterrupt):
    tokenizers.Chars('ab').save(path)
  assert tokenizers.load(path).identity == 'bytes'


def test_a_class_that_encodes_otherwise_encodes_batches_so():
  class Upper(tokenizers.Bytes, kind='upper of a test'):
    def encode(self, text):
      return super().encode(text.upper())

  assert Upper().encode_batch(['ab'])[0].tolist() == list(b'AB')


def test_a_file_never_imports_a_users_tokenizer(tmp_path, monkeypatch):
  path = tmp_path / 'tokenizer.json'
  own_kinds.Words('ab').save(path)
  (tmp_path / 'never_read.py').write_text('raise RuntimeError("imported")\n')
  monkeypatch.syspath_prepend(tmp_path)
  path.write_text(path.read_text().replace(own_kinds.__name__, 'never_read'))
  with pytest.raises(ValueError, match="unknown tokenizer kind 'never_read:Wo"):
    tokenizers.load(path)
  assert 'never_read' not in sys.modules
