"""Noisy top-K gating of Shazeer et al. 2017 (arXiv 1701.06538).

https://arxiv.org/abs/1701.06538, section 2.1. Here is the noise and the
smooth load estimator of Appendix A; the choice itself is `token_choice` on
the noisy logits with `gates='renormalized'`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.routing.token_choice_rule import at_choices, choose
from moe_jax.shape_checks import checked
from moe_jax.shapes import Array, Float32, Int32, PRNGKey


class NoisyLogits(NamedTuple):
  """Logits with and without tunable Gaussian noise, for the load estimator.

  Attributes:
    clean: float32 [G, S, E], the logits without noise, x Wg.
    noisy: float32 [G, S, E], clean + N(0, 1) * std; equal to clean where no
      noise was drawn.
    std: float32 [G, S, E], the standard deviation of the noise,
      Softplus(x Wnoise), also where no noise was drawn.
  """

  clean: Array
  noisy: Array
  std: Array


@checked
def noisy_logits(
  clean: Float32[Array, 'G S E'],
  noise: Float32[Array, 'G S E'],
  key: PRNGKey | None,
) -> NoisyLogits:
  """Adds N(0, 1) * Softplus(noise) to the logits; none where key is None.

  Source: Eq. 4 of arXiv:1701.06538. With both weights initialised to zero,
  as the paper does, std starts at ln 2.
  """
  std = jax.nn.softplus(noise)
  if key is None:
    return NoisyLogits(clean, clean, std)
  draw = jax.random.normal(key, clean.shape, clean.dtype)
  return NoisyLogits(clean, clean + draw * std, std)


@checked
def load_probability(
  logits: NoisyLogits,
  num_selected: int,
  largest: Int32[Array, 'G S N'] | None = None,
) -> Float32[Array, 'G S E']:
  """P(x, i): the chance that i is among the K if only its noise is redrawn.

  Source: Eq. 8-9 of arXiv:1701.06538. kth_excluding(Z, K, i) is the K-th
  largest of the noisy logits without entry i: for i among the K largest that
  is the (K+1)-th of all. With K = E every expert is always chosen: 1.

  Args:
    logits: The logits without and with noise.
    num_selected: K.
    largest: The min(K + 1, E) experts of largest noisy logits, if known.
  """
  E, K = logits.noisy.shape[-1], num_selected
  if K >= E:
    return jnp.ones_like(logits.noisy)
  index = choose(logits.noisy, K + 1) if largest is None else largest
  value = at_choices(logits.noisy, index)  # [G, S, K+1]
  inside = jax.nn.one_hot(index[..., :K], E, dtype=jnp.bool_).any(-2)
  threshold = jnp.where(inside, value[..., K:], value[..., K - 1 : K])
  # Softplus underflows to 0 where noise was trained away entirely.
  std = jnp.maximum(logits.std, 1e-6)
  return jax.scipy.stats.norm.cdf((logits.clean - threshold) / std)
