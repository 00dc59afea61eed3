"""Choice of the next token from logits: greedy, temperature, top-k, top-p.

Each choice is a pure function of float32 logits and, unless greedy, a key.
"""

from collections.abc import Sequence
from typing import cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import InputError
from moe_jax.generation.prefix import check_number, check_whole
from moe_jax.shapes import Array, Float32, Int, Int32, Key, Leaf, checked


@checked
def keep_top_k(logits: Float32[Array, 'B V'], k: int) -> Float32[Array, 'B V']:
  """Sets logits to -inf, except a row's k largest and ties with the k-th."""
  check_whole('top_k', k, 1)
  k = min(k, logits.shape[-1])
  threshold = jax.lax.top_k(logits, k)[0][:, -1:]
  return jnp.where(logits >= threshold, logits, -jnp.inf)


@checked
def keep_top_p(
  logits: Float32[Array, 'B V'], p: float | Float32[Array, '']
) -> Float32[Array, 'B V']:
  """Sets logits to -inf, except those of the likeliest tokens of each row.

  A token stays if the probabilities of all likelier tokens sum to less than p
  (nucleus sampling, section 3.1 of arXiv:1904.09751). The likeliest token
  always stays, and so do tokens that are as likely as the last token that
  stays.
  """
  sorted_logits = -jnp.sort(-logits, axis=-1)
  probs = jax.nn.softmax(sorted_logits)
  likelier_prob = jnp.cumsum(probs, axis=-1) - probs
  is_kept = (likelier_prob < p).at[:, 0].set(True)
  kept = jnp.where(is_kept, sorted_logits, jnp.inf)
  threshold = kept.min(axis=-1, keepdims=True)
  return jnp.where(logits >= threshold, logits, -jnp.inf)


class Sampler(flax.struct.PyTreeNode):
  """The rule by which the next token is chosen; `make` checks the options.

  Attributes:
    temperature: The number by which logits are divided; None takes the token
      with the largest logit.
    top_p: The p of `keep_top_p`, after the temperature and top-k; None keeps
      all tokens.
    top_k: The k of `keep_top_k`; 0 keeps all tokens.
  """

  temperature: Leaf | None = None
  top_p: Leaf | None = None
  top_k: int = flax.struct.field(pytree_node=False, default=0)

  @classmethod
  def make(
    cls, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0
  ) -> 'Sampler':
    """The sampler of these options; top_k=0 and top_p=1.0 keep all tokens.

    Args:
      temperature: The number by which logits are divided; 0.0 is greedy.
      top_k: The k of `keep_top_k`; 0 keeps all tokens.
      top_p: The p of `keep_top_p`; 1.0 keeps all tokens.

    Raises:
      ValueError: An option is out of range, or would do nothing.
    """
    check_number('temperature', temperature)
    if temperature < 0:
      raise InputError(f'temperature={temperature} is negative')
    check_whole('top_k', top_k, 0)  # 0 keeps all tokens
    check_number('top_p', top_p)
    if not 0 < top_p <= 1:
      raise InputError(f'top_p={top_p} not in (0, 1]')
    if not temperature and (top_k or top_p < 1):
      raise InputError(
        f'top_k={top_k} and top_p={top_p} need a temperature above 0; greedy '
        'takes the likeliest token anyway'
      )
    return cls(temperature or None, top_p if top_p < 1 else None, top_k)

  def __call__(
    self, logits: Float32[Array, 'B V'], keys: Key[Array, ' B']
  ) -> Int32[Array, ' B']:
    """A token for each row, drawn with the row's own key."""
    if self.temperature is None:
      return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / self.temperature
    if self.top_k:
      logits = keep_top_k(logits, self.top_k)
    if self.top_p is not None:
      logits = keep_top_p(logits, self.top_p)
    token = jax.vmap(jax.random.categorical)(keys, logits)
    return token.astype(jnp.int32)


def row_keys(seed: int | Sequence[int], num_rows: int) -> Key[Array, ' B']:
  """A random key for each row, which does not depend on the other rows.

  Args:
    seed: One seed, folded with the index of the row; or a seed for each row,
      folded with 0, so that a row has the key that it has alone.
    num_rows: B, the number of rows.

  Raises:
    ValueError: There are not as many seeds as rows, or a seed is not in
      [0, 2^32).
  """
  is_shared = np.ndim(seed) == 0
  seeds = cast(Sequence[int], [seed] if is_shared else seed)
  for row_seed in seeds:
    check_whole('seed', row_seed, 0, 2**32 - 1)
  if is_shared:
    rows = jnp.arange(num_rows, dtype=jnp.uint32)
    key = jax.random.key(seeds[0])
    return jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
  if len(seeds) != num_rows:
    raise InputError(f'{len(seeds)} seeds for {num_rows} prompts')
  return jnp.stack([jax.random.fold_in(jax.random.key(s), 0) for s in seeds])


def step_keys(keys: Key[Array, ' B'], step: Int[Array, '']) -> Key[Array, ' B']:
  """The random key of each row in one step, made from the row's own key."""
  return jax.vmap(jax.random.fold_in, (0, None))(keys, step)
