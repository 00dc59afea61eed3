"""Full-batch gradient descent on many small mixtures at once, and measures.

All runs of a system are one compiled program, which trains the seeds in
parallel and the learning rates one after the other: a rate ends as soon as all
of its seeds have stopped. A run stops where its training error reaches the
criterion, and keeps the weights that it has there.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.origins_1991 import vowels
from experiments.origins_1991.mixture import LOSSES, Mixture, Outputs
from experiments.origins_1991.vowels import Vowels
from experiments.study.jobs import Job
from experiments.study.runner import Runner, provenance
from moe_jax import sections
from moe_jax.options import Options, above, at_least, nested, one_of, option

# Number of epochs between two checks of whether any run has to go on.
CHUNK = 50


class System(NamedTuple):
  """A model, what it minimises, and where it stops.

  Attributes:
    model: The mixture, with one output.
    loss: Name of the error that is minimised, a key of `LOSSES`.
    error: Squared error at which a run stops: the mean of ||d - y||^2 over
      training cases, of the mixture's outputs y and the targets d.
  """

  model: Mixture
  loss: str
  error: float


class Cases(NamedTuple):
  """Features of cases, float32 [N, 2], and their targets, float32 [N, 1]."""

  features: Any
  targets: Any


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


def pairs(vowels: Vowels) -> Cases:
  """Cases with the target 0 for [i] and [a], and 1 for [I] and [A]."""
  targets = (vowels.labels % 2).astype(np.float32)[:, None]
  return Cases(vowels.features, targets)


@functools.partial(jax.jit, static_argnames='model')
def start(model: Mixture, features, seeds):
  """Initial weights of the runs of all seeds, a tree of [S, ...]."""

  def one(seed):
    key = jax.random.fold_in(jax.random.key(1991), seed)
    return model.init(key, features[:1])['params']

  return jax.vmap(one)(seeds)


def forward(model: Mixture, params, features) -> Outputs:
  """Outputs of a model with one run's weights, for all cases."""
  return model.apply({'params': params}, jnp.asarray(features))


def _epoch(system: System, cases, rate, state):
  """One update of a run, unless it has reached the criterion.

  Args:
    system: The system.
    cases: Training cases.
    rate: Learning rate.
    state: The weights, the number of updates, and whether the run has stopped.
  """
  params, epochs, reached = state
  targets = cases.targets

  def loss(params):
    outputs = forward(system.model, params, cases.features)
    errors = LOSSES[system.loss](outputs.experts, outputs.gate_logits, targets)
    squared = jnp.sum((targets - outputs.prediction) ** 2, axis=-1)
    return jnp.mean(errors), jnp.mean(squared)

  gradients, squared = jax.grad(loss, has_aux=True)(params)
  reached = reached | (squared <= system.error)
  step = jnp.where(reached, 0.0, rate)
  params = jax.tree.map(lambda p, g: p - step * g, params, gradients)
  return params, epochs + ~reached, reached


@functools.partial(jax.jit, static_argnames=('system', 'most', 'patience'))
def _train(system, params, cases, rates, most, patience):
  def at(least, rate):
    train_epoch = jax.vmap(functools.partial(_epoch, system, cases, rate))

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
  system: System,
  cases: Cases,
  rates: Sequence[float],
  seeds: Sequence[int],
  max_epochs: int,
  patience: int = 0,
) -> Runs:
  """Trains a system with every learning rate and seed.

  A seed has the same initial weights at every rate. `patience` shortens the
  search for the best rate (`rows.best_rate`). It does not change the answer if
  it is at least the number of seeds: a rate that is given up then has more
  epochs in the mean than an earlier one at which all seeds arrived.

  Args:
    system: The system.
    cases: Training cases.
    rates: Learning rates, for the mean loss over cases.
    seeds: Seeds of the initial weights.
    max_epochs: Number of epochs after which a run is given up, rounded up to
      whole `CHUNK`s.
    patience: Bound on the epochs at a rate, as a multiple of the epochs of the
      slowest seed at an earlier rate at which all seeds reached the criterion;
      0 sets no such bound.
  """
  params, epochs, reached = _train(
    system,
    start(system.model, cases.features, jnp.array(seeds)),
    cases,
    jnp.asarray(rates, jnp.float32),
    max_epochs,
    patience,
  )
  most = -(-max_epochs // CHUNK) * CHUNK
  epochs, reached = np.asarray(epochs), np.asarray(reached)
  return Runs(np.where(reached, epochs, most), reached, params)


def _right(prediction, targets):
  """Per cent of cases on the side of 0.5 on which their target is."""
  return 100 * jnp.mean((prediction > 0.5) == (targets > 0.5))


def _entropy(probs):
  """Entropy over the last axis, in nats; never -0, which tables would print."""
  return jnp.sum(jnp.abs(jax.scipy.special.entr(probs)), axis=-1)


@functools.partial(jax.jit, static_argnames='model')
def measured(model: Mixture, params, train: Cases, test: Cases) -> dict:
  """Measures of trained runs by name, each with one value for every run.

  - train, test: per cent of cases that the mixture gets right.
  - alone: per cent of training cases that each case's likeliest expert gets
    right by itself.
  - experts in use: number of experts that are the likeliest of more than 1 % of
    cases.
  - experts ever heard: number of experts with a proportion above 1 % in any
    case.
  - gate entropy: mean entropy of the proportions over cases, in nats.
  - I(expert; case): information about the case in the choice of an expert, in
    nats: the entropy of the mean proportions less the mean entropy. It is 0
    where one expert has all cases or proportions are the same for all cases,
    and at most ln E.

  Args:
    model: The model.
    params: Weights of the runs, a tree of [S, ...].
    train: Training cases.
    test: Test cases.
  """

  def one(params):
    outputs = forward(model, params, train.features)
    tested = forward(model, params, test.features)
    probs = outputs.gate_probs  # [N, E]
    likeliest = jnp.argmax(probs, axis=-1)
    alone = outputs.experts[jnp.arange(len(likeliest)), likeliest]
    share = jnp.mean(jax.nn.one_hot(likeliest, probs.shape[-1]), axis=0)
    entropy = jnp.mean(_entropy(probs))
    return {
      'train': _right(outputs.prediction, train.targets),
      'test': _right(tested.prediction, test.targets),
      'alone': _right(alone, train.targets),
      'experts in use': jnp.sum(share > 0.01),
      'experts ever heard': jnp.sum(jnp.max(probs, axis=0) > 0.01),
      'gate entropy': entropy,
      'I(expert; case)': _entropy(jnp.mean(probs, axis=0)) - entropy,
    }

  return jax.vmap(one)(params)


class Kind(NamedTuple):
  """A kind of experts: their output, and a system's criterion and rates."""

  output: str
  error: float
  rates: tuple[float, ...]


# A logistic output as the paper's, which stops at the paper's criterion, or a
# linear one, whose distances can exceed 1. The slope of a linear output does
# not shrink: its rates are smaller.
TARGETS = {
  'pairs': Kind('logistic', 0.08, (2.0, 4.0, 8.0, 16.0, 32.0, 64.0)),
  'linear_pairs': Kind('linear', 0.11, (0.05, 0.1, 0.25, 0.5, 1.0, 2.0)),
}


@dataclasses.dataclass(frozen=True)
class Data(Options):
  """The vowels that are learned."""

  table: str = option(
    '',
    "Path of a file with Peterson and Barney's table of vowels; '' draws "
    'speakers around the means that they published.',
  )


@dataclasses.dataclass(frozen=True)
class Descent(Options):
  """Options of one run of full-batch gradient descent."""

  seed: int = option(0, 'Seed of the weights at the start.', at_least(0))
  total_steps: int = option(
    8000, 'Number of epochs after which the run is given up.', at_least(1)
  )
  learning_rate: float = option(
    1.0, 'Learning rate, for the mean loss over cases.', above(0)
  )
  patience: int = option(
    0,
    'Number of times as many epochs as the slowest seed at a smaller learning '
    'rate that a run may take before it is given up; 0: up to total_steps.',
    at_least(0),
  )
  num_experts: int = option(4, 'Number of experts.', at_least(1))
  expert_hidden: int = option(
    0,
    'Number of hidden logistic units of an expert; 0: the expert is linear.',
    at_least(0),
  )
  loss: str = option('competitive', 'Error that is minimised.', one_of(*LOSSES))
  targets: str = option(
    'pairs',
    "Output of an expert: 'pairs' is logistic, and runs stop at a squared "
    "error of 0.08; 'linear_pairs' is linear, and they stop at 0.11.",
    one_of(*TARGETS),
  )
  data: Data = nested(Data(), 'Source of the cases.')

  def system(self) -> System:
    """The system that learns."""
    kind = TARGETS[self.targets]
    model = Mixture(self.num_experts, self.expert_hidden, kind.output)
    return System(model, self.loss, kind.error)


class DescentRunner(Runner):
  """Trains all runs of a system together, over learning rates and seeds."""

  options: ClassVar[type[Options]] = Descent

  def prepare(self, jobs: Sequence[Job]) -> None:
    """Reads the table before anything starts."""
    vowels.load(jobs[0].config.data.table)

  def together(self, job: Job) -> str:
    """Name of the job's system, whose runs are one program."""
    return job.arm.line

  def __call__(self, jobs: Sequence[Job]) -> None:
    """Trains the runs of one system and writes the result of each."""
    start = time.perf_counter()
    options = [sections.read(Descent, job.config) for job in jobs]
    first, system = options[0], options[0].system()
    splits = vowels.load(first.data.table)
    cases = pairs(splits[0]), pairs(splits[1])
    rates = sorted({o.learning_rate for o in options})
    seeds = sorted({o.seed for o in options})
    runs = train(
      system, cases[0], rates, seeds, first.total_steps, first.patience
    )
    measures = [
      measured(system.model, runs.at(r), *cases) for r in range(len(rates))
    ]
    facts = provenance(start)
    facts['minutes'] /= len(jobs)
    for job, o in zip(jobs, options, strict=True):
      r, s = rates.index(o.learning_rate), seeds.index(o.seed)
      values = {k: float(np.asarray(v)[s]) for k, v in measures[r].items()}
      job.write_result(
        {
          'learning rate': o.learning_rate,
          'epochs': int(runs.epochs[r, s]),
          'reached': 100.0 * bool(runs.reached[r, s]),
          **values,
          'expert output': system.model.output,
          'data_digest': vowels.digest(splits),
          'made': facts,
        }
      )
