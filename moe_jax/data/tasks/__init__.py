"""What is learned of texts, pairs and examples: the rows of each task.

To add a task, write a file with its `TaskOptions` and list them here.
"""

from moe_jax.data.tasks.classes import ClassesTask, ClassRows
from moe_jax.data.tasks.contract import (
  Dataset,
  PairTask,
  TaskOptions,
  TextTask,
)
from moe_jax.data.tasks.denoising import DenoisedRows
from moe_jax.data.tasks.lm import LmTask
from moe_jax.data.tasks.prefix_lm import PrefixLM, PrefixLmTask
from moe_jax.data.tasks.seq2seq import PairRows, Seq2SeqTask
from moe_jax.data.tasks.span_corruption import (
  SpanCorruption,
  SpanCorruptionTask,
)
from moe_jax.data.tasks.ul2 import DENOISERS, Ul2Task
from moe_jax.options import Kinds

TASKS = Kinds(
  'task',
  TaskOptions,
  {
    'lm': LmTask,
    'prefix_lm': PrefixLmTask,
    'span_corruption': SpanCorruptionTask,
    'ul2': Ul2Task,
    'seq2seq': Seq2SeqTask,
    'classes': ClassesTask,
  },
)

__all__ = [
  'DENOISERS',
  'TASKS',
  'ClassRows',
  'ClassesTask',
  'Dataset',
  'DenoisedRows',
  'LmTask',
  'PairRows',
  'PairTask',
  'PrefixLM',
  'PrefixLmTask',
  'Seq2SeqTask',
  'SpanCorruption',
  'SpanCorruptionTask',
  'TaskOptions',
  'TextTask',
  'Ul2Task',
]
