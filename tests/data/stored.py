"""Streams of tokens that tests write and read, in a single piece."""

import pathlib
import tempfile

from moe_jax.data import store
from moe_jax.data.contracts import DOCUMENTS, PAIRS, Pairs, Texts


def write(folder, corpus, tokenizer):
  """Writes the only piece of a corpus, and what pieces have in common."""
  with tempfile.TemporaryDirectory() as name:
    piece, texts = pathlib.Path(name), corpus.in_pieces().read(0)
    store.write_piece(piece, texts, tokenizer, corpus.streams)
    store.join([piece], folder, tokenizer, corpus.streams)


def write_tokens(folder, texts, tokenizer):
  """Writes the documents of each split."""
  write(folder, Texts('', '', lambda split: iter(texts[split])), tokenizer)


def write_pairs(folder, pairs, tokenizer):
  """Writes the pairs of each split."""
  write(folder, Pairs('', '', lambda split: iter(pairs[split])), tokenizer)


def read_tokens(folder, split):
  """Returns the stream of a split's documents."""
  return store.read(folder, split, DOCUMENTS)


def read_pairs(folder, split):
  """Returns the streams of a split's inputs and of its targets."""
  return store.read(folder, split, PAIRS)
