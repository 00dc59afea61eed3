"""Full-batch gradient descent on many small mixtures at once, and measures.

All runs of a system are one compiled program, which trains the seeds in
parallel, one learning rate after the other. A run stops where its training
error reaches the criterion, and keeps the weights that it has there.
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
from experiments.origins_1991.mixture import LOSSES, Mixture
from experiments.origins_1991.vowels import Vowels
from experiments.study.jobs import Job
from experiments.study.runner import Runner, provenance
from moe_jax.config import Options, option, read_options


class Kind(NamedTuple):
  """A kind of experts, and how systems of them are trained.

  Attributes:
    output: Function on an expert's output, a key of `mixture.OUTPUTS`.
    error: Squared error at which a run stops: the mean of ||d - y||^2 over
      training cases, of the mixture's outputs y and the targets d.
    rates: Learning rates that are explored.
  """

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

  seed: int = option(0, 'Seed of the weights at the start.', minimum=0)
  total_steps: int = option(
    8000, 'Number of epochs after which the run is given up.', minimum=1
  )
  learning_rate: float = option(
    1.0, 'Learning rate, for the mean loss over cases.', above=0
  )
  num_experts: int = option(4, 'Number of experts.', minimum=1)
  expert_hidden: int = option(
    0,
    'Number of hidden logistic units of an expert; 0: the expert is linear.',
    minimum=0,
  )
  loss: str = option('competitive', 'Error that is minimised.', choices=LOSSES)
  targets: str = option(
    'pairs',
    "Output of an expert: 'pairs' is logistic, and runs stop at a squared "
    "error of 0.08; 'linear_pairs' is linear, and they stop at 0.11.",
    choices=TARGETS,
  )
  data: Data = option(Data(), 'Source of the cases.')

  @property
  def kind(self) -> Kind:
    """The kind of experts."""
    return TARGETS[self.targets]

  @property
  def model(self) -> Mixture:
    """The mixture that learns."""
    return Mixture(self.num_experts, self.expert_hidden, self.kind.output)


class Cases(NamedTuple):
  """Features of cases, float32 [N, 2], and their targets, float32 [N, 1]."""

  features: Any
  targets: Any


def pairs(vowels: Vowels) -> Cases:
  """Cases with the target 0 for [i] and [a], and 1 for [I] and [A]."""
  targets = (vowels.labels % 2).astype(np.float32)[:, None]
  return Cases(vowels.features, targets)


class Runs(NamedTuple):
  """The state of the runs of S seeds.

  Attributes:
    params: Weights, a tree of [S, ...]; those of a run that has stopped stay.
    epochs: Number of updates, int32 [S].
    reached: Whether the criterion was reached, bool [S].
  """

  params: Any
  epochs: Any
  reached: Any


@functools.partial(jax.jit, static_argnames='model')
@functools.partial(jax.vmap, in_axes=(None, None, 0))
def start(model: Mixture, features, seed):
  """Initial weights of the runs of all seeds, a tree of [S, ...]."""
  key = jax.random.fold_in(jax.random.key(1991), seed)
  return model.init(key, features[:1])['params']


@functools.partial(jax.jit, static_argnames='options')
def train(options: Descent, cases: Cases, params, rate) -> Runs:
  """Trains a system with every seed until all runs stop.

  Args:
    options: Options of any of the runs; its seed and learning rate do not
      count.
    cases: Training cases.
    params: Initial weights of all seeds.
    rate: Learning rate, for the mean loss over cases.
  """

  def errors(params):
    outputs = options.model.apply({'params': params}, cases.features)
    loss = LOSSES[options.loss]
    losses = loss(outputs.experts, outputs.gate_logits, cases.targets)
    squared = jnp.sum((cases.targets - outputs.prediction) ** 2, axis=-1)
    return jnp.mean(losses), jnp.mean(squared)

  @jax.vmap
  def epoch(run: Runs) -> Runs:
    gradients, squared = jax.grad(errors, has_aux=True)(run.params)
    reached = run.reached | (squared <= options.kind.error)
    step = jnp.where(reached, 0.0, rate)
    params = jax.tree.map(lambda p, g: p - step * g, run.params, gradients)
    return Runs(params, run.epochs + ~reached, reached)

  def any_goes_on(runs: Runs):
    return jnp.any(~runs.reached & (runs.epochs < options.total_steps))

  S = len(jax.tree.leaves(params)[0])
  runs = Runs(params, jnp.zeros(S, jnp.int32), jnp.zeros(S, bool))
  return jax.lax.while_loop(any_goes_on, epoch, runs)


def _right(prediction, targets):
  """Per cent of cases on the side of 0.5 on which their target is."""
  return 100 * jnp.mean((prediction > 0.5) == (targets > 0.5))


def _entropy(probs):
  """Entropy over the last axis, in nats; never -0, which tables would print."""
  return jnp.sum(jnp.abs(jax.scipy.special.entr(probs)), axis=-1)


@functools.partial(jax.jit, static_argnames='model')
@functools.partial(jax.vmap, in_axes=(None, 0, None, None))
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
  outputs = model.apply({'params': params}, train.features)
  tested = model.apply({'params': params}, test.features)
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
    options = read_options(Descent, jobs[0].config)
    splits, model = vowels.load(options.data.table), options.model
    cases, digest = [*map(pairs, splits)], vowels.digest(splits)
    for rate in sorted({job.config.learning_rate for job in jobs}):
      began = time.perf_counter()
      of_rate = [job for job in jobs if job.config.learning_rate == rate]
      # Two arms of a system may have one rate, and so the same runs.
      seeds = sorted({job.seed for job in of_rate})
      params = start(model, cases[0].features, jnp.array(seeds))
      runs = train(options, cases[0], params, rate)
      measures = jax.device_get(measured(model, runs.params, *cases))
      facts = provenance(began)
      facts['minutes'] /= len(of_rate)
      for job in of_rate:
        s = seeds.index(job.seed)
        result = {
          'learning rate': rate,
          'epochs': int(runs.epochs[s]),
          'reached': 100.0 * bool(runs.reached[s]),
          **{name: float(values[s]) for name, values in measures.items()},
          'expert output': model.output,
        }
        job.write_result({**result, 'data_digest': digest, 'made': facts})
