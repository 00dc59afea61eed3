"""Measures the time of the parts of a training step, such as its router.

    python -m moe_jax.analysis.explain_cost --config=moe_jax:tiny_switch

The training step of the config is compiled, timed and profiled on this machine.
Each executed instruction belongs to the innermost part of the model that its
scopes name.
"""

import argparse
import dataclasses
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from moe_jax import command_line, config_flag, host
from moe_jax.analysis import compiled, instruction_times, step_parts
from moe_jax.layers.experts import DISPATCHES
from moe_jax.models import MODELS
from moe_jax.training.run_options import RunOptions
from moe_jax.training.setup import set_up

_WARM_UP = 3  # steps


@dataclasses.dataclass(frozen=True)
class Explanation:
  """The time of a step, and of its parts, which sum to it.

  Attributes:
    step_seconds: Median seconds of a step, from asking for a batch to the end.
    step_spread: The lower and the upper quartile of the seconds of a step.
    input_seconds: Mean seconds in which one batch is made and put on the
      devices; a run does it in the background.
    busy_seconds: Seconds of all executed instructions of a step, summed over
      the threads that run them at once. The step is split in the same shares.
    shares: The parts of the step, without those that take no time.
  """

  step_seconds: float
  step_spread: tuple[float, float]
  input_seconds: float
  busy_seconds: float
  shares: tuple[step_parts.Share, ...]


def explain(
  options: RunOptions,
  *,
  num_steps: int = 10,
  devices: Sequence[jax.Device] | None = None,
) -> Explanation:
  """Compiles, times and profiles the training step of a run.

  Args:
    options: Options of the run. Its evaluations are left out.
    num_steps: Number of steps that are timed; as many again are profiled.
    devices: Devices of the mesh; None takes all of this machine.

  Raises:
    ValueError: The options or the data are bad.
  """
  options = without_evaluations(options)
  with tempfile.TemporaryDirectory() as folder:
    run = set_up(options, pathlib.Path(folder) / 'run', devices=devices)
    state, batches = run.programs.init_state(), run.batches(0)
    step = run.programs.train_step.lower(state, next(batches)).compile()
    state, _, _ = _take_steps(step, state, batches, _WARM_UP)
    state, waits, times = _take_steps(step, state, batches, num_steps)
    text = compiled.text_of(step)
    seconds = instruction_times.measure(
      lambda: _take_steps(step, state, batches, num_steps),
      module=re.findall(r'HloModule ([\w.\-]+)', text)[0],
    )
    input_seconds = _seconds_per_batch(batches)
  part_times, busy = step_parts.by_part(compiled.parse(text), seconds)
  step_seconds, wait = float(np.median(times)), float(np.median(waits))
  lower, upper = (float(q) for q in np.quantile(times, (0.25, 0.75)))
  return Explanation(
    step_seconds=step_seconds,
    step_spread=(lower, upper),
    input_seconds=input_seconds,
    busy_seconds=busy / num_steps,
    shares=step_parts.shares_of_step(part_times, busy, step_seconds, wait),
  )


def without_evaluations(options: RunOptions) -> RunOptions:
  """The options of a run with the same steps, and nothing beside them."""
  trace = options.trace
  if trace.every_steps:
    trace = dataclasses.replace(trace, evaluations='')
  else:
    trace = type(trace)()
  return dataclasses.replace(
    options,
    evals={},
    # The best checkpoint, and an early end, are those of an evaluation.
    checkpoint=type(options.checkpoint)(keep_best=False),
    early_stopping=type(options.early_stopping)(),
    trace=trace,
  )


def _take_steps(
  step: Callable[..., Any], state: Any, batches: Iterator[Any], num_steps: int
) -> tuple[Any, list[float], list[float]]:
  """The new state, the seconds of waiting for each batch, and of each step."""
  waits, times = [], []
  for _ in range(num_steps):
    start = time.perf_counter()
    batch = next(batches)
    waits.append(time.perf_counter() - start)
    state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    times.append(time.perf_counter() - start)
  return state, waits, times


def _seconds_per_batch(batches: Iterator[Any], num: int = 20) -> float:
  """Mean seconds of a batch once those that were made ahead are used up."""
  times = []
  for _ in range(num):
    start = time.perf_counter()
    jax.block_until_ready(next(batches))
    times.append(time.perf_counter() - start)
  return float(np.mean(times[num // 2 :]))


def table(explanation: Explanation) -> Table:
  """A row for each part of the step, in milliseconds and percent."""
  e = explanation
  low, high = (f'{1e3 * seconds:.1f}' for seconds in e.step_spread)
  part_table = Table(
    title=f'A training step takes {1e3 * e.step_seconds:.1f} ms (quartiles '
    f'{low} and {high} ms)',
    caption=(
      'The time of a step is a median. The instructions of a step take '
      f'{1e3 * e.busy_seconds:.1f} ms in all, some of them at once on several '
      'threads; the step is split over its parts in the shares that they have '
      f'in that. Making a batch takes {1e3 * e.input_seconds:.2f} ms in the '
      'background.'
    ),
  )
  part_table.add_column('part of the step')
  for heading in ('forward, ms', 'backward, ms', 'both, ms', 'share'):
    part_table.add_column(heading, justify='right')
  for row in e.shares:
    part_table.add_row(
      row.part,
      f'{1e3 * row.forward:.2f}',
      f'{1e3 * row.backward:.2f}' if row.backward else '',
      f'{1e3 * row.seconds:.2f}',
      f'{row.seconds / e.step_seconds:.1%}',
    )
  return part_table


def parse(
  argv: Sequence[str] | None,
) -> tuple[argparse.Namespace, list[str]]:
  """Parses the command line; returns overrides of the config separately."""
  parser = command_line.Parser(
    prog=command_line.program('moe_jax.analysis.explain_cost'),
    **command_line.about(__doc__),
  )
  command_line.add_config(parser)
  parser.set_defaults(run=run)
  parser.add_argument(
    '--steps',
    type=command_line.POSITIVE,
    default=10,
    help='number of steps that are timed; as many are then profiled',
  )
  return command_line.parse_command(parser, argv, lambda _: True)


def run(arguments: argparse.Namespace, overrides: list[str]) -> None:
  """Prints the time of the parts of a step of the command line's config."""
  host.keep_freed_memory()
  options, ignored = config_flag.options_of(arguments.config, overrides)
  command_line.say(config_flag.ignored_lines(ignored))
  explanation = explain(options, num_steps=arguments.steps)
  print(_title(options))
  Console().print(table(explanation))


def _title(options: RunOptions) -> str:
  """The line with the model that is measured, and the devices."""
  model, devices = options.model, jax.devices()
  moe, experts = getattr(model, 'moe', None), 'no experts'
  if moe is not None and moe.num_experts:
    experts = (
      f'{moe.num_experts} experts in layers {moe.layers!r}, dispatch '
      f'{DISPATCHES.name_of(moe.dispatch)!r}'
    )
    if moe.forced:
      experts += f' ({moe.forced})'
  return (
    f'Model {MODELS.name_of(model)!r}, {experts}; batches of '
    f'{options.batch_size} x {options.data.seq_len} tokens on '
    f'{len(devices)} x {devices[0].device_kind}'
  )


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command; errors are reported in a few lines."""
  command_line.run_command(*parse(argv))


if __name__ == '__main__':
  main()
