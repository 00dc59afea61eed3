"""Text to batches: sources, tokenizers, tasks, rows, the batch stream.

`batch(i)` is a pure function of i, so the state of a run's data is one
integer. Not here: devices, and the models that read the batches.
"""

from moe_jax.data.dataset import TASKS, DataConfig, Dataset, load, read_pairs
from moe_jax.data.examples import ExampleRows
from moe_jax.data.packing import PackedRows, Rows
from moe_jax.data.pipeline import (
  batch_dataset,
  eval_batches,
  spread,
  train_batches,
)
from moe_jax.data.prefetch import DataError
from moe_jax.data.sources.choices import (
  Item,
  ItemSelection,
  ItemSource,
  open_items,
)
from moe_jax.data.sources.classes import ClassSource, Examples, open_classes
from moe_jax.data.sources.pairs import PairSelection, PairSource, open_pairs
from moe_jax.data.tasks.class_rows import ClassRows
from moe_jax.data.tasks.denoising import DenoisedRows
from moe_jax.data.tasks.prefix_lm import PrefixLM
from moe_jax.data.tasks.seq2seq import PairRows
from moe_jax.data.tasks.span_corruption import SpanCorruption
from moe_jax.data.tasks.ul2 import DENOISERS

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
