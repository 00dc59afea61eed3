"""From a config to the models before language: the ConfigDict ends here.

Their inputs are examples with a class, whose shape and number of classes are
the data's. Not here: the others (`build.py`).
"""

import types

from moe_jax.config import to_dataclass
from moe_jax.layers.initializers import Init
from moe_jax.models.adaptive import AdaptiveConfig, AdaptiveMixture
from moe_jax.models.deep_moe import DeepMoe, DeepMoeConfig


def adaptive(model, init: Init) -> AdaptiveMixture:
  """Of `model.adaptive`, whose weights start by a rule of its own."""
  del init
  return AdaptiveMixture(
    to_dataclass(
      AdaptiveConfig,
      model.adaptive,
      vocab_size=model.vocab_size,
      feature_shape=tuple(model.feature_shape),
    )
  )


def deep_moe(model, init: Init) -> DeepMoe:
  """Of `model.deep_moe`."""
  sizes = {
    name: tuple(model.deep_moe[name])  # a list where it comes from JSON
    for name in ('num_experts', 'hidden', 'gate_hidden')
  }
  return DeepMoe(
    to_dataclass(
      DeepMoeConfig,
      model.deep_moe,
      **sizes,
      vocab_size=model.vocab_size,
      feature_shape=tuple(model.feature_shape),
      init=init,
    )
  )


BUILDERS = types.MappingProxyType({'adaptive': adaptive, 'deep_moe': deep_moe})
