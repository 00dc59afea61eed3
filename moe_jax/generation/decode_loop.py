"""Generation token by token: one compiled loop around a cache."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.devices import fetch
from moe_jax.errors import InputError
from moe_jax.generation.beams import beam_search, check_finite
from moe_jax.generation.prefix import Ends, Ids, Variables, start
from moe_jax.generation.sampling import Sampler, row_keys, step_keys
from moe_jax.models import Cache, Model
from moe_jax.shapes import Array, Bool, Int, Int32, Key

OnToken = Callable[[int, np.ndarray], object]


class Generation(NamedTuple):
  """New tokens, without the prompts.

  Attributes:
    tokens: int32 [B, N], the new tokens of each row; padding from the row's
      length on.
    lengths: int32 [B], the number of new tokens of each row, including the stop
      token that ended it.
  """

  tokens: Int32[np.ndarray, 'B N']
  lengths: Int32[np.ndarray, ' B']

  @property
  def rows(self) -> list[np.ndarray]:
    """The new tokens of each row, without padding."""
    return [row[:n] for row, n in zip(self.tokens, self.lengths)]


def generate(
  model: Model,
  variables: Variables,
  prompt: Sequence[Ids] | Ids,
  *,
  temperature: float = 0.0,
  top_k: int = 0,
  top_p: float = 1.0,
  seed: int | Sequence[int] = 0,
  num_beams: int = 1,
  length_penalty: float = 1.0,
  on_token: OnToken | None = None,
  **ends: Unpack[Ends],
) -> Generation:
  """Continues prompts, or answers prompts with an encoder-decoder.

  A row's tokens and draws do not depend on other rows, with one exception:
  where an imported checkpoint has a capacity that counts the whole batch as a
  group (`moe.group_size=-1`; NLLB, OpenMoE) and can bind, rows compete for
  slots, as in transformers (where also padding after the end of a row takes
  slots). The last token of a decoder's prompt competes only with the last
  tokens of other rows, as generated tokens do. All other models drop nothing,
  even if they dropped tokens in training. Rounding may differ between batches
  of different shapes, and with it the order of two tokens whose probabilities
  agree in seven digits.

  Args:
    model: The model as trained or imported, or as `prepare` returns it.
    variables: The variables of the model, its parameters under 'params'.
    prompt: Token ids, one sequence for each row, of any lengths; or the ids of
      a single row. An encoder-decoder's encoder reads the prompts.
    temperature: The divisor of logits before a token is drawn; 0.0 takes the
      likeliest token.
    top_k: The number of likeliest tokens among which is drawn; 0 is all.
    top_p: The summed probability of the likeliest tokens among which is drawn;
      1.0 is all.
    seed: The seed of the draws. With a sequence of one seed for each row, each
      row has the tokens that it has alone with its own seed.
    num_beams: The number of beams; above 1 the best sequence of `beam_search`
      is returned.
    length_penalty: The exponent of a beam's length, by which its summed log
      probability is divided; only with several beams.
    on_token: Called as on_token(n, tokens [B]) with the new token of index n,
      from 0, of every row, -1 for rows that have ended; a true result ends the
      generation. With None nothing leaves the device before the end.
    **ends: `num_tokens`, `start_id`, `forced_ids`, `stop_ids`, `pad_id` and
      `task_ids`; see `Ends`.

  Raises:
    ValueError: An option is out of range or contradicts another; a prompt is
      empty, too long for learned positions, crosses with its new tokens a
      position at which rotary positions change their angles, or has an unknown
      id; a task is missing; or a logit is not finite.
  """
  sampler = Sampler.make(temperature, top_k, top_p)
  _check_beams(num_beams, length_penalty, temperature, on_token)
  if num_beams != 1:
    beams: Any = dict(num_beams=num_beams, length_penalty=length_penalty)
    found = beam_search(model, variables, prompt, **beams, **ends)
    return Generation(found.tokens[:, 0], found.lengths[:, 0])
  begun = start(model, variables, prompt, **ends)
  (B, N), n = begun.tokens.shape, begun.num_forced
  run = functools.partial(
    _advance,
    begun.model,
    begun.variables,
    keys=row_keys(seed, B),
    stop_ids=begun.stop_ids,
    sampler=sampler,
    pad_id=jnp.int32(begun.pad_id),
  )
  state = State(
    step=jnp.int32(n),
    token=jnp.asarray(begun.last),
    ended=jnp.zeros(B, bool),
    tokens=jnp.asarray(begun.tokens),
    lengths=jnp.full(B, n, jnp.int32),
    finite=jnp.bool_(True),
    cache=begun.cache,
  )
  state = _stream(run, state, on_token) if on_token else run(state, N)
  tokens, lengths, step, finite = fetch(
    (state.tokens, state.lengths, state.step, state.finite)
  )
  check_finite(finite, step)
  return Generation(tokens, lengths)


def _check_beams(
  num_beams: int, length_penalty: float, temperature: float, on_token: Any
) -> None:
  """Raises ValueError where options of beams contradict others."""
  if num_beams != 1 and temperature:
    raise InputError(
      f'num_beams={num_beams} with temperature={temperature}: beams are not '
      'drawn; give one of the two'
    )
  if num_beams != 1 and on_token is not None:
    raise InputError(
      f'num_beams={num_beams} with on_token: no beam is settled before the end'
    )
  if num_beams == 1 and length_penalty != 1.0:
    raise InputError(
      f'length_penalty={length_penalty} with num_beams=1: a length penalty '
      'compares beams; give more than one'
    )


class State(NamedTuple):
  """The state of generation between two steps.

  Attributes:
    step: int32 [], the number of new tokens of a row that has not ended.
    token: int32 [B], the last token of each row, which is not in the cache.
    ended: bool [B], whether a row has ended.
    tokens: int32 [B, N], the new tokens.
    lengths: int32 [B], the number of new tokens of each row.
    finite: bool [], whether all logits of rows that had not ended were finite;
      if not, no further step is taken.
    cache: The cache of all tokens except the last.
  """

  step: Int[Array, '']
  token: Int32[Array, ' B']
  ended: Bool[Array, ' B']
  tokens: Int32[Array, 'B N']
  lengths: Int32[Array, ' B']
  finite: Bool[Array, '']
  cache: Cache


@functools.partial(jax.jit, static_argnames='model', donate_argnames='state')
def _advance(
  model: Model,
  variables: Variables,
  state: State,
  until: int | Array,
  *,
  keys: Key[Array, ' B'],
  stop_ids: Int32[Array, ' n'],
  sampler: Sampler,
  pad_id: Int32[Array, ''],
) -> State:
  """Takes steps until every row has `until` new tokens or has ended.

  It stops early after a step in which a logit was not finite. Each row draws
  with its own key of `keys`; rows that have ended are given `pad_id`.
  """

  def goes_on(state):
    return (state.step < until) & ~state.ended.all() & state.finite

  def step(state):
    last, mask = state.token[:, None], ~state.ended[:, None]
    logits, cache = model.apply(
      variables, last, mask, state.cache, method='decode'
    )
    token = sampler(logits[:, 0], step_keys(keys, state.step))
    token = jnp.where(state.ended, pad_id, token)
    place = (0, state.step)
    return State(
      step=state.step + 1,
      token=token,
      ended=state.ended | jnp.isin(token, stop_ids),
      tokens=jax.lax.dynamic_update_slice(state.tokens, token[:, None], place),
      lengths=state.lengths + ~state.ended,
      finite=(jnp.isfinite(logits[:, 0]).all(-1) | state.ended).all(),
      cache=cast(Cache, cache),
    )

  return jax.lax.while_loop(goes_on, step, state)


def _stream(
  run: Callable[[State, int], State], state: State, on_token: OnToken
) -> State:
  """Generates step by step, and calls `on_token` with the tokens of each step.

  The forced tokens are given to `on_token` first; a true result of it ends the
  generation. `run` takes steps from a state until every row has ended or has
  the given number of new tokens.
  """
  ended = np.zeros(len(state.token), bool)
  for n, forced in enumerate(fetch(state.tokens).T[: int(state.step)]):
    if on_token(n, forced):
      return state._replace(lengths=jnp.full_like(state.lengths, n + 1))
  for n in range(int(state.step), state.tokens.shape[1]):
    state = run(state, n + 1)
    token, now_ended, finite = fetch((state.token, state.ended, state.finite))
    check_finite(finite, n + 1)
    token = np.where(ended, -1, token)
    ended = np.array(now_ended)  # the next step takes the buffer
    if on_token(n, token.astype(np.int32)) or ended.all():
      break
  return state
