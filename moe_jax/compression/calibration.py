"""Calibration: the tokens that reach the experts of a model on batches."""

import functools
from collections.abc import Mapping
from typing import Any, cast

import flax.struct
import jax
from flax import linen as nn

from moe_jax import data
from moe_jax.compression.whole_run import WholeRun
from moe_jax.errors import InputError
from moe_jax.layers.experts import Experts
from moe_jax.models import Model
from moe_jax.routing import AnyRouting
from moe_jax.shapes import Array, Leaf

_SOWN_NAME = 'reached'


class RoutedTokens(flax.struct.PyTreeNode):
  """The tokens that reach a sparse layer, and where its router sends them.

  Attributes:
    x: float [G, S, M], the inputs of the experts, of the type of products.
    routing: The routing of these groups.
  """

  x: Array
  routing: AnyRouting


def batches(
  run: WholeRun, num_batches: int, options: data.DataOptions | None = None
) -> list[dict[str, Any]]:
  """Batches of the training split, as a run of seed 0 reads them at its start.

  No batch of another split is among them, so measures on those stay honest.

  Args:
    run: The run; the batches have its batch size.
    num_batches: The number of batches, at least 1.
    options: The options of the data; None takes those of the run.

  Raises:
    ValueError: `num_batches` is below 1, or the tokens or tasks of the data
      are not those that the run was trained on.
  """
  if num_batches < 1:
    raise InputError(f'num_batches={num_batches} must be at least 1')
  dataset = run.load_data(options or run.options.data)
  stream = data.train_batches(
    dataset.splits['train'],
    batch_size=run.options.batch_size,
    seed=0,
    start=0,
  )
  return [next(stream) for _ in range(num_batches)]


@functools.partial(jax.jit, static_argnames='model')
def capture(
  model: Model, variables: Mapping[str, Any], batch: Mapping[str, Leaf]
) -> dict[int, RoutedTokens]:
  """The tokens that reach each sparse layer of a model, by layer number.

  Dropout and noise are off.

  Args:
    model: The model.
    variables: Its variables.
    batch: A batch of its data.
  """

  def sow_tokens(call, args, kwargs, context):
    module = context.module
    if isinstance(module, Experts) and context.method_name == '__call__':
      tokens = RoutedTokens(*args[:2])
      module.sow('intermediates', _SOWN_NAME, tokens)
    return call(*args, **kwargs)

  with nn.intercept_methods(sow_tokens):
    _, collections = model.apply(
      variables, **model.inputs(batch), mutable=['intermediates']
    )
  layers = model.layer_trees(collections['intermediates'])
  return {
    i: cast(RoutedTokens, _outermost(layers[i])) for i in model.sparse_layers
  }


def _outermost(tree: Mapping[str, Any]) -> RoutedTokens | None:
  """The sown value of the outermost module of a layer that has one."""
  if _SOWN_NAME in tree:
    return tree[_SOWN_NAME][0]
  inner = (
    _outermost(subtree)
    for subtree in tree.values()
    if isinstance(subtree, Mapping)
  )
  return next((tokens for tokens in inner if tokens is not None), None)
