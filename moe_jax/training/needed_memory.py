"""The least memory that a run needs, by arithmetic on its options.

It is counted before a model is built, since with ten million layers even that
takes minutes.
"""

from collections.abc import Iterator

import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax.memory_room import check_room
from moe_jax.training.run_options import RunOptions

_ITEM_BYTES = 4  # bytes of a number of a batch, of a loss and of logits


def check_fits(options: RunOptions, mesh: Mesh) -> None:
  """Checks that a run can fit into the memory of the devices of its mesh.

  Args:
    options: The options of the run, after `filled`.
    mesh: The devices.

  Raises:
    ValueError: One of its parts alone needs more than all devices have.
  """
  check_room(_least_bytes(options), list(mesh.devices.flat))


def _least_bytes(options: RunOptions) -> Iterator[tuple[str, int]]:
  """The arrays of a run that may be large, each with its least bytes."""
  model, rows = options.model, options.batch_size
  param_bytes = jnp.dtype(model.param_dtype).itemsize
  yield (
    f'the parameters of {type(model).__name__}, {model.least_parameters():,}',
    param_bytes * model.least_parameters(),
  )
  lengths = options.data.seq_len, options.data.target_len
  tokens = rows * sum(lengths)
  # Tokens, segments and positions; targets and weights of the last sequence.
  yield f'batch_size={rows} of {sum(lengths)} tokens', 3 * _ITEM_BYTES * tokens
  logit_tokens = rows // options.microbatches * (lengths[1] or lengths[0])
  V = model.vocab_size
  yield (
    f'the logits of {logit_tokens} tokens of a microbatch, with vocab_size={V}',
    _ITEM_BYTES * logit_tokens * V,
  )
