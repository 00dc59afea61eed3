"""Measures a model as it is served: its size, its work and its speed."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from experiments.benchmarks import timing
from moe_jax import data, generation, run_config
from moe_jax.analysis import counts
from moe_jax.compression.whole_run import bytes_in_memory, bytes_on_disk
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import InputError
from moe_jax.generation import trained_run
from moe_jax.models import Model, code_trees
from moe_jax.models.trees import init_params
from moe_jax.shapes import Int

# Number of prompts that are read at once, of tokens that are generated for each
# of them, and the seconds that timing may take.
PROMPTS, TOKENS, SECONDS = 16, 48, 5.0


def measure(
  folder: str | os.PathLike[str], twin: ml_collections.ConfigDict
) -> dict[str, float]:
  """Measures the model of a run of an encoder-decoder on a mixture.

  The prompts are as many of each of its tasks, one task after another.

  Args:
    folder: The run's folder.
    twin: The config of the model whose speed is the unit. Its parameters are
      drawn anew, as speed does not depend on what a dense model has learned.

  Returns:
    Numbers by name: 'disk' and 'memory', the bytes of all parameters as they
    are stored; 'flops', those of the forward pass for a token, averaged over
    the tokens that the encoder reads and those that are generated;
    'tokens_per_second', of all prompts together; 'speed', that as a ratio to
    the twin's, the median of interleaved rounds.

  Raises:
    ValueError: The prompts cannot be divided over the tasks, or a task has too
      few rows of validation for its own.
  """
  run = trained_run.load(folder)
  plain = code_trees.with_formats(run.options).build()
  cost = counts.count(plain, run.data.seq_len, run.data.target_len)
  options = run_config.read(twin).filled(run.tokenizer.vocab_size)
  dense = options.build()
  params = init_params(dense, jax.random.key(0))
  datasets = data.load(run.data).parts
  prompts_per_task, remainder = divmod(PROMPTS, len(datasets))
  if remainder:
    raise InputError(
      f'{PROMPTS} prompts cannot be divided over {len(datasets)} tasks'
    )
  prompts, tasks = [], []
  for number, name in enumerate(run.data.tasks):
    prompts += prompts_of(datasets[name].splits['validation'], prompts_per_task)
    tasks += [number] * prompts_per_task
  times = timing.interleave(
    {
      'twin': generating(dense, {'params': params}, run.tokenizer, prompts),
      'own': generating(
        run.model,
        run.variables,
        run.tokenizer,
        prompts,
        tasks if run.options.routes_by_task else None,
      ),
    },
    seconds=SECONDS,
  )
  seconds = timing.Spread.of(times['own']).median
  return {
    'disk': bytes_on_disk(folder),
    'memory': bytes_in_memory(run.variables),
    'flops': cost.forward_flops,
    'tokens_per_second': len(prompts) * TOKENS / seconds,
    'speed': timing.ratio(times['twin'], times['own']).median,
  }


def prompts_of(
  rows: data.Rows, count: int = PROMPTS
) -> list[Int[np.ndarray, ' N']]:
  """The first inputs of that many rows of an encoder-decoder, in token ids.

  Raises:
    ValueError: There are fewer rows.
  """
  if len(rows) < count:
    raise InputError(
      f'{count} prompts are needed to measure speed, and validation has '
      f'{len(rows)} rows'
    )
  batch = rows.take(np.arange(count))
  return [
    tokens[ids == 1]
    for tokens, ids in zip(
      batch['encoder_tokens'], batch['encoder_segment_ids']
    )
  ]


def generating(
  model: Model,
  variables: dict[str, Any],
  tokenizer: Tokenizer,
  prompts: Sequence[Int[np.ndarray, ' N']],
  tasks: Sequence[int] | None = None,
) -> Callable[[], Any]:
  """A function that generates for prompts, as many tokens for every model.

  Args:
    model: The model.
    variables: Its variables.
    tokenizer: Its tokenizer.
    prompts: The token ids of each prompt.
    tasks: The number of each prompt's task, for a model that routes by task.
  """
  model, variables = generation.prepare(
    model, variables, batch_size=len(prompts)
  )
  # Without stops all models take the same number of steps.
  start = trained_run.special_ids(model, tokenizer)['start_id']
  return lambda: generation.generate(
    model,
    variables,
    prompts,
    num_tokens=TOKENS,
    start_id=start,
    task_ids=tasks,
  )
