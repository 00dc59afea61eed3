"""The cost of a run, whole or in part: steps, tokens, FLOPs, bytes, least time.

Figures are counted from options and shapes. For each token the backward pass
has two kinds of products with the gradients of kernels' outputs: with every
kernel, which gives the gradients of inputs (also below the lowest layer that
trains, as layers are scanned), and with the inputs of every kernel whose own
gradient is needed.
"""

import dataclasses
import datetime
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from moe_jax import partitioning
from moe_jax.analysis import memory, roofline, sharded
from moe_jax.analysis.counts import count, short
from moe_jax.devices import in_bytes
from moe_jax.errors import InputError
from moe_jax.layers.experts import ROLE as EXPERT
from moe_jax.layers.parameters import Role
from moe_jax.layers.shared import Numerics
from moe_jax.models import Model, lora
from moe_jax.models.lora import Adapters, LoraOptions
from moe_jax.models.trees import flatten
from moe_jax.training.averages import kept_by_optimizer
from moe_jax.training.programs import Programs, make_optimizer
from moe_jax.training.run_options import RunOptions

_OUTSIDE = ('embedding', 'head')


class TrainingCost(NamedTuple):
  """The cost of training some parameters.

  Attributes:
    trained_params: Number of the parameters that train.
    optimizer_bytes: Bytes of the state of the optimizer.
    gradient_bytes: Bytes of the gradients that are computed; with adapters,
      these include the gradients of the adapted kernels.
    backward_flops: FLOPs of the backward pass for a token. Elementwise
      operations, the optimizer's, and what `remat` computes again are not
      counted.
    step_flops: FLOPs of a step that do not grow with its tokens: the products
      of adapters' factors, and the gradients of these products.
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
  if (num_stacks := len(model.stacks.blocks)) != 1:
    raise InputError(
      f'{type(model).__name__} has {num_stacks} stacks of blocks; the backward '
      'pass is counted of models with one'
    )
  adapters, trained, optimizer = make_optimizer(options, model)
  shapes = adapters.trees.shapes
  state = jax.eval_shape(optimizer.init, shapes)
  trained_part = flatten(trained.part(shapes))
  leaves = {path: x for path, x in trained_part.items() if x is not None}
  grad_leaves = {path: x for path, x in leaves.items() if path[0] != lora.TREE}
  means = 4 * sum(x.size for x in leaves.values())  # float32
  flat_shapes = flatten(shapes)
  grad_leaves |= {path: flat_shapes[path] for path in adapters.kernels}
  factors = sum(math.prod(x.shape) for x in adapters.kernels.values())
  return TrainingCost(
    trained_params=trained.count(trained.part(shapes)),
    optimizer_bytes=_bytes(state) + means * bool(options.optimizer.ema),
    gradient_bytes=_bytes({**leaves, **grad_leaves}),
    backward_flops=_backward_flops(options, model, grad_leaves, adapters),
    # A B, and the gradients of A and of B.
    step_flops=3 * 2 * adapters.options.rank * factors,
  )


def variants(options: RunOptions, model: Model):
  """The options of a run for each usual choice of what trains, by name."""
  sparse = bool(model.stacks.sparse_layers)
  plain = dataclasses.replace(
    options, trainable='all', trained_experts='', lora=LoraOptions()
  )
  for name in ('all', *(('experts', 'non_experts') if sparse else ())):
    yield name, dataclasses.replace(plain, trainable=name)
  for roles in ('attention', 'attention + ' + ('experts' if sparse else 'ffn')):
    lora_options = LoraOptions(rank=16, parts=roles)
    name = f'LoRA of rank 16, {roles}'
    yield name, dataclasses.replace(plain, lora=lora_options)


def _backward_flops(
  options: RunOptions,
  model: Model,
  grad_leaves: Mapping[tuple[str, ...], Any],
  adapters: Adapters,
) -> int:
  """FLOPs of the backward pass for a token, with gradients of some leaves.

  `grad_leaves` has the parameters whose gradients are computed, by path.
  """
  roles: dict[tuple[str, ...], Role] = flatten(adapters.trees.roles)
  axes = flatten(adapters.trees.axes)
  flops = count(model, options.data.seq_len).decoder
  logits = 2 * model.vocab_size * model.embedding.width
  total, moe = 0, model.stacks.moe
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


def run_flops(options: RunOptions, model: Model) -> int:
  """FLOPs of all steps of a run, forward and backward; 0 if not counted.

  The FLOPs of `remat`, the optimizer, evaluations and a teacher are left out.

  Args:
    options: The options of the run, after `filled`.
    model: Its model.
  """
  steps, rows = options.total_steps, options.total_steps * options.batch_size
  lengths = options.data.seq_len, options.data.target_len
  forward = count(model, *lengths, options.batch_size).example_flops
  if len(model.stacks.blocks) != 1:
    return 3 * rows * forward
  training = training_cost(options, model)
  row_flops = forward + lengths[0] * training.backward_flops
  return rows * row_flops + steps * training.step_flops


def run_line(options: RunOptions, model: Model, mesh: Mesh) -> str:
  """A line on a run's size and least time; times a device's matrix products.

  Args:
    options: The options of the run, after `filled`.
    model: Its model.
    mesh: Its devices.
  """
  steps, row_tokens = options.total_steps, options.data.row_tokens
  noun = 'tokens' if row_tokens else 'examples'
  per_step = options.batch_size * (row_tokens or 1)
  cost = count(model, options.data.seq_len, options.data.target_len)
  line = (
    f'run: {steps:,} steps of {per_step:,} {noun}, {short(steps * per_step)} '
    f'in all, with {short(cost.total_params)} parameters'
  )
  if cost.active_params < cost.total_params:
    line += f', {short(cost.active_params)} active per token'
  if not (flops := run_flops(options, model)):
    return line
  dtype = getattr(options.model, 'numerics', Numerics()).dtype
  rate, _ = roofline.product_rate(dtype)
  rate *= roofline.num_processors(list(mesh.devices.flat))
  delta = datetime.timedelta(seconds=math.ceil(flops / rate))
  return (
    f'{line}; {_metric(flops)}FLOP take {delta} at the speed of a large matrix '
    f'product here and now, {_metric(rate)}FLOP/s; a small model often takes '
    'several times that, and compiling and evaluations come on top'
  )


class RunBytes(NamedTuple):
  """Bytes that a run takes on each device, and the bytes of a checkpoint.

  Attributes:
    parameters: Bytes of the parameters on a device.
    optimizer: Bytes of the optimizer's state on a device.
    gradients: Bytes of the gradients of trained parameters, on a device.
    activations: Bytes that the forward pass of a microbatch leaves for the
      backward pass, by formula; 0 where they are not counted.
    evaluation: Bytes on a device in the evaluation that needs most: parameters,
      the optimizer's state, and activations of a microbatch, by formula.
    checkpoint: Bytes of a checkpoint, of all devices together.
  """

  parameters: int
  optimizer: int
  gradients: int
  activations: int
  evaluation: int
  checkpoint: int

  @property
  def step(self) -> int:
    """Bytes on a device in a step."""
    return sum(self[:4])

  @property
  def total(self) -> int:
    """Bytes on a device in a step or an evaluation, whichever needs more."""
    return max(self.step, self.evaluation)

  def describe(self) -> str:
    """The bytes on a device in a line."""
    names = ('parameters', 'optimizer state', 'gradients', 'activations')
    phrases = [f'{in_bytes(n)} of {name}' for name, n in zip(names, self) if n]
    line = f'{", ".join(phrases)}: about {in_bytes(self.step)} on each device'
    if self.evaluation:
      line += f', {in_bytes(self.evaluation)} in the largest evaluation'
    return line


def run_bytes(
  options: RunOptions, model: Model, programs: Programs, mesh: Mesh
) -> RunBytes:
  """Counts the bytes of a run.

  Args:
    options: The options of the run, after `filled`.
    model: Its model.
    programs: Its programs.
    mesh: The devices.
  """
  state = programs.abstract_state
  activations = evaluation = 0
  if model.stacks.blocks:
    num_parts = partitioning.row_parts(mesh, options.sharding.rules)
    rows = -(-options.shape().rows // num_parts)
    lengths = options.data.seq_len, options.data.target_len
    activations = sum(memory.activations(model, rows, *lengths))
    entry_models = {
      entry.overridden(options.model).build(options.sharding.rules)
      for entry in options.evals.values()
    }
    if entry_models:
      evaluation = sharded.held_by_evaluations(programs) + max(
        memory.evaluation(changed, rows, *lengths) for changed in entry_models
      )
  return RunBytes(
    parameters=sharded.device_bytes(state.params),
    optimizer=sharded.device_bytes(kept_by_optimizer(state)),
    gradients=sharded.device_bytes(programs.trained.part(state.params)),
    activations=activations,
    evaluation=evaluation,
    checkpoint=_bytes(state),
  )


def _bytes(tree: Any) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _metric(n: float) -> str:
  """A number of operations with its prefix: 15.8e9 is '15.8 G'."""
  text = short(n).replace('B', 'G')
  return f'{text[:-1]} {text[-1]}' if text[-1].isalpha() else f'{text} '
