"""The cost of a whole run: steps, tokens, FLOPs and bytes, and the least time.

Figures are counted from options and shapes.
"""

import dataclasses
import datetime
import math
from typing import Any, NamedTuple

import jax

from moe_jax import partitioning
from moe_jax.analysis import memory, sharded
from moe_jax.analysis.counts import count, short
from moe_jax.analysis.training_cost import training_cost
from moe_jax.memory_room import in_bytes
from moe_jax.models import Model
from moe_jax.training.evaluation_entries import overridden
from moe_jax.training.programs import Programs
from moe_jax.training.run_options import RunOptions


@dataclasses.dataclass(frozen=True)
class RunCost:
  """The computation of a run.

  Attributes:
    steps: Number of optimizer steps.
    rows: Number of rows of all batches.
    row_tokens: Number of tokens of a row, those of an encoder among them; 0
      where rows are examples without tokens.
    total_params: Number of all parameters.
    active_params: Number of the parameters that compute one token.
    flops: FLOPs of all steps, forward and backward, without those of `remat`,
      of the optimizer, of evaluations and of a teacher; 0 where they are not
      counted.
  """

  steps: int
  rows: int
  row_tokens: int
  total_params: int
  active_params: int
  flops: int

  def describe(self) -> str:
    """The counts in a line."""
    per_step, noun = self.rows // self.steps, 'examples'
    if self.row_tokens:
      per_step, noun = per_step * self.row_tokens, 'tokens'
    line = (
      f'{self.steps:,} steps of {per_step:,} {noun}, '
      f'{short(self.steps * per_step)} in all, with {short(self.total_params)} '
      'parameters'
    )
    if self.active_params < self.total_params:
      line += f', {short(self.active_params)} active per token'
    return line

  def time(self, rate: float) -> str:
    """The FLOPs, and the time that they take, in a clause.

    Args:
      rate: FLOPs a second of a large matrix product on all devices.
    """
    delta = datetime.timedelta(seconds=math.ceil(self.flops / rate))
    return (
      f'{_metric(self.flops)}FLOP take {delta} at the speed of a large matrix '
      f'product here and now, {_metric(rate)}FLOP/s; a small model often takes '
      'several times that, and compiling and evaluations come on top'
    )


def run_cost(options: RunOptions, model: Model) -> RunCost:
  """Counts the cost of a run.

  Args:
    options: The options of the run, after `filled`.
    model: Its model.
  """
  steps, rows = options.total_steps, options.total_steps * options.batch_size
  lengths = options.data.seq_len, options.data.target_len
  cost = count(model, *lengths, options.batch_size)
  flops = 3 * rows * cost.example_flops
  if len(model.stacks) == 1:
    training = training_cost(options, model)
    row_flops = cost.example_flops + lengths[0] * training.backward_flops
    flops = rows * row_flops + steps * training.step_flops
  return RunCost(
    steps=steps,
    rows=rows,
    row_tokens=sum(lengths),
    total_params=cost.total_params,
    active_params=cost.active_params,
    flops=flops,
  )


class RunBytes(NamedTuple):
  """Bytes that a run takes on each device, and those of a checkpoint.

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
  options: RunOptions, model: Model, programs: Programs, mesh: jax.sharding.Mesh
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
  if model.stacks:
    num_parts = partitioning.row_parts(mesh, options.sharding.rules)
    rows = -(-options.shape().rows // num_parts)
    lengths = options.data.seq_len, options.data.target_len
    activations = sum(memory.activations(model, rows, *lengths))
    entry_models = {
      overridden(options.model, entry)[0].build(options.sharding.rules)
      for entry in options.evals.values()
    }
    if entry_models:
      evaluation = sharded.held_by_evaluations(programs) + max(
        memory.evaluation(changed, rows, *lengths) for changed in entry_models
      )
  return RunBytes(
    parameters=sharded.device_bytes(state.params),
    optimizer=sharded.device_bytes(state.opt_state),
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
