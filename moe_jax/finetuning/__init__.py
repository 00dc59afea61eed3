"""Runs that begin with another run's parameters.

    python -m moe_jax.main --config=configs/tiny_switch.py \
      --workdir=runs/sparse --config.init_from.workdir=runs/dense

Parameters of the same model are copied. A dense model is upcycled, and a sparse
one can get another number of experts, by the rules of `upcycling.py`. Steps are
counted from 0, and the optimizer is new unless `keep_optimizer` is set.
"""

# `as` with the same name marks a name as public.
from moe_jax.finetuning.start import check as check
from moe_jax.finetuning.start import initial as initial
from moe_jax.finetuning.upcycling import InitFrom as InitFrom
from moe_jax.finetuning.upcycling import Plan as Plan
from moe_jax.finetuning.upcycling import plan as plan
from moe_jax.finetuning.upcycling import sources_of as sources_of
