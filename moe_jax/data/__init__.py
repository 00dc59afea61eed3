"""Batches from texts: sources, tokenizers, tasks, rows, the stream of batches.

`batch(i)` is a pure function of i, so the state of a run's data is one
integer.
"""

from moe_jax.data.choices import (
  CHOICE_SOURCES,
  SHOTS_SOURCES,
  ChoiceFilesSource,
  Item,
)
from moe_jax.data.dataset import DataOptions, load, read_pairs
from moe_jax.data.mixtures import MixtureOptions
from moe_jax.data.packing import PackedRows, Rows
from moe_jax.data.pipeline import (
  DataError,
  batch_dataset,
  eval_batches,
  spread,
  train_batches,
)
from moe_jax.data.sources import (
  SOURCES,
  DocstringsSource,
  FilesSource,
  GettextSource,
  InstructionSource,
  JsonlSource,
  PythonStdlibSource,
  TfdsSource,
  instructions,
)
from moe_jax.data.sources.contract import (
  SPLITS,
  Pairs,
  Question,
  Selection,
  SourceOptions,
  Texts,
)
from moe_jax.data.tasks import (
  TASKS,
  LmTask,
  PrefixLmTask,
  Seq2SeqTask,
  SpanCorruptionTask,
  Ul2Task,
)
from moe_jax.data.tasks.contract import Dataset, TaskOptions
from moe_jax.data.tokenizers import (
  TOKENIZERS,
  BytesOptions,
  CharsOptions,
  FileOptions,
  JsonOptions,
  TokenizerOptions,
  TrainedOptions,
)

__all__ = [
  'CHOICE_SOURCES',
  'SHOTS_SOURCES',
  'SOURCES',
  'SPLITS',
  'TASKS',
  'TOKENIZERS',
  'BytesOptions',
  'CharsOptions',
  'ChoiceFilesSource',
  'DataError',
  'DataOptions',
  'Dataset',
  'DocstringsSource',
  'FileOptions',
  'FilesSource',
  'GettextSource',
  'InstructionSource',
  'Item',
  'JsonOptions',
  'JsonlSource',
  'LmTask',
  'MixtureOptions',
  'PackedRows',
  'Pairs',
  'PrefixLmTask',
  'PythonStdlibSource',
  'Question',
  'Rows',
  'Selection',
  'Seq2SeqTask',
  'SourceOptions',
  'SpanCorruptionTask',
  'TaskOptions',
  'Texts',
  'TfdsSource',
  'TokenizerOptions',
  'TrainedOptions',
  'Ul2Task',
  'batch_dataset',
  'eval_batches',
  'instructions',
  'load',
  'read_pairs',
  'spread',
  'train_batches',
]
