"""Comparison of a checkpoint's outputs with those of transformers.

Expected outputs are read from a file, so that PyTorch is needed only where the
file is made, and JAX only where it is checked.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from moe_jax.data.plain_files import first_line, read_json
from moe_jax.errors import InputError
from moe_jax.interop import loading
from moe_jax.interop.tensor_files import ProblemsError
from moe_jax.models import Model
from moe_jax.models.decoding import check_change

BOUND = 1e-4  # largest difference of float32 logits that counts as equal
# The options of generation that change greedy tokens, each with the values with
# which it changes nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
  'num_beams': (None, 1),
  'repetition_penalty': (None, 1.0),
  'encoder_repetition_penalty': (None, 1.0),
  'no_repeat_ngram_size': (None, 0),
  'encoder_no_repeat_ngram_size': (None, 0),
  'bad_words_ids': (None,),
  'sequence_bias': (None,),
  'min_length': (None, 0),
  'min_new_tokens': (None, 0),
  'suppress_tokens': (None, []),
  'begin_suppress_tokens': (None, []),
  'forced_eos_token_id': (None,),
  'exponential_decay_length_penalty': (None,),
  'guidance_scale': (None, 1.0),
  'penalty_alpha': (None,),
  'dola_layers': (None,),
  'stop_strings': (None,),
  'watermarking_config': (None,),
}


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Result of a comparison with transformers.

  Attributes:
    largest_difference: The largest difference of a logit outside of padding.
    num_positions: The number of positions that were compared.
    num_equal_tokens: The number of greedy tokens, of all rows, at positions
      before that of the first difference.
    first_difference: The first greedy token that differs, (row, position, ours,
      theirs); None if all agree.
  """

  largest_difference: float
  num_positions: int
  num_equal_tokens: int
  first_difference: tuple[int, int, int, int] | None

  @property
  def good(self) -> bool:
    """Whether logits are within `BOUND` and all greedy tokens agree."""
    return self.largest_difference <= BOUND and self.first_difference is None

  def describe(self) -> str:
    """Two lines that say whether the logits and the greedy tokens agree."""
    tokens = f'greedy tokens: all {self.num_equal_tokens} agree'
    if self.first_difference:
      row, position, ours, theirs = self.first_difference
      tokens = (
        f'greedy tokens: row {row} differs at place {position}: {ours} here, '
        f'{theirs} expected, after {self.num_equal_tokens} that agree'
      )
    sign = '<=' if self.largest_difference <= BOUND else '>'
    return (
      f'largest logit difference over {self.num_positions} real positions: '
      f'{self.largest_difference:.2e} {sign} {BOUND:.0e}\n{tokens}'
    )


def verify(
  source: str | os.PathLike[str],
  expected: str | os.PathLike[str],
  *,
  revision: str = '',
) -> Verdict:
  """Compares a checkpoint's outputs in float32 with the outputs in a file.

  Args:
    source: A folder, or the id of a hub repository.
    expected: An npz file of B rows with `input_ids` and `attention_mask` of S
      tokens, [B, S], `logits` [B, T, V] and `greedy` [B, N], the N ids of
      greedy generation; for an encoder-decoder also `decoder_input_ids` [B, T]
      and, if these have padding, `decoder_attention_mask`. Of a decoder (T = S)
      `greedy` is the first row without its padding, and its continuation.
    revision: A branch, tag or commit of a repository; '' is its main branch.

  Raises:
    ValueError: An array is missing or of another shape; the checkpoint's
      generation config has options that change greedy tokens; or `greedy` is so
      long that the cached keys of its prompt would have to rotate differently
      (LongRoPE).
  """
  arrays = read_npz(pathlib.Path(expected).expanduser())
  checkpoint = loading.fetch(source, dtype='float32', revision=revision)
  path = checkpoint.folder / 'generation_config.json'
  generation = read_json(path) or checkpoint.config
  _check_generation(checkpoint.folder, generation)
  model = checkpoint.options.build()
  pad_id = checkpoint.architecture.unnumbered_id(checkpoint.options)
  has_encoder = model.has_encoder
  _check_arrays(arrays, has_encoder, model.vocab_size)
  prompt_length = 1 if has_encoder else int(arrays['attention_mask'][0].sum())
  check_change(model, [(prompt_length, arrays['greedy'].shape[1] - 1)])
  # A decoder-only model continues the first row alone.
  rows = None if has_encoder else 1
  greedy = arrays['greedy'][:rows].astype(np.int32)
  prompt = (
    _start(greedy, generation) if has_encoder else _prompt(greedy, arrays)
  )
  variables = loading.load_variables(checkpoint)
  our_logits, is_real = logits(model, variables, arrays, pad_id)
  error = np.abs(our_logits - arrays['logits'])[is_real]
  if has_encoder:
    ids = arrays['input_ids'].astype(np.int32)
    cache = _apply(
      model,
      variables,
      ids,
      arrays['attention_mask'].astype(bool),
      encoder_positions=_positions(ids, pad_id).astype(np.int32),
      max_len=greedy.shape[1],
      method='encode',
    )
  else:
    cache = model.make_cache(1, greedy.shape[1])
  tokens = _greedy(model, variables, cache, prompt, greedy.shape[1], generation)
  first_difference, count = _compare(tokens, greedy, prompt.shape[1])
  # A difference that is not finite counts as infinite.
  largest = float(error.max()) if np.isfinite(error).all() else float('inf')
  return Verdict(largest, int(is_real.sum()), count, first_difference)


def read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of a numpy `.npz` file; objects are never unpickled.

  Raises:
    ValueError: The file is missing, damaged or no npz file, or an array holds
      objects.
  """
  if not path.is_file():
    raise InputError(f'{path} is no npz file of arrays: it is no file')
  name = ''
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = {}
      for name in file.files:
        arrays[name] = file[name]
      return arrays
  except (MemoryError, PermissionError):
    raise
  except Exception as error:  # zip, zlib and numpy raise errors of any class
    part = f'its array {name!r}' if name else 'it'
    if 'pickle' in str(error):  # numpy's own text advises to unpickle it
      reason = f'{part} holds objects, or no array; objects are never unpickled'
    elif isinstance(error, AttributeError | TypeError):  # for one bare array
      reason = 'it holds a single array; numpy.savez writes several by name'
    else:
      reason = f'{part} is damaged: {type(error).__name__}: {first_line(error)}'
    raise InputError(f'{path} is no npz file of arrays: {reason}') from None


@functools.partial(jax.jit, static_argnames=('model', 'method', 'max_len'))
def _apply(model: Model, variables, *args, **inputs):
  """`model.apply`, compiled; equal models share one compiled function."""
  return model.apply(variables, *args, **inputs)


def _check_generation(folder, generation) -> None:
  problems = [
    f'{name}={generation[name]!r}'
    for name, neutral in _NEUTRAL.items()
    if generation.get(name) not in neutral
  ]
  if problems:
    raise ProblemsError(
      f"{folder}: 'greedy' of transformers depends on generation options that "
      'are not reproduced here',
      problems,
    )


def _check_arrays(arrays, has_encoder: bool, vocab_size: int) -> None:
  names = ['input_ids', 'attention_mask', 'logits', 'greedy']
  names += ['decoder_input_ids'] if has_encoder else []
  missing = [name for name in names if name not in arrays]
  if missing:
    raise InputError(f'expected arrays {missing} are missing; need {names}')
  decoder_ids = arrays['decoder_input_ids' if has_encoder else 'input_ids']
  shapes = {
    'attention_mask': arrays['input_ids'].shape,
    'logits': (*decoder_ids.shape, vocab_size),
    'decoder_attention_mask': decoder_ids.shape,
  }
  shape_errors = [
    f'{name} is {list(arrays[name].shape)}, not {list(shape)}'
    for name, shape in shapes.items()
    if name in arrays and arrays[name].shape != shape
  ]
  if shape_errors:
    raise ProblemsError('expected arrays do not fit', shape_errors)
  if arrays['greedy'].ndim == 1:
    arrays['greedy'] = arrays['greedy'][None]


def _positions(tokens: np.ndarray, pad_id: int | None) -> np.ndarray:
  """The positions [B, T] that transformers gives to tokens.

  Args:
    tokens: Token ids [B, T].
    pad_id: The id of tokens without a position of their own; None if all tokens
      have one.
  """
  if pad_id is None:
    return np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  return np.maximum(np.cumsum(tokens != pad_id, axis=1) - 1, 0)


def logits(
  model: Model, variables, arrays, pad_id: int | None
) -> tuple[np.ndarray, np.ndarray]:
  """Our logits, and a mask of the positions without padding.

  Args:
    model: The model.
    variables: The variables of the model.
    arrays: The inputs, by the names of the file that `verify` reads.
    pad_id: The id of tokens without a position of their own; None if all
      tokens have one.

  Returns:
    The logits, float32 [B, T, V], and the mask, bool [B, T].
  """

  def stream_inputs(prefix, tokens, mask):
    values = dict(
      tokens=tokens, segment_ids=mask, positions=_positions(tokens, pad_id)
    )
    return {prefix + name: x.astype(np.int32) for name, x in values.items()}

  ids, mask = arrays['input_ids'], arrays['attention_mask'].astype(bool)
  if not model.has_encoder:
    model_inputs = stream_inputs('', ids, mask)
  else:
    model_inputs = stream_inputs('encoder_', ids, mask)
    ids = arrays['decoder_input_ids']
    mask = arrays.get('decoder_attention_mask', np.ones(ids.shape)).astype(bool)
    model_inputs |= stream_inputs('', ids, mask)
  our_logits, _ = _apply(model, variables, **model_inputs)
  return np.asarray(our_logits), mask


def _prompt(greedy, arrays) -> np.ndarray:
  """The first input unpadded, [1, n]; ValueError unless it begins `greedy`."""
  prompt = arrays['input_ids'][0][arrays['attention_mask'][0].astype(bool)]
  first_ids = greedy[0, : len(prompt)]
  if not np.array_equal(first_ids, prompt):
    raise InputError(
      "'greedy' does not begin with the first row's prompt: "
      f'{first_ids} is not {prompt}'
    )
  return greedy[:, : len(prompt)]


def _start(greedy, generation) -> np.ndarray:
  """The first id of each row, [B, 1]; ValueError if it is not the start id."""
  first_ids = greedy[:, :1]
  start_id = generation.get('decoder_start_token_id')
  start_id = generation.get('bos_token_id') if start_id is None else start_id
  if not (first_ids == start_id).all():
    raise InputError(
      f"'greedy' does not begin with the decoder's start id {start_id}: "
      f'{first_ids[:, 0]}'
    )
  return first_ids


def _greedy(model, variables, cache, prompt, length, generation) -> np.ndarray:
  """The prompt and the likeliest tokens after it, int32 [B, length].

  A row that has ended is padded but still routed, as in transformers. `cache`
  is empty, or an encoder-decoder's cache of the encoded inputs; `prompt` has
  ids [B, fewer]; `generation` has the ids that stop, pad or are forced.
  """
  stop_ids = generation.get('eos_token_id')
  stop_ids = [] if stop_ids is None else np.atleast_1d(stop_ids).tolist()
  pad_id = generation.get('pad_token_id')
  pad_id = next(iter(stop_ids), 0) if pad_id is None else pad_id
  new, tokens, open_rows = prompt, prompt, np.ones(len(prompt), bool)
  forced_id = generation.get('forced_bos_token_id')
  while tokens.shape[1] < length:
    mask = np.ones(new.shape, bool)
    logits, cache = _apply(model, variables, new, mask, cache, method='decode')
    token = np.asarray(logits[:, -1].argmax(-1), np.int32)
    if forced_id is not None and tokens.shape[1] == 1:
      token[:] = forced_id
    token = np.where(open_rows, token, pad_id)
    open_rows &= ~np.isin(token, stop_ids)
    new = token[:, None]
    tokens = np.concatenate([tokens, new], axis=1)
  return tokens


def _compare(ours, theirs, start):
  """Compares ids [B, N] from position `start` on, at each position row by row.

  Returns:
    (row, position, id in `ours`, id in `theirs`) of the first difference, None
    if there is none; and the number of ids at the compared positions before it.
  """
  for position in range(start, theirs.shape[1]):
    for row in np.flatnonzero(ours[:, position] != theirs[:, position]):
      pair = int(ours[row, position]), int(theirs[row, position])
      return (int(row), position, *pair), (position - start) * len(theirs)
  return None, (theirs.shape[1] - start) * len(theirs)
