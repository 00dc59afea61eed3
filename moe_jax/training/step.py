"""The train state, and the pure functions of a training step.

The step is `train_step(state, batch) -> (state, metrics)`. Optional behaviour
wraps the gradient function or the step, which itself has no branch.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from moe_jax.models import Model
from moe_jax.models.base import TokenLosses
from moe_jax.models.recorded import Apply, plainly
from moe_jax.models.trees import variables as as_variables
from moe_jax.runs import finite
from moe_jax.runs.summary import Batch, LossSums, StepMetrics
from moe_jax.shapes import Array, Leaf, PRNGKey
from moe_jax.training import losses


class TrainState(flax.struct.PyTreeNode):
  """The state of training; its `step` decides which batch of data comes next.

  Attributes:
    step: int32 [], number of optimizer steps taken.
    seed: uint32 [], seed of all randomness; it is an array, so that runs that
      differ only in it share a compiled step.
    params: The parameters, unboxed: the model's, and those of adapters.
    opt_state: The optimizer's state.
    router_state: State of routers besides their parameters; {} if there is
      none.
  """

  step: Leaf
  seed: Leaf
  params: Any
  opt_state: Any
  router_state: Any = flax.struct.field(default_factory=dict)


# (state, load [L, E]) -> state
MoveRouterState = Callable[[Any, Array], Any]
# (params, batch, whole batch's normalisers, key, router_state, step) ->
# ((loss, sums), gradient)
GradFn = Callable[..., tuple[tuple[Array, LossSums], Any]]
# (weights of losses, number of steps taken) -> the weights of the next step.
Scheduled = Callable[[losses.LossWeights, Leaf], losses.LossWeights]
# (outputs, batch) -> the loss of each token.
Loss = Callable[[Any, Batch], TokenLosses]


def make_grad_fn(
  model: Model,
  weights: losses.LossWeights,
  microbatches: int = 1,
  part: Callable[[Any], Any] = lambda params: params,
  merged: Callable[[Any, PRNGKey], Any] = lambda params, key: params,
  scheduled: Scheduled = lambda weights, step: weights,
  loss: Loss | None = None,
  apply: Apply = plainly,
  local_axes: tuple[str, ...] = (),
) -> GradFn:
  """Returns a function for the loss, sums and gradient over all microbatches.

  Its arguments are parameters, batch, normalisers of the whole batch, random
  key, routers' state and step; its result is ((loss, sums), gradient).

  Args:
    model: The model.
    weights: The weights of the losses.
    microbatches: The number of slices of the batch.
    part: Returns the parameters that train; no gradient of any other parameter
      is computed, and None stands in its place.
    merged: Returns the parameters that the model computes with, such as
      kernels with their adapters, from those of the train state and a key for
      dropout.
    scheduled: Function from `weights` and the number of optimizer steps taken
      to the weights of the next step.
    loss: Returns the losses of tokens from the model's outputs and the batch;
      None takes the model's own.
    apply: Function from the model, its variables and its inputs to its result
      and the choices of experts, or None in place of the choices.
    local_axes: The mesh axes over which gradients are exchanged once, after
      each device has added those of its own rows of all microbatches; with ()
      they are exchanged after each microbatch.
  """
  loss = loss or model.loss
  model = model.with_deferred_logits()

  def loss_fn(part, params, batch, divisors, key, router_state, step):
    params = changed(part, params, lambda trained_leaf, _: trained_leaf)
    router_key, dropout_key = jax.random.split(key)
    (outputs, aux), choices = apply(
      model,
      as_variables(merged(params, dropout_key), router_state),
      **model.inputs(batch),
      train=True,
      rngs={'router': router_key, 'dropout': dropout_key},
    )
    with jax.named_scope('loss'):
      sums = losses.loss_sums(loss(outputs, batch), batch, aux)
      total = losses.total_loss(sums, divisors, scheduled(weights, step))
    return total, sums._replace(choices=choices)

  def of_batch(batch, params, *rest):
    function = jax.value_and_grad(loss_fn, has_aux=True)
    return function(part(params), params, batch, *rest)

  # Every slice's loss is divided by the whole batch's normalisers, so that the
  # sum is the whole batch's loss, auxiliary losses included.
  def accumulated(axes, batch, params, divisors, key, *rest):
    for axis in axes:
      key = jax.random.fold_in(key, jax.lax.axis_index(axis))

    def of_slice(index, batch_slice):
      slice_key = jax.random.fold_in(key, index)
      arguments = batch_slice, params, divisors, slice_key, *rest
      (loss, sums), grads = of_batch(*arguments)
      return ((loss, sums._replace(choices=None)), grads), sums.choices

    total, choices = over_slices(of_slice, batch, microbatches)
    return jax.lax.psum(total, axes) if axes else total, choices

  def grad_fn(params, batch, divisors, key, router_state=None, step=0):
    arguments = batch, params, divisors, key, router_state, step
    if microbatches == 1:
      return of_batch(*arguments)
    mesh = jax.typeof(jax.tree.leaves(params)[0]).sharding.mesh
    # The compiler refuses exchanges within a map over axes of one device.
    axes = tuple(axis for axis in local_axes if mesh.shape.get(axis, 1) > 1)
    function = functools.partial(accumulated, axes)
    if axes:
      # Without `shard_map` the compiler would exchange the gradient of each
      # microbatch. Within it each device computes its own rows along these
      # mesh axes; along all other mesh axes arrays stay global.
      rows = PartitionSpec(axes)
      function = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(rows, *[PartitionSpec()] * 5),
        out_specs=(PartitionSpec(), rows),
        axis_names=set(axes),
        check_vma=False,
      )
    ((loss, sums), grads), choices = function(*arguments)
    return (loss, sums._replace(choices=choices)), grads

  return grad_fn


def changed(part: Any, params: Any, change: Callable[[Any, Any], Any]) -> Any:
  """The parameters, some of them changed.

  Args:
    part: A tree like the parameters, with None for those that stay.
    params: The parameters.
    change: Function from a leaf of `part` and its parameter to a new parameter.
  """
  return jax.tree.map(
    lambda leaf, param: param if leaf is None else change(leaf, param),
    part,
    params,
    is_leaf=lambda leaf: leaf is None,
  )


def over_slices(
  function: Callable[[Leaf, Batch], tuple[Any, Any]], batch: Batch, n: int
) -> tuple[Any, Any]:
  """Computes a batch slice by slice; returns the sums and the joined rows.

  Args:
    function: Returns, from the index of a slice and the slice, a tree of sums,
      which are added, and a tree of arrays whose first dimension counts the
      slice's rows (sequences), which are joined in order.
    batch: The batch.
    n: The number of slices.
  """
  if n == 1:
    return function(0, batch)
  slices = jax.tree.map(
    lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), batch
  )

  def add_slice(total, numbered_slice):
    sums, rows = function(*numbered_slice)
    return jax.tree.map(jnp.add, total, sums), rows

  first_slice = jax.tree.map(lambda x: x[0], slices)
  shapes, _ = jax.eval_shape(function, 0, first_slice)
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, _sum_dtype(s)), shapes)
  total, rows = jax.lax.scan(add_slice, zeros, (jnp.arange(n), slices))
  return total, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)


def _sum_dtype(leaf: jax.ShapeDtypeStruct) -> jnp.dtype:
  """The type in which a leaf is summed: for floating point at least float32.

  In bfloat16 a summand much smaller than the sum would be lost.
  """
  is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
  return jnp.promote_types(leaf.dtype, jnp.float32) if is_float else leaf.dtype


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  grad_fn: GradFn,
  normalize: Callable[[Batch], losses.Normalizers],
  optimizer: optax.GradientTransformation,
  rate: Callable[[Any], Leaf],
  move_router_state: MoveRouterState = lambda router_state, load: router_state,
) -> tuple[TrainState, StepMetrics]:
  """Takes one optimizer step; returns the state after it, and its metrics.

  The random key of the step depends on `state.seed` and `state.step` alone.

  Args:
    state: The state before the step.
    batch: The global batch.
    grad_fn: Function from `make_grad_fn`.
    normalize: Function from a batch to its normalisers.
    optimizer: The optimizer.
    rate: Function from the optimizer's state to the learning rate of its next
      update; only for the metrics.
    move_router_state: Function from the routers' state and the load [L, E] of
      the whole batch to the routers' next state.
  """
  key = jax.random.fold_in(jax.random.key(state.seed), state.step)
  divisors = normalize(batch)
  (loss, sums), grads = grad_fn(
    state.params, batch, divisors, key, state.router_state, state.step
  )
  with jax.named_scope('optimizer'):
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = changed(
      updates, state.params, lambda update, x: optax.apply_updates(x, update)
    )
  load = sums.aux.stats.load  # [L, E], of all groups and microbatches
  router_state = move_router_state(state.router_state, load)
  new = TrainState(state.step + 1, state.seed, params, opt_state, router_state)
  grad_norm = optax.global_norm(grads)
  learning_rate = jnp.asarray(rate(state.opt_state), jnp.float32)
  flags = finite.flags(finite.without_opt_state(new))
  return new, StepMetrics(loss, sums, grad_norm, learning_rate, flags)


def skipping_nonfinite(train_step):
  """Wraps a step (state, batch) -> (state, metrics) to skip non-finite steps.

  A step is finite if its loss, its gradient and the state after it are. After
  any other step the state is the state before it.

  The state's `step` is counted all the same, so that the next step has other
  data and another key. Counts within the optimizer's state (the schedule's and
  Adam's step) do not go on.
  """

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
    new, metrics = train_step(state, batch)
    numbers = jnp.stack([metrics.loss, metrics.grad_norm])
    good = jnp.isfinite(numbers).all() & metrics.finite.all()
    next_state = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)
    return next_state.replace(step=new.step), metrics

  return step
