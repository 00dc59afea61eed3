"""Comparison of a checkpoint's outputs with those of transformers.

Expected outputs are read from a file, so that making them needs no JAX, and
checking them no PyTorch.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from moe_jax.data.plain_files import read_json, read_npz
from moe_jax.interop import loading
from moe_jax.interop.tensor_files import listed
from moe_jax.models import Model
from moe_jax.models.text_model import check_change

BOUND = 1e-4  # largest difference of float32 logits that counts as equal
# Options of generation that change greedy tokens, with their neutral values.
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
    largest: The largest difference of a logit at a position without padding.
    places: The number of positions that were compared.
    tokens: The number of greedy tokens that agree before the first that
      differs.
    differing: The first greedy token that differs, (row, position, ours,
      theirs); None if all agree.
  """

  largest: float
  places: int
  tokens: int
  differing: tuple[int, int, int, int] | None

  @property
  def good(self) -> bool:
    """Whether logits are within `BOUND` and all greedy tokens agree."""
    return self.largest <= BOUND and self.differing is None

  def describe(self) -> str:
    """Two lines on logits and on tokens."""
    tokens = f'greedy tokens: all {self.tokens} agree'
    if self.differing:
      row, place, ours, theirs = self.differing
      tokens = (
        f'greedy tokens: row {row} differs at place {place}: {ours} here, '
        f'{theirs} expected, after {self.tokens} that agree'
      )
    sign = '<=' if self.largest <= BOUND else '>'
    return (
      f'largest logit difference over {self.places} real positions: '
      f'{self.largest:.2e} {sign} {BOUND:.0e}\n{tokens}'
    )


def verify(
  source: str | os.PathLike[str],
  expected: str | os.PathLike[str],
  *,
  revision: str = '',
) -> Verdict:
  """Runs a checkpoint in float32 on the inputs in a file.

  Args:
    source: A folder, or the id of a hub repository.
    expected: An npz file with `input_ids`, `attention_mask` [B, S], `logits`
      [B, T, V] and `greedy` [B, N]; for an encoder-decoder also
      `decoder_input_ids` [B, T] and, if these have padding,
      `decoder_attention_mask`. A decoder-only model's `greedy` continues the
      first row without its padding.
    revision: A branch, tag or commit of a repository; '' is its main branch.

  Raises:
    ValueError: An array is missing or of another shape; the checkpoint's
      generation config has options that change greedy tokens; or `greedy` has
      a length at which the keys of its prompt would turn otherwise.
  """
  given = read_npz(pathlib.Path(expected).expanduser())
  checkpoint = loading.fetch(source, dtype='float32', revision=revision)
  path = checkpoint.folder / 'generation_config.json'
  generation = read_json(path) or checkpoint.config
  _check_generation(checkpoint.folder, generation)
  model = checkpoint.options.build()
  pad = checkpoint.architecture.unnumbered(checkpoint.options)
  halves = model.has_encoder
  _check_arrays(given, halves, model.vocab_size)
  at_once = 1 if halves else int(given['attention_mask'][0].sum())
  check_change(model, [(at_once, given['greedy'].shape[1] - 1)])
  # A decoder-only model continues the first row alone.
  rows = None if halves else 1
  greedy = given['greedy'][:rows].astype(np.int32)
  prompts = _start(greedy, generation) if halves else _prompt(greedy, given)
  variables = loading.load_variables(checkpoint)
  ours, real = logits(model, variables, given, pad)
  error = np.abs(ours - given['logits'])[real]
  if halves:
    cache = _encoded(model, variables, given, pad)
  else:
    cache = model.make_cache(1, greedy.shape[1])
  ours = _greedy(model, variables, cache, prompts, greedy.shape[1], generation)
  differing, count = _compare(ours, greedy, prompts.shape[1])
  # A difference that is not finite counts as infinite.
  largest = float(error.max()) if np.isfinite(error).all() else float('inf')
  return Verdict(largest, int(real.sum()), count, differing)


@functools.partial(jax.jit, static_argnames=('model', 'method', 'max_len'))
def _apply(model: Model, variables, *args, **inputs):
  """The model's outputs; equal models share one compiled function."""
  return model.apply(variables, *args, **inputs)


def _check_generation(folder, generation) -> None:
  problems = [
    f'{name}={generation[name]!r}'
    for name, neutral in _NEUTRAL.items()
    if generation.get(name) not in neutral
  ]
  if problems:
    raise ValueError(
      listed(
        f"{folder}: 'greedy' of transformers depends on generation options "
        'that are not reproduced here',
        problems,
      )
    )


def _check_arrays(given, halves: bool, vocab_size: int) -> None:
  names = ['input_ids', 'attention_mask', 'logits', 'greedy']
  names += ['decoder_input_ids'] if halves else []
  missing = [name for name in names if name not in given]
  if missing:
    raise ValueError(f'expected arrays {missing} are missing; need {names}')
  read = given['decoder_input_ids' if halves else 'input_ids']
  shapes = {
    'attention_mask': given['input_ids'].shape,
    'logits': (*read.shape, vocab_size),
    'decoder_attention_mask': read.shape,
  }
  wrong = [
    f'{name} is {list(given[name].shape)}, not {list(shape)}'
    for name, shape in shapes.items()
    if name in given and given[name].shape != shape
  ]
  if wrong:
    raise ValueError(listed('expected arrays do not fit', wrong))
  if given['greedy'].ndim == 1:
    given['greedy'] = given['greedy'][None]


def _positions(tokens: np.ndarray, pad: int | None) -> np.ndarray:
  """The positions of tokens in transformers.

  Args:
    tokens: Token ids.
    pad: The id of tokens that have no position of their own, whatever the mask;
      None if there is none.
  """
  if pad is None:
    return np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  return np.maximum(np.cumsum(tokens != pad, axis=1) - 1, 0)


def logits(
  model: Model, variables, given, pad: int | None
) -> tuple[np.ndarray, np.ndarray]:
  """Our logits, and a mask of the positions without padding.

  Args:
    model: The model.
    variables: Its variables.
    given: The inputs that `verify` reads.
    pad: The id of tokens without a position of their own, or None.

  Returns:
    The logits, float32 [B, T, V], and the mask, bool [B, T].
  """

  def inputs(prefix, tokens, mask):
    values = dict(
      tokens=tokens, segment_ids=mask, positions=_positions(tokens, pad)
    )
    return {prefix + name: x.astype(np.int32) for name, x in values.items()}

  ids, mask = given['input_ids'], given['attention_mask'].astype(bool)
  if not model.has_encoder:
    called = inputs('', ids, mask)
  else:
    called = inputs('encoder_', ids, mask)
    ids = given['decoder_input_ids']
    mask = given.get('decoder_attention_mask', np.ones(ids.shape)).astype(bool)
    called |= inputs('', ids, mask)
  ours, _ = _apply(model, variables, **called)
  return np.asarray(ours), mask


def _prompt(greedy, given) -> np.ndarray:
  """The first row without its padding, [1, S]; `greedy` continues it."""
  prompt = given['input_ids'][0][given['attention_mask'][0].astype(bool)]
  begins = greedy[0, : len(prompt)]
  if not np.array_equal(begins, prompt):
    raise ValueError(
      "'greedy' does not begin with the first row's prompt: "
      f'{begins} is not {prompt}'
    )
  return greedy[:, : len(prompt)]


def _start(greedy, generation) -> np.ndarray:
  """The id that begins the decoder's rows, [B, 1]."""
  begins = greedy[:, :1]
  start = generation.get('decoder_start_token_id')
  start = generation.get('bos_token_id') if start is None else start
  if not (begins == start).all():
    raise ValueError(
      f"'greedy' does not begin with the decoder's start id {start}: "
      f'{begins[:, 0]}'
    )
  return begins


def _encoded(model, variables, given, pad: int | None):
  """The cache of an encoder-decoder that has read its inputs."""
  ids = given['input_ids'].astype(np.int32)
  return _apply(
    model,
    variables,
    ids,
    given['attention_mask'].astype(bool),
    encoder_positions=_positions(ids, pad).astype(np.int32),
    max_len=given['greedy'].shape[1],
    method='encode',
  )


def _greedy(model, variables, cache, prompt, length, generation) -> np.ndarray:
  """The prompt and the likeliest tokens after it, [B, length].

  A row that has ended is padded but still routed, as in transformers.
  """
  ends = generation.get('eos_token_id')
  ends = [] if ends is None else np.atleast_1d(ends).tolist()
  pad = generation.get('pad_token_id')
  pad = next(iter(ends), 0) if pad is None else pad
  new, tokens, open_rows = prompt, prompt, np.ones(len(prompt), bool)
  forced = generation.get('forced_bos_token_id')
  while tokens.shape[1] < length:
    mask = np.ones(new.shape, bool)
    logits, cache = _apply(model, variables, new, mask, cache, method='decode')
    best = np.asarray(logits[:, -1].argmax(-1), np.int32)
    if forced is not None and tokens.shape[1] == 1:
      best[:] = forced
    best = np.where(open_rows, best, pad)
    open_rows &= ~np.isin(best, ends)
    new = best[:, None]
    tokens = np.concatenate([tokens, new], axis=1)
  return tokens


def _compare(ours, theirs, start):
  """The first token that differs, and the number of tokens before it.

  Tokens are in the order of positions, and then of rows.
  """
  for place in range(start, theirs.shape[1]):
    for row in np.flatnonzero(ours[:, place] != theirs[:, place]):
      pair = int(ours[row, place]), int(theirs[row, place])
      return (int(row), place, *pair), (place - start) * len(theirs)
  return None, (theirs.shape[1] - start) * len(theirs)
