"""The shared expert of a sparse layer: a feed-forward that every token meets.

DeepSeekMoE (https://arxiv.org/abs/2401.06066, section 3.2). It is a dense layer
whose output is added to that of the chosen experts, so that several shared
experts are the same as one expert whose width is the sum of theirs.
"""

import dataclasses
from collections.abc import Iterator
from typing import Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.config import Options, option
from moe_jax.kernels.rows_product import rows_matmul
from moe_jax.layers import parameters
from moe_jax.layers.experts.experts import Twin
from moe_jax.layers.ffn import FeedForward
from moe_jax.layers.shared import Shared
from moe_jax.shapes import Array, Float, checked

# The name of the shared expert's module, and the role of its parameters.
SHARED_EXPERT = 'shared_expert'


@dataclasses.dataclass(frozen=True)
class SharedExpertOptions(Options):
  """Options of the expert that serves every token of a sparse layer."""

  hidden: int = option(
    0,
    'Width of the hidden layer of the shared expert, which has the activation '
    'and the dropout of the other experts. Several shared experts are one of '
    "their widths together (DeepSeek checkpoints' n_shared_experts times "
    'moe_intermediate_size; shared_expert_intermediate_size in Qwen2-MoE); 0: '
    'there is none.',
    minimum=0,
  )
  gated: bool = option(
    False,
    "Whether the shared expert's output for a token is multiplied by the "
    'sigmoid of a learned product with the token (Qwen2-MoE).',
  )

  def problems(self) -> Iterator[str]:
    if not self.hidden:
      yield from self.in_vain('unless hidden is at least 1')

  def shrunk(self) -> Self:
    return dataclasses.replace(self, hidden=40 if self.hidden else 0)


class SharedExpert(nn.Module):
  """A feed-forward for every token, times the sigmoid of a gate if it has one.

  Attributes:
    options: The options of the expert.
    twin: The feed-forward layer that the expert is.
    shared: The settings that all layers of the model share.
  """

  options: SharedExpertOptions
  twin: Twin
  shared: Shared = Shared()

  @nn.compact
  @checked
  def __call__(
    self, x: Float[Array, 'B T M'], train: bool = False
  ) -> Float[Array, 'B T M']:
    """Returns the expert's output for every token; dropout only if `train`."""
    ffn, dropout = self.twin
    dtype = self.shared.dtype
    layer = FeedForward(ffn, self.shared, dropout, SHARED_EXPERT, name='ffn')
    y = layer(x.astype(dtype), train)
    if not self.options.gated:
      return y
    init = parameters.kernel(self.shared, ('embed', None), role=SHARED_EXPERT)
    w = self.param('w_gate', init, (x.shape[-1], 1), self.shared.param_dtype)
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    w, precision = w.astype(jnp.float32), jax.lax.Precision.HIGHEST
    logit = rows_matmul(rows, w, precision).reshape(*x.shape[:-1], 1)
    return y * jax.nn.sigmoid(logit).astype(dtype)
