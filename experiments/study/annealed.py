"""Runs of one model that are annealed at several lengths, at little cost.

With a trapezoid as the schedule of the learning rate, runs that differ only in
`total_steps` are equal until the shortest of them begins to decay. There the
shorter run gives the longer one its state as a checkpoint, from which that goes
on. Every run is the one that its config describes, on one device bit for bit,
and only the steps in which a shorter run decays are taken again.
"""

import dataclasses
from collections.abc import Sequence

from experiments.study.jobs import Job
from experiments.study.runner import TrainingRunner, train
from moe_jax import run_config
from moe_jax.errors import InputError
from moe_jax.runs.checkpointer import Checkpointer
from moe_jax.runs.workdir import checkpoints_of
from moe_jax.training.run_options import RunOptions
from moe_jax.training.schedules import Trapezoid
from moe_jax.training.setup import Hook, Run


@dataclasses.dataclass(frozen=True)
class AnnealedRunner(TrainingRunner):
  """Trains the lengths of a model in ascending order, each from the last one.

  Arms that differ only in length have one `line`, and other arms another.
  """

  def together(self, job: Job) -> str:
    """A key of the arm's line and the seed: lengths of a model share it."""
    return f'{job.arm.line}, seed {job.seed}'

  def __call__(self, jobs: Sequence[Job]) -> None:
    """Trains the runs of one line and seed.

    Raises:
      ValueError: The runs differ in more than their lengths.
    """
    ordered = sorted(jobs, key=lambda job: job.config.total_steps)
    for job, longer in zip(ordered, [*ordered[1:], None], strict=True):
      hooks = [] if longer is None else [Branch(job, longer)]
      train(job, self.measure, hooks=hooks)


class Branch(Hook):
  """Gives a longer run the state at which this one begins to decay.

  Args:
    job: This run.
    longer: The longer run. If it has gone further already, as where the result
      of this one was deleted, it is left as it is.

  Raises:
    ValueError: The runs are not equal until then.
  """

  def __init__(self, job: Job, longer: Job):
    short, long = (run_config.read(j.config) for j in (job, longer))
    (warmup, self._at), (long_warmup, long_at) = map(_phases, (short, long))
    expected = dataclasses.replace(
      long, total_steps=short.total_steps, log_every_steps=short.log_every_steps
    )
    if short != expected or warmup != long_warmup or self._at > long_at:
      raise InputError(
        f'{job.name} and {longer.name} are no runs of one model and schedule '
        f'that differ in total_steps={short.total_steps} and '
        f'{long.total_steps} alone; their warm-ups have '
        f'{sorted({warmup, long_warmup})} steps'
      )
    self._longer = longer

  def start(self, run: Run) -> Run:
    """Wraps the run's step, so that its state is given before the decay."""
    step, count = run.train_step, None

    def branching(state, batch):
      nonlocal count
      count = int(state.step) if count is None else count + 1
      if count == self._at:
        self._give(run, state)
      return step(state, batch)

    return dataclasses.replace(run, train_step=branching)

  def _give(self, run: Run, state) -> None:
    """Saves the state, unless the longer run was given it before."""
    if self._longer.is_finished:
      return
    with Checkpointer(checkpoints_of(self._longer.workdir, '')) as checkpointer:
      newest = checkpointer.newest_good()
      if newest is None or newest < self._at:
        checkpointer.save(self._at, state, extra=run.extra(self._at))


def _phases(options: RunOptions) -> tuple[int, int]:
  """The steps of the warm-up, and those before the learning rate falls.

  Raises:
    ValueError: The schedule is no trapezoid.
  """
  schedule = options.optimizer.schedule
  if not isinstance(schedule, Trapezoid):
    raise InputError(
      f'optimizer.schedule.kind is {type(schedule).__name__}; runs share their '
      "first steps only with 'trapezoid'"
    )
  warmup = schedule.warmup_in(options.total_steps)
  return warmup, max(schedule.stable_steps(options.total_steps), warmup)
