"""Three numbers for the evenness of a load."""

import numpy as np
from jaxtyping import Num

from moe_jax.errors import InputError


def load_summary(load: Num[np.ndarray, 'E']) -> dict[str, float | int]:
  """The evenness of the assignments per expert, in any common unit.

  Returns:
    `load_cv`: standard deviation (population's) over mean, 0 when even,
    sqrt(E - 1) when one expert takes all. `load_max_over_mean`: 1 when even, E
    when one takes all. `unused_experts`: the number of experts that took
    nothing. The first two are NaN where no expert took anything.

  Raises:
    ValueError: `load` is not one row of finite numbers >= 0.
  """
  load = np.asarray(load, np.float64)
  if load.ndim != 1 or not load.size:
    raise InputError(f'load has shape {load.shape}; it must be [E], E >= 1')
  if not (np.isfinite(load) & (load >= 0)).all():
    raise InputError(f'load={load.tolist()} must be finite and >= 0')
  unused = int((load == 0).sum())
  if unused == load.size:
    cv = max_over_mean = float('nan')
  else:
    cv = float(load.std() / load.mean())
    max_over_mean = float(load.max() / load.mean())
  return {
    'load_cv': cv,
    'load_max_over_mean': max_over_mean,
    'unused_experts': unused,
  }
