"""A batch as shapes: what a step is compiled for before there is any data."""

import jax
import jax.numpy as jnp
import ml_collections

from moe_jax.models import OF_FEATURES

_TOKENS = ('tokens', 'segment_ids', 'positions')


def abstract_batch(
  config: ml_collections.ConfigDict,
) -> dict[str, jax.ShapeDtypeStruct]:
  """The shapes and types of every batch that `config` trains on.

  See `moe_jax.data` for what they are; where they live is the step's to say.
  """
  B, T = config.batch_size, config.data.seq_len
  if config.model.kind in OF_FEATURES:
    shape = (B, *config.model.feature_shape)
    one = jax.ShapeDtypeStruct((B, 1), jnp.int32)
    return {
      'features': jax.ShapeDtypeStruct(shape, jnp.float32),
      'targets': one,
      'segment_ids': one,
      'loss_weights': jax.ShapeDtypeStruct((B, 1), jnp.float32),
    }
  prefixes = {'': T}
  if config.model.kind == 'encoder_decoder':
    prefixes = {'encoder_': T, '': config.data.target_len}
  ints = {
    f'{prefix}{name}': length
    for prefix, length in prefixes.items()
    for name in _TOKENS
  }
  last = prefixes['']
  return {
    **{
      name: jax.ShapeDtypeStruct((B, length), jnp.int32)
      for name, length in {**ints, 'targets': last}.items()
    },
    'loss_weights': jax.ShapeDtypeStruct((B, last), jnp.float32),
  }
