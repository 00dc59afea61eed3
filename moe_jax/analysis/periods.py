"""FLOPs of a looped training step, from unrolled ones of one and two periods.

A compiler counts a loop's body once, whatever its length. Layers of one period
cost the same, so the whole is one of each period and as many more as there are;
microbatches likewise, from a batch of one and of two of them.
Not here: loops whose length depends on the data, which count once still.
"""

import dataclasses
from collections.abc import Callable

from moe_jax.models import ModelOptions
from moe_jax.models.pattern import Segment, segments
from moe_jax.models.text_options import LayerOptions
from moe_jax.training.run_options import RunOptions

_ENCODER, _DECODER = 'encoder', 'decoder'
# The loops of an encoder (none in a decoder-only model) and a decoder.
Halves = dict[str, list[Segment]]


def extrapolate(
  options: RunOptions, flops: Callable[[RunOptions], float]
) -> float:
  """What `flops` would say of a run if it counted loops in full.

  Args:
    options: A run of any number of layers and microbatches.
    flops: Counts a run's step, of unrolled layers and one microbatch. It is
      called once, and once more for every loop of the model; all that twice if
      there are microbatches.

  Raises:
    ValueError: The model is no Transformer: an LSTM's loop over a row cannot be
      unrolled here.
  """
  if not options.model.has_blocks:
    raise ValueError(
      f'{type(options.model).__name__} has loops that are counted once; FLOPs '
      'are read from programs of models of blocks alone'
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
  loops = halves(options.model)
  base = flops(_short(options, loops))
  total = base
  for half, cut in loops.items():
    for i, segment in enumerate(cut):
      if segment.repeats > 1:
        longer = flops(_short(options, loops, half, i))
        total += (segment.repeats - 1) * (longer - base)
  return total


def halves(model: ModelOptions) -> Halves:
  """The loops of each half of a model of blocks."""
  loops = {_DECODER: segments(model.sparse)}
  if model.has_encoder:
    loops[_ENCODER] = segments(model.encoder_half().sparse)
  return loops


def _short(
  options: RunOptions, loops: Halves, half: str = '', index: int = -1
) -> RunOptions:
  """One period of every loop, but two of loop `index` of `half`."""
  model = options.model
  encoder = model.encoder_half() if model.has_encoder else None
  model = dataclasses.replace(
    _of_periods(model, loops[_DECODER], index if half == _DECODER else -1),
    scan_layers=False,
  )
  if encoder is not None:
    short = _of_periods(
      encoder, loops[_ENCODER], index if half == _ENCODER else -1
    )
    model = model.with_encoder(dataclasses.replace(short, scan_layers=False))
  return dataclasses.replace(options, model=model)


def _of_periods(
  layers: LayerOptions, cut: list[Segment], index: int
) -> LayerOptions:
  """The same layers with one period of each loop, two of loop `index`."""
  sparse = [
    flag
    for i, segment in enumerate(cut)
    for flag in segment.pattern * (1 + (i == index))
  ]
  named = ','.join(str(i) for i, flag in enumerate(sparse) if flag)
  moe = dataclasses.replace(layers.moe, layers=named or 'none')
  return dataclasses.replace(layers, num_layers=len(sparse), moe=moe)
