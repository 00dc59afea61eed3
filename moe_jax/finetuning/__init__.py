"""Runs that begin with another run's parameters.

    python -m moe_jax.main --config=configs/tiny_switch.py \
      --workdir=runs/sparse --config.init_from.workdir=runs/dense

Parameters of the same model are copied. A dense model is upcycled, and a sparse
one can get another number of experts, by the rules of `upcycling.py`. The
optimizer begins anew, at step 0.
"""

from moe_jax.finetuning.matching import plan
from moe_jax.finetuning.start import InitFrom, check, initial
from moe_jax.finetuning.upcycling import Copies, Plan, sources_of

__all__ = [
  'Copies',
  'InitFrom',
  'Plan',
  'check',
  'initial',
  'plan',
  'sources_of',
]
