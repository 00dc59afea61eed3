"""Token streams on disk, by hand: written, counted, digested and refused."""

import hashlib

import numpy as np
import pytest

from moe_jax.data import store, tokenizers
from tests.data.stored import read_pairs, read_tokens, write_pairs, write_tokens


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


def digest_of(folder, write, train, validation):
  folder /= hashlib.sha256(repr((train, validation)).encode()).hexdigest()
  folder.mkdir()
  splits = {'train': train, 'validation': validation}
  write(folder, splits, tokenizers.Bytes())
  return store.read_about(folder)['sha256']


def test_the_digest_tells_texts_sides_and_splits_apart(tmp_path):
  texts = [
    (['ab', 'c'], ['dd']),
    (['a', 'bc'], ['dd']),
    (['abc'], ['dd']),
    (['ab'], ['c', 'dd']),
    (['c', 'ab'], ['dd']),
  ]
  pairs = [([pair], [pair]) for pair in (('ab', 'c'), ('a', 'bc'), ('c', 'ab'))]
  digests = {digest_of(tmp_path, write_tokens, *splits) for splits in texts}
  digests |= {digest_of(tmp_path, write_pairs, *splits) for splits in pairs}
  assert len(digests) == len(texts) + len(pairs)


@pytest.mark.parametrize(
  ('write', 'validation', 'message'),
  [
    (write_tokens, ['', ''], "'validation' has 0 tokens"),
    (write_tokens, ['a'], "'validation' has 1 tokens"),
    (write_pairs, [('', 'c')], "'validation' has 0 tokens in 0 pairs"),
  ],
)
def test_a_split_with_nothing_to_learn_is_refused(
  write, validation, message, tmp_path
):
  train = ['ab'] if write is write_tokens else [('a', 'b')]
  splits = {'train': train, 'validation': validation}
  with pytest.raises(ValueError, match=message):
    write(tmp_path, splits, tokenizers.Chars('abc'))
