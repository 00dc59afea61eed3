"""Full-batch gradient descent on many small mixtures at once.

All runs of a system are one compiled program, which trains the seeds in
parallel and the learning rates one after the other: a rate ends as soon as all
of its seeds have stopped. A run stops where its training error reaches the
criterion, and keeps the weights that it has there. Not here: which systems
there are and what their epochs mean (`experiments/jacobs_table1.py`), which
runs are one program (`jacobs_runner.py`), or what else is measured
(`jacobs_measures.py`).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments.origins_1991.jacobs_problems import Problem
from moe_jax.models.adaptive import (
  LOSSES,
  AdaptiveMixture,
  AdaptiveOutputs,
)

# Number of epochs between two checks of whether any run has to go on.
CHUNK = 50


class Runs(NamedTuple):
  """The outcome of [R, S] runs, for R learning rates and S seeds.

  Attributes:
    epochs: Number of updates until the criterion was reached, int [R, S]; the
      largest number allowed where it was not.
    reached: Whether the criterion was reached, bool [R, S].
    params: Weights where the run stopped, a tree of [R, S, ...].
  """

  epochs: Any
  reached: Any
  params: Any

  def at(self, i: int):
    """The weights of all seeds at the i-th rate: a tree of [S, ...]."""
    return jax.tree.map(lambda leaf: leaf[i], self.params)


@functools.partial(jax.jit, static_argnames='model')
def start(model: AdaptiveMixture, features, seeds):
  """Initial weights of the runs of all seeds, a tree of [S, ...]."""

  def one(seed):
    key = jax.random.fold_in(jax.random.key(1991), seed)
    return nn.meta.unbox(model.init(key, features[:1])['params'])

  return jax.vmap(one)(seeds)


def forward(model: AdaptiveMixture, params, features) -> AdaptiveOutputs:
  """Outputs of a model with one run's weights, for all cases."""
  return model.apply({'params': params}, jnp.asarray(features))[0]


def squared_error(outputs: AdaptiveOutputs, targets):
  """Squared error of the mixture's outputs, which the criterion bounds."""
  return jnp.mean(jnp.sum((targets - outputs.prediction) ** 2, axis=-1))


def _epoch(model, cases, error, rate, state):
  """One update of a run, unless it has reached the criterion.

  Args:
    model: The system.
    cases: Training cases.
    error: Squared error at which the run stops.
    rate: Learning rate.
    state: The weights, the number of updates, and whether the run has stopped.
  """
  params, epochs, reached = state

  def loss(params):
    outputs = forward(model, params, cases.features)
    errors = LOSSES[model.options.adaptive.loss](
      outputs.expert_outputs, outputs.gate_logits, cases.targets
    )
    return jnp.mean(errors), squared_error(outputs, cases.targets)

  gradients, squared = jax.grad(loss, has_aux=True)(params)
  reached = reached | (squared <= error)
  step = jnp.where(reached, 0.0, rate)
  params = jax.tree.map(lambda p, g: p - step * g, params, gradients)
  return params, epochs + ~reached, reached


@functools.partial(jax.jit, static_argnames=('model', 'most', 'patience'))
def _train(model, params, cases, error, rates, most, patience):
  def at(least, rate):
    train_epoch = jax.vmap(functools.partial(_epoch, model, cases, error, rate))

    def chunk(carry):
      epochs, state = carry
      state, _ = jax.lax.scan(
        lambda state, _: (train_epoch(state), None), state, length=CHUNK
      )
      return epochs + CHUNK, state

    def goes_on(carry):
      epochs, (_, _, reached) = carry
      patient = epochs < patience * least if patience else True
      return patient & (epochs < most) & ~jnp.all(reached)

    S = jax.tree.leaves(params)[0].shape[0]
    state = params, jnp.zeros(S, jnp.int32), jnp.zeros(S, bool)
    _, state = jax.lax.while_loop(goes_on, chunk, (0, state))
    _, epochs, reached = state
    slowest = jnp.where(jnp.all(reached), jnp.max(epochs), most)
    return jnp.minimum(least, slowest), state

  return jax.lax.scan(at, jnp.int32(most), rates)[1]


def train(
  model: AdaptiveMixture,
  problem: Problem,
  rates: Sequence[float],
  seeds: Sequence[int],
  max_epochs: int,
  patience: int = 0,
) -> Runs:
  """Trains a system with every learning rate and seed.

  A seed has the same initial weights at every rate. `patience` shortens the
  search for the best rate (`jacobs_rows.best_rate`). It does not change the
  answer if it is at least the number of seeds: a rate that is given up then has
  more epochs in the mean than an earlier one at which all seeds arrived.

  Args:
    model: The system.
    problem: The problem that is learned.
    rates: Learning rates, for the mean loss over cases.
    seeds: Seeds of the initial weights.
    max_epochs: Number of epochs after which a run is given up, rounded up to
      whole `CHUNK`s.
    patience: Bound on the epochs at a rate, as a multiple of the epochs of the
      slowest seed at an earlier rate at which all seeds reached the criterion;
      0 sets no such bound.
  """
  params, epochs, reached = _train(
    model,
    start(model, problem.train.features, jnp.array(seeds)),
    problem.train,
    problem.error,
    jnp.asarray(rates, jnp.float32),
    max_epochs,
    patience,
  )
  most = -(-max_epochs // CHUNK) * CHUNK
  epochs, reached = np.asarray(epochs), np.asarray(reached)
  return Runs(np.where(reached, epochs, most), reached, params)


@functools.partial(jax.jit, static_argnames=('model', 'every', 'count'))
def _path(model, params, cases, rate, every, count):
  nothing = jnp.zeros((), jnp.int32), jnp.zeros((), bool)

  def train_epochs(params, _):
    train_epoch = functools.partial(_epoch, model, cases, -1.0, rate)
    state = jax.lax.fori_loop(
      0, every, lambda _, state: train_epoch(state), (params, *nothing)
    )
    return state[0], params

  last, before = jax.lax.scan(train_epochs, params, length=count)
  return jax.tree.map(
    lambda stack, end: jnp.concatenate([stack, end[None]]), before, last
  )


def path(
  model: AdaptiveMixture,
  problem: Problem,
  rate: float,
  seed: int,
  *,
  every: int,
  count: int,
):
  """The weights of one run over time; it does not stop at the criterion.

  Args:
    model: The system.
    problem: The problem that is learned.
    rate: Learning rate.
    seed: Seed of the initial weights.
    every: Number of epochs between two sets of weights.
    count: Number of sets of weights after the initial ones.

  Returns:
    The initial weights and those after every `every` epochs, a tree of
    [count + 1, ...].
  """
  first = jax.tree.map(
    lambda a: a[0], start(model, problem.train.features, jnp.array([seed]))
  )
  return _path(model, first, problem.train, rate, every, count)
