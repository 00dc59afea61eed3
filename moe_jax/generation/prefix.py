"""Prompts of different lengths as arrays, with which decoding begins.

Rows of a decoder are padded at the front, so that all append at the same slot;
those of an encoder at the end. Lengths are rounded up to a few values, so that
not every prompt compiles a program of its own.
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
    mask: bool [B, P], False at padding, which is at the front; the last is
      True.
    encoder_tokens: int32 [B, S], the tokens that the encoder reads; None for a
      decoder-only model.
    encoder_mask: bool [B, S], False at padding, which is at the end.
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
    start_id: The first id of the input of an encoder-decoder's decoder.
    forced_ids: The ids that every row emits first.
    num_tokens: N, the number of new tokens, including `forced_ids`.

  Raises:
    ValueError: There is no prompt, one is empty or has an unknown id; the start
      id is missing or has no use; N leaves nothing to choose; or there are not
      enough learned positions.
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
    ValueError: The prompt has no rows.
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
  """The length of padded rows: rounded up, unless padding changes results."""
  if model.capacity_binds:
    return needed
  most = model.longest
  rounded = round_up(needed)
  return rounded if most is None else max(min(rounded, most), needed)


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
    place = slice(length - len(row), None) if front else slice(len(row))
    tokens[i, place], mask[i, place] = row, True
  return tokens, mask
