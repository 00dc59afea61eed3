"""Options and runs of the deep mixture of experts, trained by Adam."""

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.gates_2013 import deep_moe, digits, measures
from experiments.gates_2013.deep_moe import DeepMoe
from experiments.study.jobs import Job
from experiments.study.runner import Runner, provenance
from moe_jax.config import Options, option, read_options
from moe_jax.training.optimizer import clipped
from moe_jax.training.schedules import Cosine

# Number of steps of one call of the compiled program, at most.
CHUNK = 200


@dataclasses.dataclass(frozen=True)
class Data(Options):
  """The images that are learned."""

  name: str = option(
    'digits',
    "Set of images: 'digits' are scikit-learn's, 8x8 on a canvas of 14x14, "
    "'mnist' are TFDS' MNIST on 36x36.",
    choices=digits.CANVAS,
  )


@dataclasses.dataclass(frozen=True)
class Training(Options):
  """Options of one run: sizes of the gated layers, balancing, and training."""

  seed: int = option(0, 'Seed of weights, order and places.', minimum=0)
  total_steps: int = option(4000, 'Number of optimizer steps.', minimum=1)
  batch_size: int = option(32, 'Number of images in a batch.', minimum=1)
  learning_rate: float = option(2e-3, 'Peak of the learning rate.', above=0)
  num_experts: tuple[int, ...] = option(
    (4, 4), 'Number of experts in each gated layer.', minimum=1
  )
  hidden: tuple[int, ...] = option(
    (64, 32), 'Number of units of an expert, by layer.', minimum=1
  )
  gate_hidden: tuple[int, ...] = option(
    (16, 16),
    'Number of ReLUs in the hidden layer of a gating network, by layer.',
    minimum=1,
  )
  margin: float = option(
    32.0,
    'Margin of the balancing constraint, in examples: an expert whose running '
    'total of gates is above the mean by more gets gate 0. Totals are updated '
    'once a step, so an expert may pass the margin by up to a batch. The '
    "paper's margin could not be verified.",
    minimum=0,
  )
  balance_steps: int = option(
    0,
    'Number of optimizer steps, from the first, for which the balancing '
    'constraint is in force in training; 0: never; -1: always.',
    minimum=-1,
  )
  data: Data = option(Data(), 'The images.')

  def problems(self) -> Iterator[str]:
    """The problem of layers without sizes of their own."""
    sizes = self.num_experts, self.hidden, self.gate_hidden
    if not len({*map(len, sizes)}) == 1 <= len(self.num_experts):
      yield (
        f'num_experts, hidden and gate_hidden, {sizes}, must have one size a '
        'layer each'
      )

  @property
  def model(self) -> DeepMoe:
    """The model of these sizes."""
    return DeepMoe(self.num_experts, self.hidden, self.gate_hidden)


def make_step(options: Training, optimizer: optax.GradientTransformation):
  """The function ((params, optimizer state, totals, step), batch) of a step.

  It returns the next of these and the sums of the gates of each layer. Only
  `model`, `margin` and `balance_steps` of the options count.
  """
  model = options.model

  def step(carry, batch):
    params, state, totals, number = carry

    def objective(params):
      sit_out = None
      if last := options.balance_steps:
        balanced = (number < last) | (last < 0)
        over = (deep_moe.overused(total, options.margin) for total in totals)
        sit_out = [experts & balanced for experts in over]
      logits, gates = model.apply({'params': params}, batch.images, sit_out)
      nats = optax.softmax_cross_entropy_with_integer_labels
      return nats(logits, batch.labels).mean(), [g.sum(0) for g in gates]

    grads, mass = jax.grad(objective, has_aux=True)(params)
    updates, state = optimizer.update(grads, state)
    params = optax.apply_updates(params, updates)
    totals = [*map(deep_moe.moved, totals, mass)]
    return (params, state, totals, number + 1), mass

  return step


@functools.lru_cache(maxsize=8)
def _compiled(options: Training):
  """The compiled start and steps of all seeds with these options.

  The optimizer is Adam with clipping, a warm-up of 100 steps, and a cosine to a
  tenth.
  """
  rate = Cosine().rate(options.learning_rate, options.total_steps)
  optimizer = optax.chain(
    clipped(1.0),
    optax.scale_by_adam(0.9, 0.98),
    optax.scale_by_learning_rate(rate),
  )
  side = digits.CANVAS[options.data.name]

  def start(seed):
    example = jnp.zeros((1, side, side))
    params = options.model.init(jax.random.key(seed), example)['params']
    return params, optimizer.init(params), options.model.no_totals(), 0

  def steps(carry, batches):
    return jax.lax.scan(make_step(options, optimizer), carry, batches)[0]

  return jax.jit(start), jax.jit(steps)


def train(options: Training) -> Any:
  """The parameters of a trained model."""
  start, steps = _compiled(dataclasses.replace(options, seed=0))
  name = options.data.name
  sizes = options.batch_size, options.total_steps
  images, canvas = digits.load(name)[0], digits.CANVAS[name]
  batches = digits.batches(images, canvas, options.seed, *sizes)
  carry = start(jnp.uint32(options.seed))
  while chunk := list(itertools.islice(batches, CHUNK)):
    carry = steps(carry, jax.tree.map(lambda *a: np.stack(a), *chunk))
  return carry[0]


class DeepMoeRunner(Runner):
  """Trains each run by itself, and measures it."""

  options: ClassVar[type[Options]] = Training

  def prepare(self, jobs: Sequence[Job]) -> None:
    """Reads the images, which TFDS may have to prepare."""
    digits.load(jobs[0].config.data.name)

  def __call__(self, jobs: Sequence[Job]) -> None:
    """Trains the runs and writes their results."""
    for job in jobs:
      start = time.perf_counter()
      options = read_options(Training, job.config)
      name, params = options.data.name, train(options)
      numbers = measures.measure(name, options.model, params)
      digest = digits.digest(digits.load(name), digits.CANVAS[name])
      made = provenance(start)
      job.write_result({**numbers, 'data_digest': digest, 'made': made})
