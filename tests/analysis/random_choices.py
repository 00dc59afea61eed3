"""Random choices of experts, as a trace has them. This module has no tests."""

import numpy as np

from moe_jax.analysis.traces import LayerChoices


def random_choices(rng, info, real, most=2):
  """Random choices of a layer without an expert twice, some of them dropped.

  Args:
    rng: A random generator of numpy.
    info: The sizes of the layer, a `LayerInfo`. Where its experts choose, some
      tokens are chosen by none, and no choice is dropped.
    real: bool [B, T], whether a place has a token.
    most: The number of choices of a token.
  """
  expert = np.argsort(rng.random((*real.shape, info.num_experts)), -1)
  expert = np.where(real[..., None], expert[..., :most], -1).astype(np.int32)
  if info.by_expert:
    expert[rng.random(real.shape) < 0.3] = -1
  kept = expert >= 0
  if not info.by_expert:
    kept &= rng.random(expert.shape) < 0.7
  gate = np.where(kept, rng.random(expert.shape), 0).astype(np.float32)
  return LayerChoices(expert, gate, kept)
