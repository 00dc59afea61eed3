"""Sparse mixture-of-experts models in JAX.

    layer = moe_jax.MoE(
      moe_jax.MoeOptions(
        num_experts=8,
        num_selected=2,
        router=moe_jax.TokenChoice(gates='renormalized'),
        capacity=moe_jax.PerAssignment(factor=1.25),
        expert=moe_jax.FeedForwardExpert(hidden=1024),
      )
    )

`routing` chooses experts for tokens, `dispatch` moves the tokens, `layers` and
`models` are Flax linen modules, and `training` trains them by a config.
"""

# `import X as X` marks the name X as public.
from moe_jax import layers as layers
from moe_jax import models as models
from moe_jax import routing as routing
from moe_jax.errors import InputError as InputError
from moe_jax.layers import Dropless as Dropless
from moe_jax.layers import Einsum as Einsum
from moe_jax.layers import FeedForward as FeedForward
from moe_jax.layers import FeedForwardExpert as FeedForwardExpert
from moe_jax.layers import FfnOptions as FfnOptions
from moe_jax.layers import Gather as Gather
from moe_jax.layers import ModuleExpert as ModuleExpert
from moe_jax.layers import MoE as MoE
from moe_jax.layers import MoeOptions as MoeOptions
from moe_jax.layers import Shared as Shared
from moe_jax.layers import SharedExpertOptions as SharedExpertOptions
from moe_jax.layers import Sorted as Sorted
from moe_jax.layers.routers import ExpertChoice as ExpertChoice
from moe_jax.layers.routers import Hash as Hash
from moe_jax.layers.routers import Hierarchical as Hierarchical
from moe_jax.layers.routers import NoisyTopK as NoisyTopK
from moe_jax.layers.routers import Random as Random
from moe_jax.layers.routers import StrictlyBalanced as StrictlyBalanced
from moe_jax.layers.routers import TokenChoice as TokenChoice
from moe_jax.layers.routers.contract import Sizes as Sizes
from moe_jax.routing import MoeAux as MoeAux
from moe_jax.routing import Routing as Routing
from moe_jax.routing import dispatch as dispatch
from moe_jax.routing.capacity import All as All
from moe_jax.routing.capacity import Fixed as Fixed
from moe_jax.routing.capacity import Fraction as Fraction
from moe_jax.routing.capacity import PerAssignment as PerAssignment
from moe_jax.routing.capacity import PerToken as PerToken
