"""Runs 1991's systems; all runs of one system are one compiled program.

Not here: the descent itself (`jacobs_runs.py`), and which systems there are
(`jacobs_claims.py`).
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import ClassVar

from experiments.origins_1991.jacobs_measures import measured
from experiments.origins_1991.jacobs_problems import (
  TARGETS,
  Problem,
  problem,
)
from experiments.origins_1991.jacobs_runs import train
from experiments.study.jobs import Job
from experiments.study.runner import Runner, provenance
from moe_jax import sections
from moe_jax.data import SOURCES, ClassRows, ClassSource, SourceOptions
from moe_jax.data.tasks.classes import digest_of
from moe_jax.models.adaptive import LOSSES, AdaptiveMixture
from moe_jax.options import Options, above, at_least, choice, one_of, option


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
    'pairs', 'Kind of targets; see `jacobs_problems`.', one_of(*TARGETS)
  )
  error: float = option(
    0.0,
    'Squared error at which a run stops; 0: that of the kind of targets.',
    at_least(0),
  )
  data: SourceOptions = choice(SOURCES, 'vowels', 'Source of the cases.')

  def problem(self) -> Problem:
    """The problem that is learned."""
    return problem(self.data.classes(), self.targets, self.error)

  def model(self, problem: Problem) -> AdaptiveMixture:
    """The system that learns the problem."""
    return problem.model(self.num_experts, self.loss, self.expert_hidden)


class DescentRunner(Runner):
  """Trains all runs of a system together, over learning rates and seeds."""

  options: ClassVar[type[Options]] = Descent

  def prepare(self, jobs: Sequence[Job]) -> None:
    """Checks the options of the problem before anything starts."""
    sections.read(Descent, jobs[0].config).problem()

  def together(self, job: Job) -> str:
    """Name of the job's system, whose runs are one program."""
    return job.arm.line

  def __call__(self, jobs: Sequence[Job]) -> None:
    """Trains the runs of one system and writes the result of each."""
    start = time.perf_counter()
    options = [sections.read(Descent, job.config) for job in jobs]
    first = options[0]
    learned = first.problem()
    model = first.model(learned)
    rates = sorted({o.learning_rate for o in options})
    seeds = sorted({o.seed for o in options})
    runs = train(
      model, learned, rates, seeds, first.total_steps, first.patience
    )
    measures = [measured(model, learned, runs.at(r)) for r in range(len(rates))]
    facts = provenance(start)
    facts['minutes'] /= len(jobs)
    digest = _digest(first.data.classes())
    for job, o in zip(jobs, options, strict=True):
      r, s = rates.index(o.learning_rate), seeds.index(o.seed)
      job.write_result(
        {
          'learning rate': o.learning_rate,
          'epochs': int(runs.epochs[r, s]),
          'reached': 100.0 * bool(runs.reached[r, s]),
          **{name: float(v[s]) for name, v in measures[r].items()},
          'expert output': learned.expert_output,
          'data_digest': digest,
          'made': facts,
        }
      )


def _digest(source: ClassSource) -> str:
  splits = ('train', 'validation')
  return digest_of({name: ClassRows(source, name) for name in splits})
