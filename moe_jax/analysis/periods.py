"""FLOPs of a looped training step, from unrolled ones of one and two periods.

A compiler counts a loop's body once, whatever its length. Layers of one period
cost the same, so the whole is one of each period and as many more as there are;
microbatches likewise, from a batch of one and of two of them.
Not here: loops whose length depends on the data, which count once still.
"""

from collections.abc import Callable

import ml_collections

from moe_jax import models
from moe_jax.config import merge
from moe_jax.models.pattern import Segment, segments

# The patterns of an encoder (None if there is none) and a decoder.
Halves = dict[str, list[Segment]]


def extrapolate(
  config: ml_collections.ConfigDict,
  flops: Callable[[ml_collections.ConfigDict], float],
) -> float:
  """What `flops` would say of `config` if it counted loops in full.

  Args:
    config: Of any number of layers and microbatches.
    flops: Counts a config's step, of unrolled layers and one microbatch. It is
      called once, and once more for every loop of the model; all that twice if
      there are microbatches.

  Raises:
    ValueError: The model is no Transformer: an LSTM's loop over a row cannot be
      unrolled here.
  """
  if config.model.kind not in ('decoder', 'encoder_decoder'):
    raise ValueError(
      f'model.kind={config.model.kind!r} has loops that are counted once; '
      "FLOPs are read from programs of 'decoder' and 'encoder_decoder' alone"
    )
  n = config.microbatches
  if n > 1:
    one, two = (
      extrapolate(merge(config, {'microbatches': 1, 'batch_size': rows}), flops)
      for rows in (config.batch_size // n, 2 * config.batch_size // n)
    )
    return one + (n - 1) * (two - one)
  found = halves(config)
  base = flops(_short(config, found))
  total = base
  for half, cut in found.items():
    for i, segment in enumerate(cut):
      if segment.repeats > 1:
        longer = flops(_short(config, found, half, i))
        total += (segment.repeats - 1) * (longer - base)
  return total


def halves(config: ml_collections.ConfigDict) -> Halves:
  """The loops of each half, by the prefix of its keys in the config."""
  m = config.model
  found = {'': segments(models.sparse_pattern(m.moe.layers, m.num_layers))}
  if m.kind == 'encoder_decoder':
    layers = m.moe.encoder_layers or m.moe.layers
    number = m.num_encoder_layers or m.num_layers
    found['encoder_'] = segments(models.sparse_pattern(layers, number))
  return found


def _short(
  config: ml_collections.ConfigDict,
  found: Halves,
  half: str | None = None,
  index: int = -1,
) -> ml_collections.ConfigDict:
  """One period of every loop, but two of loop `index` of `half`."""
  model = {'scan_layers': False, 'moe': {}}
  for prefix, cut in found.items():
    sparse = [
      flag
      for i, segment in enumerate(cut)
      for flag in segment.pattern * (1 + (prefix == half and i == index))
    ]
    named = ','.join(str(i) for i, flag in enumerate(sparse) if flag)
    model[f'num_{prefix}layers'] = len(sparse)
    model['moe'][f'{prefix}layers'] = named or 'none'
  return merge(config, {'model': model})
