"""Hooks that change the steps and the evaluations of a run, for tests."""

import dataclasses
import functools
import signal

import jax

from moe_jax.training.evaluate import between_batches
from moe_jax.training.setup import Hook


class StepHook(Hook):
  """A subclass has `step`, which gets the run's own step before its inputs."""

  def start(self, run):
    step = functools.partial(self.step, run.train_step)
    return dataclasses.replace(run, train_step=step)


class SigtermAt(StepHook):
  """Sends signals to this process during a step, by default SIGTERM."""

  def __init__(self, number: int, *signals: int):
    self.number, self.signals = number, signals or (signal.SIGTERM,)

  def step(self, train_step, state, batch):
    if int(state.step) + 1 == self.number:
      for number in self.signals:
        signal.raise_signal(number)
    return train_step(state, batch)


class Kill(StepHook):
  """Ends the process at a step, as a kill would for what is on disk."""

  def __init__(self, number: int):
    self.number = number

  def step(self, train_step, state, batch):
    if int(state.step) + 1 == self.number:
      raise KeyboardInterrupt
    return train_step(state, batch)


class StepMetrics(StepHook):
  """Collects the metrics of each step of a run."""

  def start(self, run):
    self.steps = []
    return super().start(run)

  def step(self, train_step, state, batch):
    state, step_metrics = train_step(state, batch)
    self.steps.append(jax.device_get(step_metrics))
    return state, step_metrics


class InEvaluation(Hook):
  """Sends SIGTERM in an evaluation after a step, or kills after it."""

  def __init__(self, event: str, step: int, name: str):
    self.event, self.at, self.now = event, (name, step), None

  def start(self, run):
    def measure(entry):
      def befallen(variables, step):
        self.now = entry.name, step
        if self.now == self.at and self.event == 'sigterm':
          signal.raise_signal(signal.SIGTERM)
        between_batches()
        return entry.measure(variables, step)

      return dataclasses.replace(entry, measure=befallen)

    evaluations = [measure(entry) for entry in run.evaluations]
    return dataclasses.replace(run, evaluations=evaluations)

  def paused(self):
    if self.now == self.at and self.event == 'kill after':
      raise KeyboardInterrupt
