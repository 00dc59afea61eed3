"""Schedules of the learning rate: a linear warm-up, then one of several curves.

A new schedule is one class with its options and the curve after the warm-up.
The end of a curve is the end of the run, as in optax: only a step after the
last would have the curve's last value, so that the last step of a curve to 0
still learns.
"""

import dataclasses
from typing import Self

import optax

from moe_jax.config import Kinds, Options, option, required


@dataclasses.dataclass(frozen=True)
class Schedule(Options):
  """The base of learning rate schedules, which override `after_warmup`."""

  warmup_steps: int = option(
    100,
    'Number of optimizer steps over which the learning rate rises linearly '
    'from 0 to its peak, at most half of the steps of the run: where it is '
    'more, half of them are taken, and the run says so. 0 begins at the peak.',
    minimum=0,
  )

  def warmup_in(self, total_steps: int) -> int:
    """The number of warm-up steps in a run, at most half of the run's steps."""
    return min(self.warmup_steps, total_steps // 2)

  @required
  def after_warmup(self, peak: float, steps: int) -> optax.Schedule:
    """Returns the function from steps since the warm-up to the learning rate.

    Args:
      peak: The learning rate at the end of the warm-up.
      steps: The number of optimizer steps that follow the warm-up, at least 1.
    """
    raise NotImplementedError

  def rate(self, peak: float, total_steps: int) -> optax.Schedule:
    """Returns the function from optimizer steps taken to the learning rate."""
    warmup = self.warmup_in(total_steps)
    rise = optax.linear_schedule(0.0, peak, max(warmup, 1))
    # Curves may depend on the length of the warm-up.
    schedule = dataclasses.replace(self, warmup_steps=warmup)
    curve = schedule.after_warmup(peak, max(total_steps - warmup, 1))
    return optax.join_schedules([lambda step: rise(step + 1), curve], [warmup])

  def shrunk(self) -> Self:
    return dataclasses.replace(self, warmup_steps=1)


@dataclasses.dataclass(frozen=True)
class Cosine(Schedule):
  """A rate that falls along half a cosine to a fraction of the peak."""

  final_fraction: float = option(
    0.1,
    'Learning rate at the end of the run, after its last step, as a fraction '
    'of the peak; 0 ends at 0.',
    minimum=0,
    maximum=1,
  )

  def after_warmup(self, peak: float, steps: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(peak, steps, alpha=self.final_fraction)


@dataclasses.dataclass(frozen=True)
class InverseSqrt(Schedule):
  """A rate of the peak times the square root of warm-up steps / steps taken."""

  def after_warmup(self, peak: float, steps: int) -> optax.Schedule:
    """The function from steps since the warm-up to the learning rate.

    Without a warm-up the rate falls as after a warm-up of one step.
    """
    start = max(self.warmup_steps, 1)
    return lambda step: peak * (start / (step + start)) ** 0.5


@dataclasses.dataclass(frozen=True)
class Constant(Schedule):
  """A rate that stays at its peak until the end of the run."""

  def after_warmup(self, peak: float, steps: int) -> optax.Schedule:
    return optax.constant_schedule(peak)


@dataclasses.dataclass(frozen=True)
class Trapezoid(Schedule):
  """The peak rate for most of the run, then a straight line to 0 at its end.

  Runs of several lengths and the same warm-up are equal until the rate of the
  shortest falls, so that one of them can be the start of the next.
  """

  decay_fraction: float = option(
    0.2,
    'Share of the steps of the run, its last ones, over which the learning '
    'rate falls from the peak to 0, which it has after the last step; with 0 '
    'it never falls.',
    minimum=0,
    maximum=1,
  )

  def stable_steps(self, total_steps: int) -> int:
    """The number of steps of a run before the learning rate falls."""
    return total_steps - round(self.decay_fraction * total_steps)

  def after_warmup(self, peak: float, steps: int) -> optax.Schedule:
    """The function from steps since the warm-up to the learning rate.

    The rate is the peak, then falls to 0; the fall begins after the warm-up.
    """
    stable = self.stable_steps(steps + self.warmup_steps) - self.warmup_steps
    stable = max(stable, 0)
    fall = optax.linear_schedule(peak, 0.0, steps - stable)
    return optax.join_schedules([optax.constant_schedule(peak), fall], [stable])


SCHEDULES = Kinds(
  'schedule',
  Schedule,
  {
    'cosine': Cosine,
    'inverse_sqrt': InverseSqrt,
    'constant': Constant,
    'trapezoid': Trapezoid,
  },
  inline=True,
)
