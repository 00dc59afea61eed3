"""Full-batch gradient descent on many small mixtures at once.

All seeds of a system are one compiled program, and so are its learning rates,
one after the other: a rate at which every seed is done costs no more epochs.
A run stops where its training error reaches the criterion, and keeps the
weights that it has there. Not here: which systems there are and what their
epochs mean (`jacobs_table1.py`).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from moe_jax.data import ClassSource
from moe_jax.models.adaptive import (
  LOSSES,
  AdaptiveConfig,
  AdaptiveMixture,
  AdaptiveOutputs,
)

CHUNK = 50  # epochs between two looks at who is still running
TARGETS = ('pairs', 'one_hot')


class Cases(NamedTuple):
  """Cases of one split.

  Attributes:
    features: float32 [N, M].
    targets: float32 [N, V].
    labels: int32 [N], the classes that the targets are made of.
  """

  features: Any
  targets: Any
  labels: Any


@dataclasses.dataclass(frozen=True)
class Problem:
  """What is to be learned.

  Attributes:
    train: To learn from.
    test: To be asked about at the end.
    expert_output: See `AdaptiveConfig`.
    error: The criterion: the mean over training cases of the squared error of
      the blend, ||d - y||^2, at which a run stops.
    classes: Their names.
    says: What a target is, for people.
  """

  train: Cases
  test: Cases
  expert_output: str
  error: float
  classes: tuple[str, ...]
  says: str

  def config(self, **options) -> AdaptiveConfig:
    """A mixture for it."""
    return AdaptiveConfig(
      self.train.targets.shape[-1],
      self.train.features.shape[1:],
      expert_output=self.expert_output,
      **options,
    )


def problem(source: ClassSource, targets: str) -> Problem:
  """The source's classes as targets of one of two kinds.

  - 'pairs': one logistic output, 0 for the first and third class and 1 for
    the second and fourth, until an error of 0.08.
  - 'one_hot': a softmax over classes, until 0.16, for a softmax of two errs
    in both its outputs where a logistic output errs in one.

  Raises:
    ValueError: Neither, or 'pairs' of classes that are not four.
  """
  if targets not in TARGETS:
    raise ValueError(f'targets={targets!r} not in {list(TARGETS)}')
  if targets == 'pairs' and len(source.classes) != 4:
    raise ValueError(
      f"targets='pairs' are of four classes; {source.name} has "
      f"{len(source.classes)}; use 'one_hot'"
    )

  def cases(split: str) -> Cases:
    features, labels = source.examples(split)
    wanted = np.eye(len(source.classes), dtype=np.float32)[labels]
    if targets == 'pairs':
      wanted = (labels % 2).astype(np.float32)[:, None]
    return Cases(features.reshape(len(labels), -1), wanted, labels)

  names = source.classes
  if targets == 'pairs':
    says = f'[{names[0]}], [{names[2]}] against [{names[1]}], [{names[3]}]'
    output, error = 'logistic', 0.08
  else:
    says, output, error = f'{len(names)} classes', 'softmax', 0.16
  splits = cases('train'), cases('validation')
  return Problem(*splits, output, error, names, says)


class Runs(NamedTuple):
  """What became of [R, S] runs: R learning rates, S seeds.

  Attributes:
    epochs: int [R, S], updates until the criterion; where it was not reached,
      those made.
    reached: bool [R, S].
    params: A tree of [R, S, ...]: the weights where the run stopped.
  """

  epochs: Any
  reached: Any
  params: Any

  def at(self, i: int):
    """The weights of all seeds at the i-th rate: a tree of [S, ...]."""
    return jax.tree.map(lambda leaf: leaf[i], self.params)


@functools.partial(jax.jit, static_argnames='model')
def start(model: AdaptiveMixture, features, seeds):
  """Weights to start from: a tree of [S, ...]."""

  def one(seed):
    key = jax.random.fold_in(jax.random.key(1991), seed)
    return nn.meta.unbox(model.init(key, features[:1])['params'])

  return jax.vmap(one)(seeds)


def forward(model: AdaptiveMixture, params, features) -> AdaptiveOutputs:
  """What one run's weights say of cases."""
  return model.apply({'params': params}, jnp.asarray(features))[0]


def squared_error(outputs: AdaptiveOutputs, targets):
  """What the criterion is of."""
  return jnp.mean(jnp.sum((targets - outputs.prediction) ** 2, axis=-1))


def _epoch(model, cases, error, rate, state):
  """One update of a run, unless it is done."""
  params, epochs, reached = state

  def loss(params):
    outputs = forward(model, params, cases.features)
    found = LOSSES[model.config.loss](
      outputs.expert_outputs, outputs.gate_logits, cases.targets
    )
    return jnp.mean(found), squared_error(outputs, cases.targets)

  gradients, squared = jax.grad(loss, has_aux=True)(params)
  reached = reached | (squared <= error)
  step = jnp.where(reached, 0.0, rate)
  params = jax.tree.map(lambda p, g: p - step * g, params, gradients)
  return params, epochs + ~reached, reached


@functools.partial(jax.jit, static_argnames=('model', 'most'))
def _train(model, params, cases, error, rates, most):
  def at(rate):
    many = jax.vmap(functools.partial(_epoch, model, cases, error, rate))

    def chunk(carry):
      made, state = carry
      state, _ = jax.lax.scan(
        lambda state, _: (many(state), None), state, length=CHUNK
      )
      return made + CHUNK, state

    def goes_on(carry):
      made, (_, _, reached) = carry
      return (made < most) & ~jnp.all(reached)

    S = jax.tree.leaves(params)[0].shape[0]
    state = params, jnp.zeros(S, jnp.int32), jnp.zeros(S, bool)
    return jax.lax.while_loop(goes_on, chunk, (0, state))[1]

  return jax.lax.map(at, rates)


def train(
  config: AdaptiveConfig,
  problem: Problem,
  rates: Sequence[float],
  seeds: Sequence[int],
  max_epochs: int,
) -> Runs:
  """All runs of a system; a seed starts alike at every rate.

  Args:
    config: The system.
    problem: What it learns.
    rates: Learning rates, of the mean loss over cases.
    seeds: Of the weights at the start.
    max_epochs: At which a run is given up; rounded up to whole `CHUNK`s.
  """
  model = AdaptiveMixture(config)
  params, epochs, reached = _train(
    model,
    start(model, problem.train.features, jnp.array(seeds)),
    problem.train,
    problem.error,
    jnp.asarray(rates, jnp.float32),
    max_epochs,
  )
  return Runs(np.asarray(epochs), np.asarray(reached), params)


@functools.partial(jax.jit, static_argnames=('model', 'every', 'count'))
def _path(model, params, cases, rate, every, count):
  nothing = jnp.zeros((), jnp.int32), jnp.zeros((), bool)

  def some(params, _):
    one = functools.partial(_epoch, model, cases, -1.0, rate)
    state = jax.lax.fori_loop(
      0, every, lambda _, state: one(state), (params, *nothing)
    )
    return state[0], params

  last, before = jax.lax.scan(some, params, length=count)
  return jax.tree.map(
    lambda many, one: jnp.concatenate([many, one[None]]), before, last
  )


def path(
  config: AdaptiveConfig,
  problem: Problem,
  rate: float,
  seed: int,
  *,
  every: int,
  count: int,
):
  """The weights of one run before its first epoch and after every so many.

  Returns:
    A tree of [count + 1, ...].
  """
  model = AdaptiveMixture(config)
  first = jax.tree.map(
    lambda a: a[0], start(model, problem.train.features, jnp.array([seed]))
  )
  return _path(model, first, problem.train, rate, every, count)


def correct(prediction, targets):
  """Bool [N]: one output is a yes above 0.5, of several the largest counts."""
  if targets.shape[-1] == 1:
    return ((prediction > 0.5) == (targets > 0.5))[..., 0]
  return jnp.argmax(prediction, -1) == jnp.argmax(targets, -1)


@functools.partial(jax.jit, static_argnames='model')
def _measured(model, params, train, test):
  def one(params):
    outputs = forward(model, params, train.features)
    tested = forward(model, params, test.features)
    probs = outputs.gate_probs  # [N, E]
    likeliest = jnp.argmax(probs, axis=-1)
    alone = outputs.expert_outputs[jnp.arange(len(likeliest)), likeliest]
    share = jnp.mean(jax.nn.one_hot(likeliest, probs.shape[-1]), axis=0)
    entropy = jnp.sum(jnp.abs(jax.scipy.special.entr(probs)), axis=-1)
    return {
      'train': 100 * jnp.mean(correct(outputs.prediction, train.targets)),
      'test': 100 * jnp.mean(correct(tested.prediction, test.targets)),
      'alone': 100 * jnp.mean(correct(alone, train.targets)),
      'experts in use': jnp.sum(share > 0.01),
      'experts ever heard': jnp.sum(jnp.max(probs, axis=0) > 0.01),
      'gate entropy': jnp.mean(entropy),
    }

  return jax.vmap(one)(params)


def measured(config: AdaptiveConfig, problem: Problem, params) -> dict:
  """What runs came to, by name, one a run.

  - train, test: per cent of cases that the blend gets right.
  - alone: the same in training of each case's likeliest expert alone.
  - experts in use: those that are the likeliest of more than 1 % of cases.
  - experts ever heard: those with a proportion above 1 % in any case.
  - gate entropy: nats, the mean over cases.

  Args:
    config: The system.
    problem: What it learned.
    params: A tree of [S, ...].
  """
  model = AdaptiveMixture(config)
  found = _measured(model, params, problem.train, problem.test)
  return {name: np.asarray(values, float) for name, values in found.items()}
