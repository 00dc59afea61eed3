"""Sampling by running the whole context again for every token.

One compiled loop, no cache: right for the short sample that ends a training
run, slow for anything longer.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from moe_jax.shapes import Array, Int32, PRNGKey


def sample(
  model: nn.Module,
  params,
  prompt: np.ndarray,
  *,
  num_tokens: int,
  context_len: int,
  temperature: float,
  key: PRNGKey,
) -> Int32[np.ndarray, ' N']:
  """Continues one prompt; returns the new tokens alone.

  Args:
    model: A causal model `(tokens) -> (logits, aux)`. Give it room for every
      token (`capacity_rule='all'`, best with `dispatch='dropless'`), or what
      is drawn depends on the padding behind it.
    params: Its parameters.
    prompt: int [P], P >= 1; its last `context_len` tokens count.
    num_tokens: How many to draw.
    context_len: Tokens the model sees at once.
    temperature: Divides the logits; 0.0 takes the largest.
    key: Of the draws.

  Raises:
    ValueError: The prompt is empty, a length is below 1, or the temperature
      is negative.
  """
  if len(prompt) < 1:
    raise ValueError('prompt is empty; it needs at least one token')
  if num_tokens < 1 or context_len < 1 or temperature < 0:
    raise ValueError(
      f'num_tokens={num_tokens} and context_len={context_len} must be at '
      f'least 1, temperature={temperature} not negative'
    )
  prompt = np.asarray(prompt, np.int32)[-context_len:]
  context = np.zeros((1, context_len), np.int32)
  context[0, : len(prompt)] = prompt
  draw = _compiled(model, num_tokens, temperature)
  return np.asarray(draw(params, context, len(prompt), key))


@functools.lru_cache(maxsize=8)
def _compiled(model, num_tokens, temperature):
  return jax.jit(
    functools.partial(
      _sample_loop,
      model=model,
      num_tokens=num_tokens,
      temperature=temperature,
    )
  )


def _sample_loop(
  params, context: Array, length: Array, key, *, model, num_tokens, temperature
) -> Array:
  T = context.shape[1]

  def one(carry, draw_key):
    context, length = carry
    # Tokens behind `length` are padding, and a causal model does not look.
    segment_ids = (jnp.arange(T)[None] < length).astype(jnp.int32)
    logits, _ = model.apply({'params': params}, context, segment_ids)
    logits = jnp.take(logits[0], length - 1, axis=0)  # [V]
    if temperature:
      token = jax.random.categorical(draw_key, logits / temperature)
    else:
      token = jnp.argmax(logits)
    token = token.astype(jnp.int32)
    full = length == T
    context = jnp.where(full, jnp.roll(context, -1, axis=1), context)
    place = jnp.where(full, T - 1, length)
    context = context.at[0, place].set(token)
    return (context, jnp.minimum(length + 1, T)), token

  keys = jax.random.split(key, num_tokens)
  return jax.lax.scan(one, (context, jnp.asarray(length)), keys)[1]
