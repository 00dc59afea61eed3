"""The functions that a run executes on its devices, with their shardings."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax import partitioning
from moe_jax.devices import Placing
from moe_jax.models import Model, lora, trees
from moe_jax.models.recorded import plainly
from moe_jax.runs.summary import Batch, LossSums, StepMetrics
from moe_jax.shapes import Leaf
from moe_jax.training import averages, losses, trainable
from moe_jax.training import step as step_lib
from moe_jax.training.optimizer import is_names
from moe_jax.training.run_options import RunOptions
from moe_jax.training.step import TrainState

Step = Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]


@dataclasses.dataclass(frozen=True)
class Programs:
  """The functions that a run executes on its devices, and what they work on.

  Attributes:
    init_state: () -> the state before the first step, sharded.
    state_of: (parameters) -> the state before the first step with these
      parameters, which are donated.
    abstract_state: Shapes, dtypes and shardings of the state.
    train_step: (state, batch) -> (state, metrics), compiled at first use; the
      state is donated.
    put: Moves batches of numpy arrays to the devices.
    optimizer: The optimizer of the step.
    trained: The parameters that train.
    adapters: The adapters of the model, whose factors are among the parameters.
    variables: (state) -> the variables that the model's `apply` takes: running
      means in place of the parameters if the run keeps means, and adapters
      merged into the kernels; kernels with adapters are new arrays.
  """

  init_state: Callable[[], TrainState]
  state_of: Callable[[Any], TrainState]
  abstract_state: TrainState
  train_step: Step
  put: Placing
  optimizer: optax.GradientTransformation
  trained: trainable.Trained
  adapters: lora.Adapters
  variables: Callable[[TrainState], dict[str, Any]]


def make_programs(options: RunOptions, model: Model, mesh: Mesh) -> Programs:
  """Makes the `Programs` of a run, of which none is compiled yet.

  Args:
    options: The run's options, as `RunOptions.filled` returns them.
    model: The run's model.
    mesh: The devices.
  """
  adapters, trained, optimizer = make_optimizer(options, model)
  router_state = trees.init_router_state(model)

  def model_variables(state):
    means = getattr(state, 'averages', None)
    params = averages.averaged(state.params, means)
    params = adapters.merged_on_devices(params)
    return trees.variables(params, state.router_state)

  rules = options.sharding.rules
  whole = partitioning.sharding(mesh, rules, ())
  rows = partitioning.sharding(mesh, rules, ('batch', None))
  shapes, axes, _ = adapters.trees
  params = partitioning.tree_shardings(mesh, rules, axes, shapes)
  opt_state = jax.eval_shape(optimizer.init, shapes)
  shardings = TrainState(
    step=whole,
    seed=whole,
    params=params,
    opt_state=like_params(mesh, opt_state, shapes, params),
    router_state=jax.tree.map(lambda _: whole, router_state),
  )
  if ema := options.optimizer.ema:
    mean = averages.Averages(whole, trained.part(params))
    shardings = averages.AveragedState(**vars(shardings), averages=mean)

  def state_of(seed, params):
    params = adapters.extend(params, jax.random.key(seed))
    step, opt_state = jnp.zeros((), jnp.int32), optimizer.init(params)
    state = TrainState(step, seed, params, opt_state, router_state)
    return averages.begun(state, ema, trained)

  def init_state(seed):
    params = nn.meta.unbox(trees.init_params(model, jax.random.key(seed)))
    return state_of(seed, params)

  init = jax.jit(init_state, out_shardings=shardings)
  begin = jax.jit(state_of, out_shardings=shardings, donate_argnums=1)
  seed = jnp.asarray(options.seed, jnp.uint32)
  return Programs(
    optimizer=optimizer,
    trained=trained,
    adapters=adapters,
    variables=model_variables,
    init_state=lambda: init(seed),
    state_of=functools.partial(begin, seed),
    abstract_state=init.eval_shape(seed),
    train_step=jax.jit(
      make_step(options, model, adapters, trained, optimizer),
      in_shardings=(shardings, rows),
      out_shardings=(shardings, metrics_shardings(whole, rows)),
      donate_argnums=0,
    ),
    put=Placing(rows, options.batch_size, options.microbatches),
  )


def make_optimizer(
  options: RunOptions, model: Model
) -> tuple[lora.Adapters, trainable.Trained, optax.GradientTransformation]:
  """The adapters of a model, the parameters that train, and their optimizer.

  Args:
    options: The run's options.
    model: Its model.

  Raises:
    ValueError: The option `trainable`, `lora.parts` or a rule of the optimizer
      names a part that the model lacks, or selects nothing; or the file of
      `trained_experts` does not fit.
  """
  adapters = lora.adapt(options.lora, trees.describe(model))
  trained = trainable.trained_by(adapters, options.trainable)
  if options.trained_experts:
    chosen = trainable.read_chosen(options.trained_experts)
    masks = trainable.chosen_masks(chosen, model, adapters.trees, trained.names)
    trained = dataclasses.replace(trained, masks=masks)
  transformation = options.optimizer.transformation(
    options.total_steps,
    trained.part(adapters.matrix_axes, is_leaf=is_names),
    adapters.trees.roles,
    trained.part,
  )
  return adapters, trained, trained.optimizer(transformation)


def make_step(
  options: RunOptions,
  model: Model,
  adapters: lora.Adapters,
  trained: trainable.Trained,
  optimizer: optax.GradientTransformation,
  *,
  change: Callable[..., losses.LossWeights] = lambda weights: weights,
  balance_bias_rate: Leaf | None = None,
  loss: step_lib.Loss | None = None,
) -> Step:
  """Returns a training step, (state, batch) -> (state, metrics), not compiled.

  Args:
    options: The run's options.
    model: Its model.
    adapters: The adapters of the model.
    trained: The parameters that train.
    optimizer: The optimizer of these parameters.
    change: Function from the weights of the losses by the options to those that
      the step uses. By this and the next argument, runs that differ only in
      these numbers can share a compiled step, which gets them as arrays.
    balance_bias_rate: The rate of the routers' balancing bias; None takes that
      of the options.
    loss: Function from the model's outputs and a batch to the losses of tokens;
      None takes the model's own.
  """

  def moved(state, load):
    new = trees.move_router_state(model.stacks, state, load, balance_bias_rate)
    return trained.moved(state, new)

  weights = change(losses.loss_weights(model, options.logits_z_weight))
  options.aux_losses.check(weights)

  def merged(params, key):
    return adapters.merged(trained.stop_gradients(params), key)

  # A replayed run executes the same program as a recorded run.
  is_recorded = options.trace.every_steps or options.model.moe.replay
  step = functools.partial(
    step_lib.train_step,
    grad_fn=step_lib.make_grad_fn(
      model,
      weights,
      options.microbatches,
      trained.part,
      merged,
      options.aux_losses.weights,
      loss,
      options.trace.recording if is_recorded else plainly,
      options.local_axes,
    ),
    normalize=functools.partial(losses.normalizers, model),
    optimizer=optimizer,
    rate=options.optimizer.next_rate(options.total_steps),
    move_router_state=moved,
  )
  step = averages.averaging(step, options.optimizer.ema, trained)
  if options.max_nonfinite_steps:
    step = step_lib.skipping_nonfinite(step)
  return step


def metrics_shardings(whole: Any, rows: Any) -> StepMetrics:
  """The shardings of a step's metrics.

  Choices of experts are split as the batch is; all other metrics are whole on
  every device, as every process reads them.

  Args:
    whole: The sharding of an array that is whole on every device.
    rows: The sharding of a batch's arrays.
  """
  sums = LossSums(*[whole] * len(LossSums._fields))
  metrics = StepMetrics(*[whole] * len(StepMetrics._fields))
  return metrics._replace(sums=sums._replace(choices=rows))


def like_params(mesh: Mesh, state, params, param_shardings):
  """The shardings of an optimizer's state, as a tree like `state`.

  A leaf whose path contains that of a parameter is split like the parameter;
  any other leaf is whole on every device. Moments have the parameter's shape;
  Adafactor's statistics have some of its dimensions, in the same order. So each
  dimension of a leaf is split like the next dimension of the parameter that has
  its size, after the dimension that was found before; without one it is whole.

  Args:
    mesh: The mesh of devices.
    state: The state, or its shapes.
    params: The parameters, or their shapes.
    param_shardings: A tree like `params` of their shardings.
  """
  leaves = jax.tree_util.tree_leaves_with_path(params)
  specs = [sharding.spec for sharding in jax.tree.leaves(param_shardings)]
  dimensions = {
    tuple(map(str, path)): tuple(zip(leaf.shape, spec, strict=True))
    for (path, leaf), spec in zip(leaves, specs, strict=True)
  }

  def sharding_of(path, leaf):
    path = tuple(map(str, path))
    for start, end in itertools.combinations(range(len(path) + 1), 2):
      if path[start:end] in dimensions:
        left = iter(dimensions[path[start:end]])
        spec = [
          next((axes for size, axes in left if size == n), None)
          for n in leaf.shape
        ]
        return NamedSharding(mesh, PartitionSpec(*spec))
    return NamedSharding(mesh, PartitionSpec())

  return jax.tree_util.tree_map_with_path(sharding_of, state)
