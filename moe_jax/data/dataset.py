"""From a `DataConfig` to packed rows: source, tokenizer, token cache.

Not here: batches (`pipeline.py`).
"""

import dataclasses
import hashlib
import pathlib

from moe_jax.data import store, tokenizers
from moe_jax.data.packing import PackedRows
from moe_jax.data.sources import SPLITS, Selection, open_source


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What text, as which tokens, in rows of which length.

  Attributes:
    source: 'python_stdlib', 'python_stdlib:<module>,<module>',
      'files:<glob>' or 'tfds:<name>'; see `sources.open_source`.
    tokenizer: 'bytes', 'chars' or 'json:<path>' (a tokenizers JSON file).
    seq_len: T.
    text_feature: The TFDS feature that holds the text.
    train_split: The source's split to train on. TFDS sources, python_stdlib
      among them, take any split expression, such as 'train[:90%]'.
    validation_split: The source's split to validate on.
    cache_dir: Where token streams and the embedded corpus are kept; '' is
      $MOE_JAX_CACHE or ~/.cache/moe_jax. TFDS datasets stay where TFDS has
      them ($TFDS_DATA_DIR).
  """

  source: str
  tokenizer: str
  seq_len: int
  text_feature: str = 'text'
  train_split: str = 'train'
  validation_split: str = 'validation'
  cache_dir: str = ''


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A tokenized corpus.

  Attributes:
    source: What it is, for people.
    tokenizer: As fitted when the corpus was tokenized.
    splits: The rows of 'train' and of 'validation'.
    digest: The sha256 of both splits' texts, in order; results are comparable
      only where it is the same.
    counts: For each split its 'documents', 'bytes' (of UTF-8) and 'tokens'.
  """

  source: str
  tokenizer: tokenizers.Tokenizer
  splits: dict[str, PackedRows]
  digest: str
  counts: dict[str, dict[str, int]]

  def describe(self) -> str:
    """Lines to print at the start of a run: what is trained on, exactly."""
    total = {
      key: sum(counts[key] for counts in self.counts.values())
      for key in ('documents', 'bytes')
    }
    lines = [
      f'data: {self.source}, {total["documents"]:,} documents, '
      f'{total["bytes"]:,} bytes, sha256 {self.digest}',
      f'tokenizer: {self.tokenizer.identity}, V={self.tokenizer.vocab_size}',
    ]
    for split, rows in self.splits.items():
      counts = self.counts[split]
      lines.append(
        f'{split}: {counts["documents"]:,} documents, '
        f'{counts["bytes"]:,} bytes, {counts["tokens"]:,} tokens, '
        f'{len(rows):,} rows of T={rows.seq_len}'
      )
    return '\n'.join(lines)


def load(config: DataConfig) -> Dataset:
  """The dataset of `config`, tokenized now unless it is in the cache.

  Tokens are memory-mapped. The cache is keyed by the source's content and the
  tokenizer; it holds whole streams, so `seq_len` may change freely.

  Raises:
    ValueError: `seq_len` is below 1; the source or the tokenizer is unknown or
      missing; a text has a character the tokenizer lacks; a split is empty.
  """
  if config.seq_len < 1:
    raise ValueError(f'seq_len={config.seq_len} is not at least 1')
  tokenizer_identity = tokenizers.spec_identity(config.tokenizer)
  selection = Selection(
    (config.train_split, config.validation_split), config.text_feature
  )
  source = open_source(config.source, selection, config.cache_dir)
  key = f'{store.FORMAT} {source.identity} {tokenizer_identity}'
  name = hashlib.sha256(key.encode()).hexdigest()[:32]

  def write(folder: pathlib.Path) -> None:
    texts = (t for split in SPLITS for t in source.documents(split))
    tokenizer = tokenizers.fit(config.tokenizer, texts)
    splits = {split: source.documents(split) for split in SPLITS}
    store.write_tokens(folder, splits, tokenizer)

  tokens_of = store.cache_root(config.cache_dir) / 'tokens'
  folder = store.prepared(tokens_of / name, write)
  about = store.read_about(folder)
  return Dataset(
    source=source.name,
    tokenizer=tokenizers.load(folder / 'tokenizer.json'),
    splits={
      split: PackedRows(*store.read_tokens(folder, split), config.seq_len)
      for split in SPLITS
    },
    digest=about['sha256'],
    counts=about['splits'],
  )
