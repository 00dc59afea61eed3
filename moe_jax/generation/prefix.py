"""Prompts of different lengths as arrays, with which decoding begins.

Rows of a decoder are padded at the front, so that all append at the same slot;
those of an encoder at the end. Lengths are rounded up to a few values, so that
not every prompt compiles a program of its own.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from moe_jax.errors import InputError
from moe_jax.generation.arguments import Ids, as_ids, check_whole, is_list
from moe_jax.memory_room import check_room
from moe_jax.models import Model
from moe_jax.models.text_model import check_change
from moe_jax.shapes import Bool, Int32, Leaf

_LEAST_LENGTH = 8


class Prefix(NamedTuple):
  """The tokens before the first token that the model chooses.

  Attributes:
    tokens: int32 [B, P], the tokens that the decoder reads.
    mask: bool [B, P], False at padding, which is at the front; the last is
      True.
    encoder_tokens: int32 [B, S], the tokens that the encoder reads; None for a
      decoder-only model.
    encoder_mask: bool [B, S], False at padding, which is at the end.
    task_ids: int32 [B], the task of each row; None for a model that does not
      route by task.
  """

  tokens: Leaf
  mask: Leaf
  encoder_tokens: Leaf = None
  encoder_mask: Leaf = None
  task_ids: Leaf = None


def make_prefix(
  model: Model,
  prompt: Sequence[Ids] | Ids,
  *,
  start_id: int | None,
  forced_ids: Sequence[int],
  num_tokens: int,
  task_ids: Ids | None = None,
) -> Prefix:
  """Checks prompts and pads them.

  Args:
    model: A prepared model.
    prompt: Token ids, one sequence for each row, or those of a single row.
    start_id: The first id of the input of an encoder-decoder's decoder.
    forced_ids: The ids that every row emits first.
    num_tokens: N, the number of new tokens, including `forced_ids`.
    task_ids: The task of each row.

  Raises:
    ValueError: There is no prompt, one is empty or has an unknown id; the start
      id or a task is missing or has no use; N leaves nothing to choose; there
      are not enough learned positions; or a row crosses `Model.changes_at`.
  """
  V = model.vocab_size
  rows = _rows(prompt, V)
  tasks = _tasks(model, task_ids, len(rows))
  check_whole('num_tokens', num_tokens, 0)
  forced = as_ids('forced_ids', forced_ids, V)
  if start_id is not None:
    check_whole('start_id', start_id, 0, V - 1)
  if num_tokens <= len(forced):
    raise InputError(
      f'num_tokens={num_tokens} leaves none to choose after '
      f'{len(forced)} forced_ids'
    )
  steps = num_tokens - len(forced)
  if not model.has_encoder:
    if start_id is not None:
      raise InputError(
        f'start_id={start_id} for a decoder-only model, which begins with its '
        'prompt'
      )
    rows = [np.append(row, forced) for row in rows]
    _check_length(model, 'prompt', max(map(len, rows)) + steps - 1)
    # All but the last token are read at once.
    check_change(model, [(len(row) - 1, len(row) + steps - 1) for row in rows])
    # The last token is a step of its own.
    length = _padded_length(model, max(map(len, rows)) - 1) + 1
    _check_room(model, len(rows), length + steps, num_tokens)
    return Prefix(*_padded(rows, length, front=True), task_ids=tasks)
  if start_id is None:
    raise InputError('an encoder-decoder needs a start_id')
  _check_length(model, 'prompt', max(map(len, rows)))
  _check_length(model, 'output', num_tokens)
  check_change(model, [(0, num_tokens)])
  starts = [np.array([start_id, *forced])] * len(rows)
  length = _encoder_length(model, max(map(len, rows)))
  _check_room(model, len(rows), num_tokens, num_tokens)
  return Prefix(
    *_padded(starts, 1 + len(forced), front=True),
    *_padded(rows, length, front=False),
    task_ids=tasks,
  )


def num_rows(prompt: Sequence[Ids] | Ids) -> int:
  """The number of rows of a prompt.

  Raises:
    ValueError: The prompt has no rows.
  """
  if not is_list(prompt):
    raise InputError(
      f'prompt={prompt!r:.60} must be token ids; a tokenizer makes them of text'
    )
  if not len(prompt):
    raise InputError('prompt has no rows; give at least one')
  return len(prompt) if is_list(prompt[0]) else 1


def _rows(prompt, vocab_size: int) -> list[np.ndarray]:
  num_rows(prompt)
  if not is_list(prompt[0]):
    prompt = [prompt]
  rows = []
  for i, ids in enumerate(prompt):
    row = as_ids(f'prompt {i} of {len(prompt)}', ids, vocab_size)
    if not len(row):
      raise InputError(
        f'prompt {i} of {len(prompt)} has shape (0,); each needs at least one '
        'token, in one dimension'
      )
    rows.append(row)
  return rows


def _tasks(
  model: Model, task_ids: Ids | None, count: int
) -> Int32[np.ndarray, ' B'] | None:
  """The task of each row, int32 [B]; None where the model needs none."""
  if not model.task_sequences:
    if task_ids is not None:
      raise InputError(
        f'task_ids={task_ids!r:.60} for a model without a router by task'
      )
    return None
  if task_ids is None:
    raise InputError(
      f'the model routes by {model.num_tasks} tasks; give task_ids, the task '
      'of each row'
    )
  tasks = as_ids('task_ids', task_ids, model.num_tasks, 'task')
  if len(tasks) != count:
    raise InputError(f'{len(tasks)} task_ids for {count} rows of the prompt')
  return tasks.astype(np.int32)


def _check_room(model: Model, rows: int, slots: int, num_tokens: int) -> None:
  """Raises ValueError where tokens or cache are larger than the memory."""
  sizes = [(f'num_tokens={num_tokens} of {rows} rows', 4 * rows * num_tokens)]
  if not model.has_encoder:
    cache = jax.eval_shape(lambda: model.make_cache(rows, slots))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    sizes.append((f'the cache of {rows} rows of {slots} tokens', size))
  check_room(sizes)


def _check_length(model: Model, noun: str, num_positions: int) -> None:
  longest = model.longest
  if longest is not None and num_positions > longest:
    raise InputError(
      f'{noun} of {num_positions} positions (new tokens included) > '
      f'max_len={longest} of the learned positions'
    )


def _padded_length(model: Model, num_tokens: int) -> int:
  """The length of padded rows: rounded up, unless padding changes results."""
  if model.capacity_binds:
    return num_tokens
  longest = model.longest
  rounded = round_up(num_tokens)
  return rounded if longest is None else max(min(rounded, longest), num_tokens)


def _encoder_length(model: Model, num_tokens: int) -> int:
  """The length of an encoder's padded rows: whole groups of its layers.

  Groups are left where experts choose or mix tokens, and padding in them is
  that of training.
  """
  length, longest = _padded_length(model, num_tokens), model.longest
  sizes = [
    moe.group_size
    for layer, moe in enumerate(model.moes)
    if moe is not None and moe.group_size > 0 and model.sequence_of(layer)
  ]
  group = math.lcm(*sizes)
  whole = -(-length // group) * group
  return whole if longest is None or whole <= longest else length


def round_up(length: int) -> int:
  """Rounds up to a multiple of 8, or to 4 to 8 lengths per power of two."""
  step = max(_LEAST_LENGTH, 2 ** max((length - 1).bit_length() - 3, 0))
  return -(-length // step) * step


def _padded(
  rows: Sequence[np.ndarray], length: int, *, front: bool
) -> tuple[Int32[np.ndarray, 'B P'], Bool[np.ndarray, 'B P']]:
  tokens = np.zeros((len(rows), length), np.int32)
  mask = np.zeros(tokens.shape, bool)
  for i, row in enumerate(rows):
    columns = slice(length - len(row), None) if front else slice(len(row))
    tokens[i, columns], mask[i, columns] = row, True
  return tokens, mask
