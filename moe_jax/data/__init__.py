"""Text to batches: sources, tokenizers, packed rows, the batch stream.

`batch(i)` is a pure function of i, so the state of a run's data is one
integer. Not here: devices, and the models that read the batches.
"""

from moe_jax.data.dataset import DataConfig, Dataset, load
from moe_jax.data.packing import PackedRows
from moe_jax.data.pipeline import batch_dataset, eval_batches, train_batches

__all__ = [
  'DataConfig',
  'Dataset',
  'PackedRows',
  'batch_dataset',
  'eval_batches',
  'load',
  'train_batches',
]
