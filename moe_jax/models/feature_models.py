"""The base of models of examples that are not text, such as those of 1991.

The shape of an example and the number of classes come from the data. Not here:
the models (`adaptive.py`, `deep_moe.py`).
"""

import dataclasses
import math
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax.errors import InputError
from moe_jax.models.base import Model
from moe_jax.models.model_options import ModelOptions
from moe_jax.options import at_least, each, option
from moe_jax.shapes import Array, Float32, Int


@dataclasses.dataclass(frozen=True)
class FeatureModelOptions(ModelOptions):
  """The options of a model of examples that are not text."""

  reads_features: ClassVar[bool] = True

  feature_shape: tuple[int, ...] = option(
    (),
    "Shape of an example's array of features; (): that of the data.",
    each(at_least(1)),
  )

  def filled(
    self,
    vocab_size: int,
    feature_shape: tuple[int, ...],
    seq_len: int,
    num_tasks: int = 0,
  ) -> Self:
    """See `ModelOptions.filled`."""
    options = super().filled(vocab_size, feature_shape, seq_len, num_tasks)
    configured, shape = self.feature_shape, tuple(feature_shape)
    if configured and configured != shape:
      raise InputError(
        f'model.feature_shape={configured} is not that of the data, {shape}'
      )
    return dataclasses.replace(options, feature_shape=shape)

  @property
  def num_features(self) -> int:
    """The number of values of an example; 1 where only the data knows."""
    return math.prod(self.feature_shape)

  def check_filled(self) -> None:
    """See `ModelOptions.check_filled`."""
    super().check_filled()
    if not self.feature_shape:
      raise InputError(
        "model.feature_shape=(): () stands for the data's; set it, or load the "
        'data first'
      )


class FeatureModel(Model):
  """A model of examples; subclasses have their options as `options`."""

  reads_features: ClassVar[bool] = True

  @property
  def vocab_size(self) -> int:
    """V, the number of classes."""
    return self.options.vocab_size

  @nn.nowrap
  def example(self, tokens: Int[Array, 'B T']) -> dict[str, Array]:
    """The arguments of a call for as many examples as there are rows."""
    shape = (len(tokens), *self.options.feature_shape)
    return {'features': jnp.zeros(shape, jnp.float32)}

  @nn.nowrap
  def batch_shapes(
    self, batch_size: int, seq_len: int, target_len: int = 0
  ) -> dict[str, jax.ShapeDtypeStruct]:
    """See `Model.batch_shapes`; an example has one class."""
    del seq_len, target_len
    B = batch_size
    column = jax.ShapeDtypeStruct((B, 1), jnp.int32)
    shape = (B, *self.options.feature_shape)
    return {
      'features': jax.ShapeDtypeStruct(shape, jnp.float32),
      'targets': column,
      'segment_ids': column,
      'loss_weights': jax.ShapeDtypeStruct((B, 1), jnp.float32),
    }

  @nn.nowrap
  def layer_trees(self, collection: dict[str, Any]) -> tuple[Any, ...]:
    """See `Model.layer_trees`; no layer is a block."""
    del collection
    return ({},) * self.num_layers

  @nn.nowrap
  def class_scores(self, outputs: Any) -> Float32[Array, 'B V']:
    """The score of each class; larger ones are likelier."""
    raise NotImplementedError
