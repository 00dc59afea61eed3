"""Token streams on disk: written, counted, digested and refused."""

import numpy as np
import pytest

from moe_jax.data import store, tokenizers
from tests.data.stored import (
  read_pairs,
  read_tokens,
  write_pairs,
  write_tokens,
)


def test_documents_end_in_eos_and_empty_ones_go(tmp_path):
  texts = {'train': ['ab', '', 'c'], 'validation': ['é']}
  write_tokens(tmp_path, texts, tokenizers.Bytes())
  tokens, starts = read_tokens(tmp_path, 'train')
  assert tokens.tolist() == [97, 98, 256, 99, 256]
  assert starts.tolist() == [0, 3]
  assert tokens.dtype == np.uint16  # the smallest type that holds 256
  about = store.read_about(tmp_path)
  assert about['splits'] == {
    'train': {'documents': 2, 'bytes': 3, 'tokens': 5},
    'validation': {'documents': 1, 'bytes': 2, 'tokens': 3},
  }


def test_without_eos_and_in_one_byte(tmp_path):
  texts = {'train': ['ab', 'ca'], 'validation': ['bb']}
  write_tokens(tmp_path, texts, tokenizers.Chars('abc'))
  tokens, starts = read_tokens(tmp_path, 'train')
  assert tokens.tolist() == [0, 1, 2, 0]
  assert starts.tolist() == [0, 2]
  assert tokens.dtype == np.uint8


def digest_of(**splits):
  digest = store.Digest()
  for name, texts in splits.items():
    digest.split(name)
    for text in texts:
      digest.text(text.encode())
  return digest.hexdigest()


def test_digest_tells_boundaries_apart(tmp_path):
  texts = {'train': ['ab', 'c'], 'validation': ['dd']}
  write_tokens(tmp_path, texts, tokenizers.Bytes())
  stored_digest = store.read_about(tmp_path)['sha256']
  assert stored_digest == digest_of(**texts)
  other_digests = [
    digest_of(train=['a', 'bc'], validation=['dd']),
    digest_of(train=['abc'], validation=['dd']),
    digest_of(train=['ab'], validation=['c', 'dd']),
    digest_of(train=['c', 'ab'], validation=['dd']),
  ]
  assert len({stored_digest, *other_digests}) == 5


@pytest.mark.parametrize('texts', [[], [''], ['', '']])
def test_an_empty_split_is_refused(texts, tmp_path):
  splits = {'train': ['ab'], 'validation': texts}
  with pytest.raises(ValueError, match="'validation' has 0 tokens"):
    write_tokens(tmp_path, splits, tokenizers.Bytes())


def test_one_token_is_too_few(tmp_path):
  splits = {'train': ['a'], 'validation': ['ab']}
  with pytest.raises(ValueError, match="'train' has 1 tokens"):
    write_tokens(tmp_path, splits, tokenizers.Chars('ab'))


# Streams of pairs follow.


def test_pairs_have_two_streams_and_no_eos(tmp_path):
  pairs = {
    'train': [('ab', 'c'), ('', 'gone'), ('gone', ''), ('d', 'éf')],
    'validation': [('x', 'y')],
  }
  write_pairs(tmp_path, pairs, tokenizers.Bytes())
  inputs, targets = read_pairs(tmp_path, 'train')
  assert [side.tolist() for side in inputs] == [[97, 98, 100], [0, 2]]
  assert [side.tolist() for side in targets] == [[99, 195, 169, 102], [0, 1]]
  assert inputs[0].dtype == np.uint16
  assert store.read_about(tmp_path)['splits'] == {
    'train': {
      'pairs': 2, 'bytes': 15, 'input_tokens': 3, 'target_tokens': 4
    },
    'validation': {
      'pairs': 1, 'bytes': 2, 'input_tokens': 1, 'target_tokens': 1
    },
  }  # fmt: skip


def test_the_digest_tells_sides_apart(tmp_path):
  digests = set()
  for i, pair in enumerate([('ab', 'c'), ('a', 'bc'), ('c', 'ab')]):
    folder = tmp_path / str(i)
    folder.mkdir()
    splits = {'train': [pair], 'validation': [pair]}
    write_pairs(folder, splits, tokenizers.Bytes())
    digests.add(store.read_about(folder)['sha256'])
  assert len(digests) == 3


def test_a_split_without_pairs_is_refused(tmp_path):
  pairs = {'train': [('ab', 'c')], 'validation': [('', 'c')]}
  with pytest.raises(ValueError, match="'validation' has no pair"):
    write_pairs(tmp_path, pairs, tokenizers.Bytes())
