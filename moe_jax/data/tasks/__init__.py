"""Tasks: rows that are learned from texts or pairs.

To add a task, write a file with its `TaskOptions` and list them here.
"""

from moe_jax.config import Kinds
from moe_jax.data.tasks.contract import TaskOptions
from moe_jax.data.tasks.seq2seq import Seq2SeqTask
from moe_jax.data.tasks.texts import (
  LmTask,
  PrefixLmTask,
  SpanCorruptionTask,
  Ul2Task,
)

TASKS = Kinds(
  'task',
  TaskOptions,
  {
    'lm': LmTask,
    'prefix_lm': PrefixLmTask,
    'span_corruption': SpanCorruptionTask,
    'ul2': Ul2Task,
    'seq2seq': Seq2SeqTask,
  },
)
