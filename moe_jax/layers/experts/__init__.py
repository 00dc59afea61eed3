"""Experts, and the dispatches that move tokens to them and multiply.

Open `experts.py` first: `apply_experts` applies experts by any dispatch.
"""

from collections.abc import Mapping

from moe_jax.config import Kinds
from moe_jax.kernels import grouped_products
from moe_jax.layers.experts.dispatch_options import SCOPE as SCOPE
from moe_jax.layers.experts.dispatch_options import Dispatch as Dispatch
from moe_jax.layers.experts.dispatch_options import Dropless as Dropless
from moe_jax.layers.experts.dispatch_options import Einsum as Einsum
from moe_jax.layers.experts.dispatch_options import Gather as Gather
from moe_jax.layers.experts.dispatch_options import Sorted as Sorted
from moe_jax.layers.experts.experts import ROLE as ROLE
from moe_jax.layers.experts.experts import ExpertOptions, FeedForwardExpert
from moe_jax.layers.experts.experts import ModuleExpert as ModuleExpert
from moe_jax.layers.experts.experts import (
  SharedExpertOptions as SharedExpertOptions,
)
from moe_jax.layers.experts.experts import Twin as Twin
from moe_jax.layers.experts.experts import apply_experts as apply_experts
from moe_jax.layers.experts.quantized_experts import QuantizedExpert
from moe_jax.parallel.exchange import EXCHANGES
from moe_jax.parallel.ragged import RAGGED_EXCHANGES

EXPERTS = Kinds(
  'expert',
  ExpertOptions,
  {'feed_forward': FeedForwardExpert, 'quantized': QuantizedExpert},
  inline=True,
)
DISPATCHES = Kinds(
  'dispatch',
  Dispatch,
  {'gather': Gather, 'einsum': Einsum, 'dropless': Dropless, 'sorted': Sorted},
)


def describe(
  dispatch: Dispatch, platform: str, devices: Mapping[str, int]
) -> str:
  """A text that a run prints at its start: dispatch, products and exchange.

  Args:
    dispatch: The dispatch of sparse layers.
    platform: The platform of the devices, as JAX names it: 'cpu', 'tpu', ...
    devices: The number of devices along each mesh axis that splits experts.
  """
  parts, exchanges = [], EXCHANGES
  if isinstance(dispatch, Dropless):
    exchanges = RAGGED_EXCHANGES
    products = grouped_products.describe(dispatch.backend, platform)
    parts.append(f'grouped products: {products}')
  if devices and isinstance(dispatch, Gather | Dropless):
    exchange = exchanges.name_of(dispatch.exchange)
    axes = ', '.join(f'{name}={size}' for name, size in devices.items())
    parts.append(f'exchange {exchange!r} over {axes}')
    if dispatch.shadowing.experts:
      parts.append(f'up to {dispatch.shadowing.experts} experts shadowed')
  name = repr(DISPATCHES.name_of(dispatch))
  return f'{name} ({"; ".join(parts)})' if parts else name
