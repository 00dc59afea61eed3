"""The matrix products of a greedy generation, and nothing else.

The time of these products is the limit of every implementation that multiplies
by each kernel once a step: at few rows it is the time in which a machine reads
the kernels.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.shapes import Array, Float

Kernels = list[Float[Array, 'M N']]


def read_experts(num_tokens: int, sizes: Mapping[str, int]) -> int:
  """Experts of a layer that tokens with balanced random choices read.

  Args:
    num_tokens: Tokens of a step.
    sizes: Sizes of a Mixtral, named as in its config.

  Returns:
    Their expected number, rounded.
  """
  E, K = sizes['num_local_experts'], sizes['num_experts_per_tok']
  return round(E * (1 - (1 - K / E) ** num_tokens))


def products(
  sizes: Mapping[str, int], batch_size: int, prompt_len: int, num_tokens: int
) -> Callable[[], jax.Array]:
  """The compiled products of reading prompts and of all steps after it.

  Args:
    sizes: Sizes of a Mixtral, named as in its config.
    batch_size: Number of prompts.
    prompt_len: Tokens of a prompt.
    num_tokens: Tokens to generate for each prompt; the first of them needs no
      step of its own.

  Returns:
    A function without arguments, which waits for the last product.
  """
  layers, head = _kernels(sizes)
  served = read_experts(batch_size, sizes)
  share = sizes['num_experts_per_tok'] / sizes['num_local_experts']

  def through_layers(x, served, rows):
    """Multiplies x by every kernel, and its first rows by experts' kernels."""
    for kernels, experts in layers:
      for kernel in kernels:
        x = _changed(x, x @ kernel)
      for gate, up, down in experts[:served]:
        y = (x[:rows] @ gate + x[:rows] @ up) @ down
        x = x.at[:rows].set(_changed(x[:rows], y))
    return x

  @jax.jit
  def run(prompts, first):
    rows = math.ceil(len(prompts) * share)
    read = through_layers(prompts, len(layers[0][1]), rows)

    def step(_, x):
      x = through_layers(x, served, batch_size)
      return _changed(x, x @ head)

    # The steps wait for the prompts, as those of a generation do.
    first = _changed(first, read[:batch_size])
    return jax.lax.fori_loop(1, num_tokens, step, first)

  M = sizes['hidden_size']
  prompts = jnp.ones((batch_size * prompt_len, M))
  first = jnp.ones((batch_size, M))
  return lambda: jax.block_until_ready(run(prompts, first))


def _changed(
  x: Float[Array, 'R M'], product: Float[Array, 'R N']
) -> Float[Array, 'R M']:
  """x with so little of the product that it stays finite, yet waits for it."""
  return x + 1e-9 * product.mean(axis=1, keepdims=True)


def _kernels(
  sizes: Mapping[str, int],
) -> tuple[list[tuple[Kernels, list[Kernels]]], Float[Array, 'M V']]:
  """The kernels of each layer and of its experts, and that of the logits."""
  M, F = sizes['hidden_size'], sizes['intermediate_size']
  E = sizes['num_local_experts']
  width = M // sizes['num_attention_heads'] * sizes['num_key_value_heads']
  rng = np.random.default_rng(0)

  def kernel(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  layers = []
  for _ in range(sizes['num_hidden_layers']):
    kernels = [kernel(M, n) for n in (M, width, width, M, E)]
    experts = [[kernel(M, F), kernel(M, F), kernel(F, M)] for _ in range(E)]
    layers.append((kernels, experts))
  return layers, kernel(M, sizes['vocab_size'])
