"""Options by which a router explores: drawn choices, and dropout of its input.

Source: Table 11 of arXiv:2101.03961 (Switch), which also has the noise of
`linear_gate.Jitter`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moe_jax.layers.routers.contract import NOISE, Router, RouterOptions
from moe_jax.options import one_of, option, within
from moe_jax.shapes import Array, Float32


@dataclasses.dataclass(frozen=True)
class Exploring(RouterOptions):
  """The options of a router that may try other experts in training."""

  choice_policy: str = option(
    'largest',
    "Experts that a token chooses in training: 'largest' are those of its K "
    "largest scores; 'sampled' are drawn by the router's probabilities, "
    'without replacement; the gate of an expert does not depend on whether it '
    'was drawn. Evaluation always takes the largest.',
    one_of('largest', 'sampled'),
    how=True,
  )
  input_dropout: float = option(
    0.0,
    "Rate at which numbers of the router's input are dropped in training, and "
    'the others scaled up; experts see the whole input. 0.0 drops nothing.',
    within('[0, 1)'),
    how=True,
  )


def with_dropout(
  module: Router, x: Float32[Array, 'G S M'], train: bool
) -> Float32[Array, 'G S M']:
  """The router's input with the dropout of `Exploring`."""
  rate = module.options.input_dropout
  if not train or rate == 0:
    return x
  keep_mask = jax.random.bernoulli(module.make_rng(NOISE), 1.0 - rate, x.shape)
  return jnp.where(keep_mask, x / (1.0 - rate), 0.0)


def sampled(
  module: Router, logits: Float32[Array, 'G S E'], train: bool
) -> Float32[Array, 'G S E'] | None:
  """Scores whose K largest are a draw by the softmax; None where none is.

  Logits with Gumbel noise: their largest is drawn by the softmax, and the next
  ones by the softmax of those that are left (arXiv:1903.06059).
  """
  if not train or module.options.choice_policy == 'largest':
    return None
  key = module.make_rng(NOISE)
  return logits + jax.random.gumbel(key, logits.shape, logits.dtype)
