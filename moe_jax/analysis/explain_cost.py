"""Measures the time of the parts of a training step, such as its router.

    python -m moe_jax.analysis.explain_cost --config=moe_jax:tiny_switch

The training step of the config is compiled, timed and profiled on this machine.
Each executed instruction belongs to the innermost part of the model that its
scopes name.
"""

import argparse
import collections
import glob
import pathlib
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from rich.table import Column, Table

from moe_jax import cli, run_config
from moe_jax.analysis import sharded
from moe_jax.analysis.routing_report import wide_console
from moe_jax.devices import keep_freed_memory
from moe_jax.models import MODELS
from moe_jax.training.run_options import RunOptions
from moe_jax.training.setup import set_up

_WARM_UP = 3  # steps
# The scopes of each part of the step, in the order of the table.
_SCOPES = {
  'router': 'router',
  'slots and indices': 'index',
  'dispatch': 'dispatch',
  'experts': 'experts',
  'combine': 'combine',
  'shared expert': 'shared_expert',
  'exchange between devices': 'exchange',
  'rest of sparse layers': 'moe',
  'attention': 'attention relative_positions',
  'cross-attention': 'cross_attention',
  'dense feed-forward': 'ffn extra_ffn',
  'norms': 'attention_norm cross_attention_norm ffn_norm extra_ffn_norm '
  'final_norm',
  'embedding': 'embedding',
  'logits and loss': 'logits loss',
  'optimizer': 'optimizer',
}
PARTS = {
  scope: part for part, names in _SCOPES.items() for scope in names.split()
}
# Instructions of the loss and its gradient that are in no scope of `PARTS`.
AROUND = 'residual stream, loops'
OTHER = 'all other instructions'
INPUT = 'waiting for the batch'
ROWS = (*_SCOPES, AROUND, OTHER, INPUT)
# 'transpose(jvp(experts))' is the scope 'experts', transformed.
_WRAPPED = re.compile(r'(?:[\w.]+\()*([\w.]*)\)*')

# Seconds by (part, whether they are spent in the backward pass).
Times = dict[tuple[str, bool], float]
# libtpu lists planes of its own in addition to those of the devices.
_ACCELERATORS = ('/device:TPU', '/device:GPU')
# A TPU repeats the same times by step, module and scope on other lines.
_LINES = ('XLA Ops', 'Stream')


def explain(options: RunOptions, num_steps: int) -> Table:
  """Compiles, times and profiles the training step of a run.

  Args:
    options: Options of the run, whose evaluations are not run.
    num_steps: Number of steps that are timed; as many again are profiled.

  Returns:
    A table with a row for each part of the step, in milliseconds and percent.
    The times of the parts sum to the time of the step.

  Raises:
    ValueError: The options or the data are bad.
  """
  with tempfile.TemporaryDirectory() as folder:
    run = set_up(options, pathlib.Path(folder) / 'run')
    state, batches = run.programs.init_state(), run.batches(0)
    step = run.programs.train_step.lower(state, next(batches)).compile()
    state, _, _ = _take_steps(step, state, batches, _WARM_UP)
    state, waits, times = _take_steps(step, state, batches, num_steps)
    text = cast(str, step.as_text())
    seconds = _instruction_seconds(
      lambda: _take_steps(step, state, batches, num_steps),
      module=re.findall(r'HloModule ([\w.\-]+)', text)[0],
    )
  part_times = by_part(sharded.parse(text), seconds)
  low, median, high = np.quantile(times, (0.25, 0.5, 0.75))
  wait = float(np.median(waits))
  headings = 'forward, ms', 'backward, ms', 'both, ms', 'share'
  table = Table(
    'part of the step',
    *(Column(heading, justify='right') for heading in headings),
    title=f'A training step takes {1e3 * median:.1f} ms (quartiles '
    f'{1e3 * low:.1f} and {1e3 * high:.1f} ms)',
    caption='The time of a step is a median. The instructions of a step take '
    f'{1e3 * sum(part_times.values()) / num_steps:.1f} ms in all, some of them '
    'at once on several threads; the step is split over its parts in the '
    'shares that they have in that.',
  )
  for part, forward, backward in shares_of_step(part_times, median, wait):
    both = forward + backward
    passes = f'{1e3 * forward:.2f}', f'{1e3 * backward:.2f}' if backward else ''
    table.add_row(part, *passes, f'{1e3 * both:.2f}', f'{both / median:.1%}')
  return table


def _take_steps(
  step: Callable[..., Any], state: Any, batches: Iterator[Any], num_steps: int
) -> tuple[Any, list[float], list[float]]:
  """Takes training steps and times them.

  Returns:
    The new state; for each step the seconds that it waited for its batch; and
    for each step all of its seconds, this wait included.
  """
  waits, times = [], []
  for _ in range(num_steps):
    start = time.perf_counter()
    batch = next(batches)
    waits.append(time.perf_counter() - start)
    state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    times.append(time.perf_counter() - start)
  return state, waits, times


def part_of(op_name: str) -> str:
  """The part of the training step that an instruction belongs to.

  Args:
    op_name: Scopes of the instruction, from the outermost to the innermost, and
      the primitive that it was traced from. The innermost scope that `PARTS`
      lists decides.
  """
  scopes = op_name.split(';')[0].split('/')[:-1]
  for scope in reversed(scopes):
    name = _WRAPPED.fullmatch(scope)
    if name and name[1] in PARTS:
      return PARTS[name[1]]
  return AROUND if 'jvp(' in op_name else OTHER


def by_part(program: sharded.Program, seconds: Mapping[str, float]) -> Times:
  """The executed time of each part of a training step.

  What is computed again for the backward pass belongs to the backward pass.

  Args:
    program: The compiled program.
    seconds: Time of each instruction as profiled; the time of a loop includes
      its body's. Instructions that the program lacks belong to `OTHER`.
  """
  op_names = sharded.op_name_of(program)
  times: Times = collections.defaultdict(float)
  for name in sharded.leaves(program, set(seconds)):
    op_name = op_names.get(name, '')
    times[part_of(op_name), 'transpose(' in op_name] += seconds[name]
  return dict(times)


def shares_of_step(
  times: Times, step_seconds: float, wait: float
) -> list[tuple[str, float, float]]:
  """Splits the time of a step over its parts, in the order of `ROWS`.

  Args:
    times: Executed time of each part. The sum is longer than the step where
      several threads work at once.
    step_seconds: Seconds of the step, from asking for the batch to the end.
    wait: Seconds of the step in which it waits for the batch.

  Returns:
    Each part, and its seconds in the forward and in the backward pass.
  """
  busy = sum(times.values())
  scale = max(step_seconds - wait, 0.0) / busy if busy else 0.0
  rows = []
  for part in ROWS[:-1]:
    seconds = [scale * times.get((part, back), 0.0) for back in (False, True)]
    if any(seconds) or part == OTHER:
      rows.append((part, *seconds))
  return [*rows, (INPUT, wait, 0.0)]


def _instruction_seconds(
  run: Callable[[], object], module: str
) -> dict[str, float]:
  """Seconds of each instruction of a program while `run()` runs, by name.

  On accelerators they include work that the profile lists without an
  instruction, under the name of its kernel.

  Args:
    run: Runs the program.
    module: Name of the program's XLA module; instructions of other modules are
      left out.
  """
  with tempfile.TemporaryDirectory() as folder:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    # This loads every installed plugin: a libtpu of another version than jax
    # asks for crashes here, where JAX_PLATFORMS=cpu does not.
    with jax.profiler.trace(folder, profiler_options=options):
      run()
    (path,) = glob.glob(f'{folder}/**/*.xplane.pb', recursive=True)
    profile = jax.profiler.ProfileData.from_file(path)
  planes = list(profile.planes)
  devices = [plane for plane in planes if plane.name.startswith(_ACCELERATORS)]
  lines = [line for plane in devices or planes for line in plane.lines]
  if devices:
    lines = [line for line in lines if line.name.startswith(_LINES)]
  seconds: dict[str, float] = collections.defaultdict(float)
  for event in (event for line in lines for event in line.events):
    stats = dict(event.stats)
    name = stats.get('hlo_op')
    if name is None and devices:
      name = event.name.removeprefix('%').split(' ')[0]
    elif name is None or stats.get('hlo_module', module) != module:
      continue
    seconds[str(name)] += event.duration_ns / 1e9
  return dict(seconds)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command; errors are reported in a few lines."""
  parser = cli.parser('moe_jax.analysis.explain_cost', __doc__)
  cli.add_config(parser)
  parser.set_defaults(run=run)
  text = 'number of steps that are timed; as many are then profiled'
  parser.add_argument('--steps', type=cli.POSITIVE, default=10, help=text)
  cli.run_command(*cli.parse_command(parser, argv))


def run(arguments: argparse.Namespace, overrides: list[str]) -> None:
  """Prints the time of the parts of a step of the command line's config."""
  keep_freed_memory()
  options, ignored = run_config.options_of(arguments.config, overrides)
  cli.say(ignored)
  table = explain(options, arguments.steps)
  devices = jax.devices()
  print(
    f'Model {MODELS.name_of(options.model)!r}; batches of {options.batch_size} '
    f'x {options.data.seq_len} tokens on {len(devices)} x '
    f'{devices[0].device_kind}'
  )
  wide_console().print(table)


if __name__ == '__main__':
  main()
