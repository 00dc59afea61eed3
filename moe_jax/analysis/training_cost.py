"""The cost of training a part of a model, counted from shapes and options.

Nothing is allocated. The backward pass multiplies, for each token, gradients of
outputs with every kernel of all layers (also where only upper layers train, as
layers are scanned), and with the inputs of every kernel whose gradient is
needed.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax

from moe_jax import models
from moe_jax.analysis.counts import count
from moe_jax.errors import InputError
from moe_jax.layers.experts.serving import ROLE as EXPERT
from moe_jax.layers.parameters import Names, Role
from moe_jax.models import Model, flat_trees, lora
from moe_jax.models.lora import Adapters, LoraOptions
from moe_jax.training.programs import make_optimizer
from moe_jax.training.run_options import RunOptions

_OUTSIDE = ('embedding', 'head')


class TrainingCost(NamedTuple):
  """The cost of training some parameters.

  Attributes:
    trained_params: Number of the parameters that train.
    optimizer_bytes: Bytes of the state of the optimizer.
    gradient_bytes: Bytes of the gradients that are computed: with adapters,
      those of the adapted kernels, too.
    backward_flops: FLOPs of the backward pass for a token. Elementwise
      operations, the optimizer's, and what `remat` computes again are not
      counted.
    step_flops: FLOPs of a step that do not grow with its tokens: those of the
      products of adapters' factors, and of their gradients.
  """

  trained_params: int
  optimizer_bytes: int
  gradient_bytes: int
  backward_flops: int
  step_flops: int


def training_cost(options: RunOptions, model: Model) -> TrainingCost:
  """Counts the cost of training what a run's options select.

  Args:
    options: The options of the run, after `filled`.
    model: Its model, of one stack of blocks.

  Raises:
    ValueError: The model has two stacks or none, or the options select a part
      that it lacks.
  """
  if len(model.stacks) != 1:
    raise InputError(
      f'{type(model).__name__} has {len(model.stacks)} stacks of blocks; the '
      'backward pass is counted of models with one'
    )
  adapters = lora.adapt(options.lora, models.describe(model))
  trained, optimizer = make_optimizer(options, model)
  shapes = adapters.trees.shapes
  state = jax.eval_shape(optimizer.init, shapes)
  trained_part = flat_trees.flatten(trained.part(shapes))
  leaves = {path: x for path, x in trained_part.items() if x is not None}
  grad_leaves = {path: x for path, x in leaves.items() if path[0] != lora.TREE}
  flat_shapes = flat_trees.flatten(shapes)
  grad_leaves |= {path: flat_shapes[path] for path in adapters.kernels}
  gradients = [*{**leaves, **grad_leaves}.values()]
  return TrainingCost(
    trained_params=trained.count(trained.part(shapes)),
    optimizer_bytes=_bytes(jax.tree.leaves(state)),
    gradient_bytes=_bytes(gradients),
    backward_flops=_backward_flops(
      options,
      model,
      grad_leaves,
      flat_trees.flatten(adapters.trees.roles),
      flat_trees.flatten(adapters.trees.axes),
    ),
    step_flops=_factor_flops(adapters),
  )


def variants(options: RunOptions, model: Model, rank: int = 16):
  """The usual choices of what trains, by name, as options of a run.

  Args:
    options: The options of the run.
    model: Its model.
    rank: Rank of adapters.
  """
  sparse = bool(model.sparse_layers)
  plain = dataclasses.replace(
    options, trainable='all', trained_experts='', lora=LoraOptions()
  )
  for name in ('all', *(('experts', 'non_experts') if sparse else ())):
    yield name, dataclasses.replace(plain, trainable=name)
  for roles in ('attention', 'attention + ' + ('experts' if sparse else 'ffn')):
    lora_options = LoraOptions(rank=rank, parts=roles)
    name = f'LoRA of rank {rank}, {roles}'
    yield name, dataclasses.replace(plain, lora=lora_options)


def _backward_flops(
  options: RunOptions,
  model: Model,
  grad_leaves: dict[tuple[str, ...], Any],
  roles: dict[tuple[str, ...], Role],
  axes: dict[tuple[str, ...], Names],
) -> int:
  """FLOPs of the backward pass for a token, with gradients of these leaves."""
  flops = count(model, options.data.seq_len).decoder
  logits = 2 * model.vocab_size * model.embedding.width
  total, moe = 0, model.moe
  for path, leaf in grad_leaves.items():
    if roles[path].form == 'kernel':
      share = 1.0
      if roles[path].role == EXPERT and moe is not None:
        share = moe.num_selected / leaf.shape[axes[path].index(EXPERT)]
      total += round(2 * math.prod(leaf.shape) * share)
  tables = [path for path in grad_leaves if roles[path].role == 'embedding']
  is_tied = not any(role == Role('head', 'kernel') for role in roles.values())
  if tables and is_tied:  # the table is the kernel of the logits, too
    total += logits
  if tables or any(roles[path].role not in _OUTSIDE for path in grad_leaves):
    total += flops.total + flops.attention
  return total


def _factor_flops(adapters: Adapters) -> int:
  """FLOPs of A B, and of the gradients of A and of B, in a step."""
  rank = adapters.options.rank
  sizes = (math.prod(kernel.shape) for kernel in adapters.kernels.values())
  return 3 * 2 * rank * sum(sizes)


def _bytes(leaves) -> int:
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
