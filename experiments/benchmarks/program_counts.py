"""XLA's counts of a program, and FLOPs of a step with loops.

A compiler counts the body of a loop once, however often it runs. All periods
of a loop over layers cost the same. So the FLOPs of a step are those of a step
with one period of each loop, and for each further period the difference that a
second one makes. Microbatches are a loop too, whose body is counted in batches
of one and of two microbatches.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

from jax.stages import Compiled

from moe_jax.errors import InputError
from moe_jax.layers.shared import RULES
from moe_jax.models import MODELS, DecoderOptions
from moe_jax.models.pattern import Segment, segments
from moe_jax.training.run_options import RunOptions

_ENCODER, _DECODER = 'encoder', 'decoder'


def counts(compiled: Compiled) -> dict[str, float]:
  """The numbers that XLA counts in a program; the body of a loop counts once.

  They are NaN where the platform gives none.

  Returns:
    Numbers by name:
    - xla_flops: FLOPs, two for a multiply-add and one for an elementwise
      operation. A program with a loop takes more than these.
    - xla_bytes: bytes that instructions read and write, as if there were no
      caches.
    - argument_bytes: bytes of the arguments.
    - output_bytes: bytes of the results, gradients included.
    - temp_bytes: bytes that are allocated while the program runs, besides
      arguments and results.
  """
  cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
  return {
    'xla_flops': float(cost.get('flops', 'nan')),
    'xla_bytes': float(cost.get('bytes accessed', 'nan')),
    'argument_bytes': memory.argument_size_in_bytes,
    'output_bytes': memory.output_size_in_bytes,
    'temp_bytes': memory.temp_size_in_bytes,
  }


def extrapolate(
  options: RunOptions, flops: Callable[[RunOptions], float]
) -> float:
  """The FLOPs of a run's step that `flops` would count without any loop.

  Args:
    options: Options of a run with any number of layers and microbatches.
    flops: Counts the FLOPs of a run whose layers are unrolled and whose batch
      is not cut into microbatches. It is called once, and once more for each
      loop over layers; with microbatches, twice as often.

  Raises:
    ValueError: The model has no blocks, so that it has loops over tokens, which
      cannot be unrolled here.
  """
  if not options.model.has_blocks:
    raise InputError(
      f'model.kind={MODELS.name_of(options.model)!r} has loops over tokens, '
      'whose bodies a compiler counts once; FLOPs are read from compiled steps '
      'of models of blocks alone'
    )
  n = options.microbatches
  if n > 1:
    one, two = (
      extrapolate(
        dataclasses.replace(options, microbatches=1, batch_size=rows), flops
      )
      for rows in (options.batch_size // n, 2 * options.batch_size // n)
    )
    return one + (n - 1) * (two - one)
  # The loops over layers of each half of a model.
  model = cast(DecoderOptions, options.model)
  loops = {
    name: segments(model.stack_config(half, RULES, causal=True).kinds)
    for name, half in zip((_DECODER, _ENCODER), reversed(model.halves))
  }
  base = flops(_short(options, loops))
  total = base
  for half, segments_of_half in loops.items():
    for i, segment in enumerate(segments_of_half):
      if segment.repeats > 1:
        longer = flops(_short(options, loops, half, i))
        total += (segment.repeats - 1) * (longer - base)
  return total


def _short(
  options: RunOptions,
  loops: Mapping[str, list[Segment]],
  half: str = '',
  index: int = -1,
) -> RunOptions:
  """A run whose loops have one period each, but two in loop `index` of `half`.

  Its layers are unrolled.
  """
  longer = {half: index}
  short = [
    _of_periods(layers, loops[name], longer.get(name, -1))
    for name, layers in zip((_DECODER, _ENCODER), options.model.halves[::-1])
  ]
  model = options.model.with_halves(*short[::-1])
  return dataclasses.replace(options, model=model)


def _of_periods(layers: Any, loops: list[Segment], index: int) -> Any:
  """Layers with one period of each loop, but two of loop `index`."""
  numbers, first = [], 0
  for i, segment in enumerate(loops):
    period = range(first, first + len(segment.pattern))
    numbers += [*period] * (1 + (i == index))
    first += segment.num_layers
  sparse = [i for i, old in enumerate(numbers) if layers.sparse[old]]
  moe = dataclasses.replace(
    layers.moe,
    layers=','.join(map(str, sparse)) or 'none',
    retained=layers.moe.retained.renumbered(tuple(numbers)),
  )
  attention = layers.attention
  if attention.window:
    full = [i for i, old in enumerate(numbers) if layers.full[old]]
    attention = dataclasses.replace(
      attention, full_layers=','.join(map(str, full)) or 'none'
    )
  return dataclasses.replace(
    layers,
    num_layers=len(numbers),
    moe=moe,
    attention=attention,
    scan_layers=False,
  )
