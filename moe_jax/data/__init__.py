"""Text to batches: sources, tokenizers, tasks, rows, the batch stream.

`batch(i)` is a pure function of i, so the state of a run's data is one
integer. Not here: devices, and the models that read the batches.
"""

from moe_jax.data.choice_sources import (
  Item,
  ItemSelection,
  ItemSource,
  open_items,
)
from moe_jax.data.class_rows import ClassRows
from moe_jax.data.class_sources import ClassSource, Examples, open_classes
from moe_jax.data.dataset import TASKS, DataConfig, Dataset, load, read_pairs
from moe_jax.data.denoising import DenoisedRows
from moe_jax.data.examples import ExampleRows
from moe_jax.data.packing import PackedRows, Rows
from moe_jax.data.pair_sources import PairSelection, PairSource, open_pairs
from moe_jax.data.pipeline import (
  batch_dataset,
  eval_batches,
  spread,
  train_batches,
)
from moe_jax.data.prefetch import DataError
from moe_jax.data.prefix_lm import PrefixLM
from moe_jax.data.seq2seq import PairRows
from moe_jax.data.span_corruption import SpanCorruption
from moe_jax.data.ul2 import DENOISERS

__all__ = [
  'DENOISERS',
  'TASKS',
  'ClassRows',
  'ClassSource',
  'DataConfig',
  'DataError',
  'Dataset',
  'DenoisedRows',
  'ExampleRows',
  'Examples',
  'Item',
  'ItemSelection',
  'ItemSource',
  'PackedRows',
  'PairRows',
  'PairSelection',
  'PairSource',
  'PrefixLM',
  'Rows',
  'SpanCorruption',
  'batch_dataset',
  'eval_batches',
  'load',
  'open_classes',
  'open_items',
  'open_pairs',
  'read_pairs',
  'spread',
  'train_batches',
]
