"""The base of models of text: the batches that they read, and their loss."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.errors import InputError
from moe_jax.models.base import Batch, Model, TokenLosses, counted
from moe_jax.models.embeddings import EmbeddingConfig
from moe_jax.routing import GivenChoices
from moe_jax.shapes import Array, Float32, Int

_KEYS = ('tokens', 'segment_ids', 'positions')
# The keys of a batch that hold the choices which are imposed on its routers:
# experts and whether they serve, [B, T, L, K] of the L sparse layers.
REPLAYED = ('replayed_experts', 'replayed_kept')


class TextModel(Model):
  """The base of models from tokens to logits of the next token.

  Attributes:
    embedding: The embeddings of tokens, and the logits.
  """

  embedding: EmbeddingConfig

  @property
  def vocab_size(self) -> int:
    """V, the number of tokens."""
    return self.embedding.vocab_size

  @property
  def longest(self) -> int | None:
    return self.embedding.positions.table_len or None

  @property
  def changes_at(self) -> int | None:
    return self.embedding.positions.changes_at

  @nn.nowrap
  def inputs(self, batch: Batch) -> dict[str, Any]:
    """Choices of experts are imposed if the batch has them.

    They are under the names `REPLAYED`.
    """
    sequence_arrays = {
      f'{prefix}{key}': batch[f'{prefix}{key}']
      for prefix in self.sequences
      for key in _KEYS
    }
    tasks = [f'{prefix}task_ids' for prefix in self.task_sequences]
    imposed = {
      f'{prefix}given': GivenChoices(*(batch[f'{prefix}{k}'] for k in REPLAYED))
      for prefix in self.sequences
      if f'{prefix}{REPLAYED[0]}' in batch
    }
    return {
      **sequence_arrays,
      **imposed,
      **{name: batch.get(name) for name in tasks},
    }

  @nn.nowrap
  def example(self, tokens: Int[Array, 'B T']) -> dict[str, Array]:
    """All sequences are the same tokens, of task 0."""
    return {f'{prefix}tokens': tokens for prefix in self.sequences} | {
      f'{prefix}task_ids': jnp.zeros_like(tokens)
      for prefix in self.task_sequences
    }

  @nn.nowrap
  def batch_shapes(
    self, batch_size: int, seq_len: int, target_len: int = 0
  ) -> dict[str, jax.ShapeDtypeStruct]:
    lengths = dict(zip(self.sequences, (seq_len, target_len)))
    shapes = {
      f'{prefix}{key}': (batch_size, length)
      for prefix, length in lengths.items()
      for key in _KEYS
    }
    for prefix in self.task_sequences:
      shapes[f'{prefix}task_ids'] = (batch_size, lengths[prefix])
    target_shape = (batch_size, lengths[''])
    ints = {
      name: jax.ShapeDtypeStruct(shape, jnp.int32)
      for name, shape in {**shapes, 'targets': target_shape}.items()
    }
    return {
      **ints,
      'loss_weights': jax.ShapeDtypeStruct(target_shape, jnp.float32),
    }

  @nn.nowrap
  def loss(self, outputs: Float32[Array, 'B T V'], batch: Batch) -> TokenLosses:
    """The cross-entropy of the targets, and the squared logsumexp of logits.

    Logits of tokens of loss weight 0 count as zeros, whatever they are.
    """
    # Imported here, as optax takes a tenth of the time of `import moe_jax`.
    import optax

    outputs = counted(outputs, batch)
    return TokenLosses(
      optax.softmax_cross_entropy_with_integer_labels(
        outputs, batch['targets']
      ),
      jax.nn.logsumexp(outputs, axis=-1) ** 2,
    )


def check_change(model: Model, read: Sequence[tuple[int, int]]) -> None:
  """Checks that no keys in a cache would have to change; see `changes_at`.

  Args:
    model: The model.
    read: The tokens that each row reads at once, and in all.

  Raises:
    ValueError: A row reads no more than `changes_at` at once, and more in all.
  """
  border = model.changes_at
  for i, (first, total) in enumerate(read):
    if border is not None and first <= border < total:
      raise InputError(
        f'row {i} of {len(read)} reads {total} tokens, {first} of them at once,'
        f' and crosses original_len={border} of the rotary positions, beyond '
        'which the keys in its cache would turn otherwise; let it read at most '
        f'{border} (prompt and new tokens, less 1), or more than {border} at '
        'once (a prompt less its last token)'
      )
