"""Feed-forward experts whose kernels are quantised to codes of few bits.

Experts are decoded where they are used, one at a time, so that the decoded
experts of a layer are never in memory together. Quantised experts are for
evaluation and generation; `moe_jax.compression quantize` makes them of trained
experts.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.config import option
from moe_jax.kernels.kernel_format import KernelFormat
from moe_jax.layers.experts.dispatch_options import SCOPE, Dispatch
from moe_jax.layers.experts.experts import FeedForwardExpert
from moe_jax.layers.experts.few_tokens import apply_one_by_one
from moe_jax.layers.ffn import FfnLayer
from moe_jax.layers.parameters import Parameter
from moe_jax.layers.shared import Shared
from moe_jax.routing import AnyRouting
from moe_jax.shapes import Array, Float, checked


@dataclasses.dataclass(frozen=True)
class QuantizedExpert(FeedForwardExpert):
  """The options of quantised feed-forward experts, whatever the dispatch is."""

  format: KernelFormat = option(
    KernelFormat(), 'Storage of the kernels of experts.'
  )

  def experts(self, dispatch: Dispatch, shared: Shared) -> nn.Module:
    """The module of quantised experts, which is the same for every dispatch."""
    return QuantizedExperts(self.ffn(shared), self.format, name=SCOPE)


class QuantizedExperts(nn.Module):
  """Quantised experts, decoded one by one, but only those that have tokens.

  The module takes any routing, whatever the dispatch is. One parameter holds
  all arrays of a kernel, which begin as zeros, since codes are not trained. On
  a mesh each device has all of them, and the compiler decides how rows travel.

  Attributes:
    ffn: The computation of one expert.
    format: The storage of the kernels.
  """

  ffn: FfnLayer
  format: KernelFormat

  @nn.compact
  @checked
  def __call__(
    self, x: Float[Array, 'G S M'], routing: AnyRouting, train: bool = False
  ) -> tuple[Float[Array, 'G S M'], None]:
    """Returns the gated sums of the experts' outputs, and no exchange counts.

    These experts have no dropout, so that `train` changes nothing.
    """

    def zeros(key, shape, dtype):
      return {
        name: Parameter(
          jnp.zeros(array.shape, array.dtype),
          (None,) * len(array.shape),
          role=self.ffn.role,
          form=array.form,
        )
        for name, array in self.format.stored_arrays(shape).items()
      }

    E, M = routing.num_experts, x.shape[-1]
    stored = self.ffn.parameters(self, (E,), M, zeros)

    def decoded(e):
      index = jax.lax.dynamic_index_in_dim
      p = jax.tree.map(lambda w: index(w, e, keepdims=False), stored)
      return self.format.decoded_experts(p)

    def fold(used, step, y):
      order = jnp.argsort(~used)  # stable: used experts come first
      return jax.lax.fori_loop(
        0, used.sum(), lambda i, y: step(order[i], decoded(order[i]), y), y
      )

    return apply_one_by_one(self.ffn, fold, x, routing), None
