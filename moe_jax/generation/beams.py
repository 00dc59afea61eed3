"""Beam search: the most likely sequences, by a search of limited width.

Sequences, scores and the end of the search are those of transformers'
`generate(num_beams=..., early_stopping=False)`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.devices import fetch
from moe_jax.errors import InputError
from moe_jax.generation.prefix import (
  Ends,
  Ids,
  Variables,
  check_number,
  check_whole,
  start,
)
from moe_jax.models import Cache, Model
from moe_jax.shapes import Array, Bool, Float32, Int, Int32, Leaf


class Beams(NamedTuple):
  """For each row the R best sequences that have ended, the best first.

  Attributes:
    tokens: int32 [B, R, N], the new tokens, at most N; padding from the
      sequence's length on.
    lengths: int32 [B, R], the number of new tokens, including the stop token; 0
      where fewer than R sequences were found.
    scores: float32 [B, R], log probability / length^length_penalty; -inf where
      there is no sequence.
  """

  tokens: Int32[Leaf, 'B R N']
  lengths: Int32[Leaf, 'B R']
  scores: Float32[Leaf, 'B R']


def beam_search(
  model: Model,
  variables: Variables,
  prompt: Sequence[Ids] | Ids,
  *,
  num_beams: int,
  num_return: int = 1,
  length_penalty: float = 1.0,
  **ends: Unpack[Ends],
) -> Beams:
  """The best continuations that a search with `num_beams` beams finds.

  A sequence's score is its log probability / length^length_penalty; forced
  tokens add to the length and not to the log probability. A sequence that ends
  is a result if it is among the `num_beams` best of its step. The search of a
  row ends at N tokens, or when it has `num_beams` results and the best beam,
  scored at its present length, is worse than all results; with a positive
  penalty this beam might still have become better.

  Args:
    model: The model as trained or imported, or as `prepare` returns it.
    variables: The variables of the model, its parameters under 'params'.
    prompt: Token ids, one sequence for each row, or the ids of a single row.
    num_beams: The number of beams: sequences that are followed for each row, at
      least 1.
    num_return: R, the number of sequences returned for each row, at most
      `num_beams`.
    length_penalty: The exponent of a sequence's length; above 0 favours long
      sequences, below 0 short sequences.
    **ends: `num_tokens`, `start_id`, `forced_ids`, `stop_ids`, `pad_id` and
      `task_ids`; see `Ends`.

  Raises:
    ValueError: A number is out of range, a logit is not finite, or `generate`
      would refuse an argument, too.
  """
  check_whole('num_beams', num_beams, 1)
  given = f'num_beams={num_beams} and num_return'
  check_whole(given, num_return, 1, num_beams)  # more are not followed
  check_number('length_penalty', length_penalty)
  begun = start(model, variables, prompt, num_beams, **ends)
  search, finite = _search(
    begun.model,
    begun.variables,
    first_search(begun.last, begun.tokens, begun.num_forced, num_beams),
    begun.cache,
    stop_ids=begun.stop_ids,
    length_penalty=jnp.float32(length_penalty),
  )
  (tokens, lengths, scores), step, finite = fetch(
    (search.ended, search.step, finite)
  )
  check_finite(finite, step)
  is_padding = np.arange(tokens.shape[-1]) >= lengths[..., None]
  tokens = np.where(is_padding, np.int32(begun.pad_id), tokens)
  return Beams(*(leaf[:, :num_return] for leaf in (tokens, lengths, scores)))


class Search(NamedTuple):
  """The state of a search between two steps, apart from the cache.

  A beam is a sequence that has not ended; W are followed for each of B rows.

  Attributes:
    step: int32 [], the number of new tokens of a beam.
    tokens: int32 [B, W, N], the new tokens of the beams, the best first.
    scores: float32 [B, W], the log probabilities of the beams; -inf where there
      is no sequence.
    last: int32 [B, W], the last token of each beam, which is not in the cache.
    ended: The best W sequences so far that have ended.
    open: bool [B], whether a row's search goes on.
  """

  step: Int[Leaf, '']
  tokens: Int32[Leaf, 'B W N']
  scores: Float32[Leaf, 'B W']
  last: Int32[Leaf, 'B W']
  ended: Beams
  open: Bool[Leaf, ' B']


def first_search(last, tokens, num_forced: int, width: int) -> Search:
  """The search before its first step: beam 0 has score 0, all others -inf.

  Args:
    last: int32 [B], the last token of each row before the search.
    tokens: int32 [B, N], new tokens of each row, the forced ones first.
    num_forced: The number of forced tokens.
    width: W, the number of beams.
  """
  B, W = len(last), width
  tokens = np.repeat(tokens[:, None], W, axis=1)
  scores = np.full((B, W), -np.inf, np.float32)
  first_scores = np.where(np.arange(W)[None] == 0, np.float32(0), scores)
  beams = tokens, first_scores, np.repeat(last[:, None], W, axis=1)
  ended = Beams(np.zeros_like(tokens), np.zeros((B, W), np.int32), scores)
  return Search(np.int32(num_forced), *beams, ended, np.ones(B, bool))


@functools.partial(jax.jit, static_argnames='model')
def _search(
  model: Model,
  variables: Variables,
  search: Search,
  cache: Cache,
  *,
  stop_ids: Int32[Array, ' n'],
  length_penalty: Float32[Array, ''],
) -> tuple[Search, Bool[Array, '']]:
  B, W, N = search.tokens.shape
  first_row = W * jnp.arange(B, dtype=jnp.int32)[:, None]  # [B, 1]
  cache = cache.take(jnp.repeat(jnp.arange(B, dtype=jnp.int32), W))

  def goes_on(carry):
    search, _, finite = carry
    return (search.step < N) & search.open.any() & finite

  def step(carry):
    search, cache, _ = carry
    last = search.last.reshape(B * W, 1)
    logits, cache = model.apply(
      variables, last, jnp.ones_like(last, bool), cache, method='decode'
    )
    row_finite = jnp.isfinite(logits).reshape(B, -1).all(-1)
    finite = (row_finite | ~search.open).all()
    log_probs = jax.nn.log_softmax(logits).reshape(B, W, -1)
    search, beam = advance(search, log_probs, stop_ids, length_penalty)
    # Beams of a prompt share the encoder's output, which need not be moved.
    any_cache: Any = cache
    memory = any_cache.memory
    cache = any_cache.replace(memory=None).take((first_row + beam).reshape(-1))
    return search, cache.replace(memory=memory), finite

  initial = search, cache, jnp.bool_(True)
  search, _, finite = jax.lax.while_loop(goes_on, step, initial)
  return search, finite


def check_finite(finite: np.ndarray, number: np.ndarray | int) -> None:
  """Raises ValueError unless the logits of a new token were finite.

  Args:
    finite: bool [], whether the logits were finite.
    number: The number of the token, from 1.
  """
  if not finite:
    raise InputError(
      f'logits of new token {number} are not finite, so no token can be chosen:'
      ' look for parameters that are not finite, or too large for their dtype'
    )


def advance(
  search: Search,
  log_probs: Float32[Array, 'B W V'],
  stop_ids: Int32[Array, ' n'],
  length_penalty: Float32[Array, ''],
) -> tuple[Search, Int32[Array, 'B W']]:
  """Takes one step of the search.

  The candidates are the best continuations of all beams by one token, as many
  as it takes for at least W of them not to end their sequence.

  Args:
    search: The state before the step.
    log_probs: The log probability of each token after each beam.
    stop_ids: The ids each of which ends a sequence.
    length_penalty: The exponent of the length by which the log probability of a
      sequence that has ended is divided.

  Returns:
    The next state, and the index of the beam that each new beam continues.
  """
  B, W, V = log_probs.shape
  N = search.tokens.shape[2]
  count = min(max(2, 1 + stop_ids.shape[0]) * W, W * V)
  scores = (search.scores[..., None] + log_probs).reshape(B, W * V)
  scores, index = jax.lax.top_k(scores, count)  # [B, C]
  beam, token = index // V, index % V
  length = search.step + 1
  tokens = _pick(search.tokens, beam)
  place = (0, 0, search.step)
  tokens = jax.lax.dynamic_update_slice(tokens, token[..., None], place)
  ends = jnp.isin(token, stop_ids) | (length == N)
  among_best = jnp.arange(count, dtype=jnp.int32)[None] < W
  is_result = ends & among_best & search.open[:, None]
  penalty = length.astype(jnp.float32) ** length_penalty
  lengths = jnp.full((B, count), length, jnp.int32)
  results = jnp.where(is_result, scores / penalty, -jnp.inf)
  pairs = zip(search.ended, (tokens, lengths, results))
  merged = Beams(*(jnp.concatenate(pair, axis=1) for pair in pairs))
  best, chosen = jax.lax.top_k(merged.scores, W)
  lengths = jnp.where(jnp.isneginf(best), 0, _pick(merged.lengths, chosen))
  ended = Beams(_pick(merged.tokens, chosen), lengths, best)
  scores, chosen = jax.lax.top_k(jnp.where(ends, -jnp.inf, scores), W)
  beams = _pick(tokens, chosen), scores, _pick(token, chosen)
  # With fewer than W results the worst score is -inf: any beam is better.
  is_open = search.open & (scores[:, 0] / penalty > ended.scores[:, -1])
  return Search(length, *beams, ended, is_open), _pick(beam, chosen)


def _pick(leaf: Array, chosen: Int32[Array, 'B W']) -> Array:
  """The W sequences of each row, out of C, whose indices `chosen` has.

  `leaf` is [B, C] or, with the N tokens of each sequence, [B, C, N].
  """
  index = chosen if leaf.ndim == 2 else chosen[..., None]
  return jnp.take_along_axis(leaf, index, axis=1)
