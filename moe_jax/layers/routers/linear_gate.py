"""The linear layer from tokens to logits that most routers have.

All of it is float32 whatever the model's dtype (Table 2 of arXiv:2101.03961).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer

from moe_jax.config import option
from moe_jax.kernels.rows_product import rows_matmul
from moe_jax.layers import parameters
from moe_jax.layers.routers.contract import NOISE, Router, RouterOptions
from moe_jax.shapes import Array, Float, Float32

# Functions that round float32 numbers to those of a type, by its name. The
# results that the compiler computes from them stay float32.
ROUNDINGS = {
  'float32': lambda x: x,
  'bfloat16': lambda x: jax.lax.reduce_precision(x, 8, 7),
}
# The logical axes of the kernel; the second is that of the choices of tokens.
AXES = ('embed', 'expert_choice')
ROLE = 'router'


@dataclasses.dataclass(frozen=True)
class Jitter(RouterOptions):
  """The options of a router with noise on the input of its logits."""

  jitter: float = option(
    0.0,
    'Noise on the input of the router in training, which is multiplied by '
    'random numbers uniform in [1 - jitter, 1 + jitter] (ST-MoE, '
    'arXiv:2202.08906 section 3.2); 0.0: no noise.',
    minimum=0,
    below=1,
    same_function=True,
  )


@dataclasses.dataclass(frozen=True)
class LinearGate(Jitter):
  """The options of a router whose logits are a product with its input."""

  use_bias: bool = option(
    False,
    'Whether a learned bias, which starts at zero, is added to the router '
    'logits.',
  )

  def multiply_adds(self, sizes, width):
    """The multiplications of one token with the kernel [M, E]."""
    return width * sizes.num_experts


def jittered(
  module: Router, x: Float[Array, 'G S M'], train: bool
) -> Float32[Array, 'G S M']:
  """The router's input in float32, with the noise of `Jitter`."""
  x, jitter = x.astype(jnp.float32), module.options.jitter
  if train and jitter > 0:
    low, high = 1.0 - jitter, 1.0 + jitter
    key = module.make_rng(NOISE)
    x = x * jax.random.uniform(key, x.shape, x.dtype, low, high)
  return x


def linear_logits(
  module: Router,
  x: Float32[Array, 'G S M'],
  init: Initializer | None = None,
  rounded: Callable[[Array], Array] = ROUNDINGS['float32'],
) -> Float32[Array, 'G S E']:
  """The logits of a `LinearGate`: x times `w`, plus `b` if there is a bias.

  Args:
    module: The router, whose parameters they are.
    x: The input, as `jittered` returns it.
    init: The initialiser of the kernel. Default: the model's.
    rounded: Function that rounds input, kernel and logits, one of `ROUNDINGS`.
  """
  E = module.sizes.num_experts
  init = init or parameters.kernel(module.shared, AXES, role=ROLE)
  logits = product(module, 'w', init, x, E, rounded)
  if module.options.use_bias:
    init = parameters.bias(AXES[1:], role=ROLE)
    logits = logits + module.param('b', init, (E,), jnp.float32)[None, None]
  return rounded(logits)


def product(
  module: Router,
  name: str,
  init: Initializer,
  x: Float32[Array, 'G S M'],
  size: int,
  rounded: Callable[[Array], Array] = ROUNDINGS['float32'],
) -> Float32[Array, 'G S E']:
  """The product of x with a kernel of the module, [M, size], of that name.

  Both factors are rounded before it by `rounded`.
  """
  G, S, M = x.shape
  w = module.param(name, init, (M, size), jnp.float32)
  x = rounded(x.reshape(G * S, M))
  logits = rows_matmul(x, rounded(w), jax.lax.Precision.HIGHEST)
  return logits.reshape(G, S, -1)
