"""A trace of some training steps, for TensorBoard (XProf) or Perfetto."""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax

from moe_jax.options import Options, at_least, option

FOLDER = 'profile'
STEP_NAME = 'train'


@dataclasses.dataclass(frozen=True)
class ProfileOptions(Options):
  """Options of the trace: the section 'profile' of a config."""

  start_step: int = option(
    10,
    'First optimizer step that is traced, counted from 1.',
    at_least(1),
    when={'num_steps': at_least(1)},
  )
  num_steps: int = option(
    0,
    'Number of optimizer steps that are traced for TensorBoard or Perfetto, '
    'into the folder `profile` of the workdir; 0 traces none.',
    at_least(0),
  )
  all_processes: bool = option(
    False,
    'Whether every process writes a trace of its steps, or only process 0.',
    when={'num_steps': at_least(1)},
  )


class Profiler:
  """A train step that also traces some of its calls.

  Args:
    train_step: (state, batch) -> (state, metrics).
    folder: Folder of traces, each in a subfolder named by its time.
    steps: The optimizer steps, from 1, that are traced.
    message: Called with a line of text when the trace is written.
  """

  def __init__(
    self,
    train_step: Callable[..., Any],
    folder: str | os.PathLike[str],
    steps: range,
    message: Callable[[str], None] = print,
  ):
    self._train_step = train_step
    self._folder = os.fspath(folder)
    self._steps = steps
    self._message = message
    self._step: int | None = None
    self._tracing = False

  def __call__(self, state: Any, batch: Any) -> tuple[Any, Any]:
    """Takes one step; waits for the last that is traced."""
    # Reading `state.step` waits for the device, so it is read only once.
    self._step = (int(state.step) if self._step is None else self._step) + 1
    if self._step not in self._steps:
      return self._train_step(state, batch)
    if not self._tracing:
      self._start()
    with jax.profiler.StepTraceAnnotation(STEP_NAME, step_num=self._step):
      state, metrics = self._train_step(state, batch)
    if self._step == self._steps[-1]:
      jax.block_until_ready(metrics)
      self.stop()
    return state, metrics

  def _start(self) -> None:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Python's calls would hide the device's
    jax.profiler.start_trace(self._folder, profiler_options=options)
    self._tracing = True

  def stop(self) -> None:
    """Writes the trace, if one has been started."""
    if not self._tracing:
      return
    self._tracing = False
    jax.profiler.stop_trace()
    self._message(f'profile: steps up to {self._step} in {self._folder}')
