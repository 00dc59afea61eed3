"""Products of rows grouped by expert, by the package tokamax.

It has kernels for Hopper and Blackwell GPUs (Mosaic), for other NVIDIA GPUs
(Triton) and for TPUs; the first that serves the shapes and types is taken. It
would fall back to XLA's `ragged_dot`, which it is compared with: here it does
so on a CPU alone, and elsewhere raises. The extra `tokamax` installs it.
"""

import functools

import jax
from absl import flags

from moe_jax.errors import from_extra
from moe_jax.kernels import ragged_dot


def _dot(x, w, group_sizes, dimensions, dtype):
  use = "the grouped_matmul backend 'tokamax'"
  tokamax = from_extra('tokamax', 'tokamax', use)
  # Tokamax reads absl's flags and, if the program has not parsed them, parses
  # the command line, where a flag that absl does not know is an error.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  kernels = 'xla' if jax.default_backend() == 'cpu' else ('mosaic', 'triton')
  options = dict(preferred_element_type=dtype, implementation=kernels)
  return tokamax.ragged_dot_general(x, w, group_sizes, dimensions, **options)


matmul = functools.partial(ragged_dot.matmul, dot=_dot)
outer = functools.partial(ragged_dot.outer, dot=_dot)
