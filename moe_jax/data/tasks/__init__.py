"""Tasks: the rows of tokens that a model learns from texts or pairs of texts.

To add a task, write a file with its `TaskOptions` and list them here.
"""

from moe_jax.config import Kinds
from moe_jax.data.contracts import TaskOptions
from moe_jax.data.tasks import texts
from moe_jax.data.tasks.seq2seq import Seq2SeqTask

TASKS = Kinds(
  'task',
  TaskOptions,
  {
    'lm': texts.LmTask,
    'prefix_lm': texts.PrefixLmTask,
    'span_corruption': texts.SpanCorruptionTask,
    'ul2': texts.Ul2Task,
    'seq2seq': Seq2SeqTask,
  },
)
