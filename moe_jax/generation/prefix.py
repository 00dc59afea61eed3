"""What decoding begins with: prompts of different length as arrays.

A decoder's rows are padded in front, so that all of them append at the same
slot; an encoder's behind. Lengths are rounded up to a few, so that not every
prompt compiles a program of its own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from moe_jax.models import Model
from moe_jax.shapes import Bool, Int32, Leaf

_LEAST_LENGTH = 8
Ids = Sequence[int] | np.ndarray


class Prefix(NamedTuple):
  """The tokens before the first that the model chooses.

  Attributes:
    tokens: int32 [B, P], the tokens that the decoder reads.
    mask: bool [B, P], False at padding, which is in front; the last is True.
    encoder_tokens: int32 [B, S], the tokens that the encoder reads; None in a
      decoder-only model.
    encoder_mask: bool [B, S], False at padding, which is behind.
  """

  tokens: Leaf
  mask: Leaf
  encoder_tokens: Leaf = None
  encoder_mask: Leaf = None


def make_prefix(
  model: Model,
  prompt: Sequence[Ids] | Ids,
  *,
  start_id: int | None,
  forced_ids: Sequence[int],
  num_tokens: int,
) -> Prefix:
  """Checks prompts and pads them.

  Args:
    model: A prepared model.
    prompt: Token ids, one sequence for each row, or those of a single row.
    start_id: The first id that an encoder-decoder's decoder is given.
    forced_ids: The ids that every row emits first, whatever the model says.
    num_tokens: N, the number of new tokens, `forced_ids` among them.

  Raises:
    ValueError: There is no prompt, one is empty or has an id that the model
      does not know; the start id is missing or of no use; N leaves nothing to
      choose; or learned positions do not go that far.
  """
  rows = _rows(prompt)
  forced = [int(i) for i in forced_ids]
  if num_tokens <= len(forced):
    raise ValueError(
      f'num_tokens={num_tokens} leaves none to choose after '
      f'{len(forced)} forced_ids'
    )
  given = [*rows, np.array([*forced, start_id or 0])]
  _check_ids(given, model.vocab_size)
  grows = num_tokens - len(forced)
  if not model.has_encoder:
    if start_id is not None:
      raise ValueError(
        f'start_id={start_id} for a decoder-only model, which begins with its '
        'prompt'
      )
    rows = [np.append(row, forced) for row in rows]
    _check_length(model, 'prompt', max(map(len, rows)) + grows - 1)
    # The last token is a step of its own.
    length = _length(model, max(map(len, rows)) - 1) + 1
    return Prefix(*_padded(rows, length, front=True))
  if start_id is None:
    raise ValueError('an encoder-decoder needs a start_id')
  _check_length(model, 'prompt', max(map(len, rows)))
  _check_length(model, 'output', 1 + len(forced) + grows - 1)
  begin = [np.array([start_id, *forced])] * len(rows)
  length = _length(model, max(map(len, rows)))
  return Prefix(
    *_padded(begin, 1 + len(forced), front=True),
    *_padded(rows, length, front=False),
  )


def num_rows(prompt: Sequence[Ids] | Ids) -> int:
  """The number of rows of a prompt.

  Raises:
    ValueError: It has none.
  """
  if not len(prompt):
    raise ValueError('prompt has no rows; give at least one')
  return len(prompt) if np.ndim(prompt[0]) else 1


def _rows(prompt) -> list[np.ndarray]:
  num_rows(prompt)
  if np.ndim(prompt[0]) == 0:
    prompt = [prompt]
  rows = [np.asarray(row, np.int64) for row in prompt]
  for i, row in enumerate(rows):
    if row.ndim != 1 or not len(row):
      raise ValueError(
        f'prompt {i} of {len(rows)} has shape {row.shape}; each needs at least '
        'one token, in one dimension'
      )
  return rows


def _check_ids(rows: Sequence[np.ndarray], vocab_size: int) -> None:
  for row in rows:
    wrong = row[(row < 0) | (row >= vocab_size)]
    if wrong.size:
      raise ValueError(f'token {wrong[0]} not in [0, vocab_size={vocab_size})')


def _check_length(model: Model, what: str, needed: int) -> None:
  most = model.longest
  if most is not None and needed > most:
    raise ValueError(
      f'{what} of {needed} positions (new tokens included) > max_len={most} of '
      'the learned positions'
    )


def _length(model: Model, needed: int) -> int:
  """A length that is rounded up where nothing but time depends on it."""
  if model.capacity_binds:
    return needed
  most = model.longest
  rounded = round_up(needed)
  return rounded if most is None else max(min(rounded, most), needed)


def round_up(length: int) -> int:
  """The next of few lengths: steps of a quarter of a power of two, or 8."""
  step = max(_LEAST_LENGTH, 2 ** max((length - 1).bit_length() - 3, 0))
  return -(-length // step) * step


def _padded(
  rows: Sequence[np.ndarray], length: int, *, front: bool
) -> tuple[Int32[np.ndarray, 'B P'], Bool[np.ndarray, 'B P']]:
  tokens = np.zeros((len(rows), length), np.int32)
  mask = np.zeros(tokens.shape, bool)
  for i, row in enumerate(rows):
    place = slice(length - len(row), None) if front else slice(len(row))
    tokens[i, place], mask[i, place] = row, True
  return tokens, mask
