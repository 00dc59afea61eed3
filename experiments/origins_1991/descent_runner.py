"""Runs 1991's systems; all runs of one system are one compiled program."""

import dataclasses
import time
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from experiments.origins_1991 import vowels
from experiments.origins_1991.descent import System, measured, pairs, train
from experiments.origins_1991.mixture import LOSSES, Mixture
from experiments.study.jobs import Job
from experiments.study.runner import Runner, provenance
from moe_jax import sections
from moe_jax.options import Options, above, at_least, nested, one_of, option


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
