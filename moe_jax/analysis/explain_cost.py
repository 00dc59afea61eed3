"""Where a training step's time goes, measured: router, experts, attention, ...

    python -m moe_jax.analysis.explain_cost --config=configs/tiny_switch.py

The config's own step is compiled, run and profiled here; each executed
instruction belongs to the innermost part of the model that its scopes name.
Not here: counts without a run (`cost`), or comparisons (`experiments`).
"""

import dataclasses
import glob
import pathlib
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

from moe_jax import command_line, config_flag, host
from moe_jax.analysis import compiled as compiled_lib
from moe_jax.layers.experts import DISPATCHES
from moe_jax.runs.checkpoint_options import CheckpointOptions
from moe_jax.training.run_options import RunOptions
from moe_jax.training.setup import set_up

# Scope in an instruction's name -> row of the table, in the table's order.
# A scope is a module's name, or one that the code gives with `named_scope`.
PARTS = {
  'router': 'router',
  'index': 'index building',
  'dispatch': 'dispatch',
  'experts': 'experts',
  'combine': 'combine',
  'moe': 'moe, the rest',
  'attention': 'attention',
  'relative_positions': 'attention',
  'ffn': 'dense feed-forward',
  'extra_ffn': 'dense feed-forward',
  'attention_norm': 'norms',
  'ffn_norm': 'norms',
  'extra_ffn_norm': 'norms',
  'final_norm': 'norms',
  'optimizer': 'optimizer',
}
# What is differentiated and in none of them.
AROUND = 'embedding, residual, loops, loss'
OTHER = 'other'
INPUT = 'input'
ROWS = tuple(dict.fromkeys([*PARTS.values(), AROUND, OTHER, INPUT]))
# 'transpose(jvp(experts))' is the scope 'experts', transformed.
_WRAPPED = re.compile(r'(?:[\w.]+\()*([\w.]*)\)*')


@dataclasses.dataclass(frozen=True)
class Share:
  """One row: seconds a step, forward and backward."""

  part: str
  forward: float
  backward: float

  @property
  def seconds(self) -> float:
    """Both passes."""
    return self.forward + self.backward


@dataclasses.dataclass(frozen=True)
class Explanation:
  """A step's time and its parts, which sum to it.

  Attributes:
    step_seconds: Median time from asking for a batch to the step's end.
    step_spread: Quartiles of it.
    input_seconds: Median time to produce a batch and put it on the devices,
      alone; in a run it is done in the background.
    busy_seconds: Of all executed instructions of a step, summed over the
      threads that ran them at once; the parts' shares are shares of it.
    shares: The parts, `ROWS` in order without those that took nothing.
  """

  step_seconds: float
  step_spread: tuple[float, float]
  input_seconds: float
  busy_seconds: float
  shares: tuple[Share, ...]


def part_of(op_name: str) -> str:
  """The row of an instruction, from its `op_name`: innermost known scope.

  The last component is the primitive, not a scope.
  """
  scopes = op_name.split(';')[0].split('/')[:-1]
  for scope in reversed(scopes):
    found = _WRAPPED.fullmatch(scope)
    if found and found[1] in PARTS:
      return PARTS[found[1]]
  return AROUND if 'jvp(' in op_name else OTHER


def is_backward(op_name: str) -> bool:
  """Whether an instruction is of the backward pass, recomputation included."""
  return 'transpose(' in op_name


def attribute(
  program: compiled_lib.Program, seconds: Mapping[str, float]
) -> tuple[dict[tuple[str, bool], float], float]:
  """Sums executed time by (part, backward); also the sum of all.

  Args:
    program: The compiled program.
    seconds: By instruction, as profiled; a loop's holds that of its body. What
      the program does not have counts as `OTHER`.
  """
  op_names = compiled_lib.op_name_of(program)
  counted = compiled_lib.leaves(program, set(seconds))
  counted |= {name for name in seconds if name not in program}
  total: Counter[tuple[str, bool]] = Counter()
  for name in counted:
    op_name = op_names.get(name, '')
    total[part_of(op_name), is_backward(op_name)] += seconds[name]
  return dict(total), sum(total.values())


def profile(run: Callable[[], None], module: str) -> dict[str, float]:
  """Seconds of each instruction of XLA module `module` while `run()` runs.

  On accelerators also what their own lines list without an instruction, under
  its kernel's name.
  """
  with tempfile.TemporaryDirectory() as folder:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    # This loads every installed plugin: a libtpu of another version than jax
    # asks for crashes here, where JAX_PLATFORMS=cpu does not.
    with jax.profiler.trace(folder, profiler_options=options):
      run()
    (path,) = glob.glob(f'{folder}/**/*.xplane.pb', recursive=True)
    data = jax.profiler.ProfileData.from_file(path)
  planes = list(data.planes)
  # Not every plane of a device is an accelerator's: libtpu adds one of its own.
  accelerators = ('/device:TPU', '/device:GPU')
  devices = [plane for plane in planes if plane.name.startswith(accelerators)]
  total: Counter[str] = Counter()
  for plane in devices or planes:
    for event in _operations(plane, module, bool(devices)):
      total[event[0]] += event[1]
  return dict(total)


def _operations(
  plane: Any, module: str, device: bool
) -> Iterator[tuple[str, float]]:
  """(instruction, seconds) of a plane's events that are an operation's."""
  for line in plane.lines:
    # A TPU repeats the same time by step, module and scope on other lines.
    if device and not line.name.startswith(('XLA Ops', 'Stream')):
      continue
    for event in line.events:
      stats = dict(event.stats)
      name = stats.get('hlo_op')
      if name is None and device:
        name = event.name.removeprefix('%').split(' ')[0]
      elif name is None or stats.get('hlo_module', module) != module:
        continue
      yield str(name), event.duration_ns / 1e9


def explain(
  options: RunOptions,
  *,
  num_steps: int = 10,
  devices: Sequence[jax.Device] | None = None,
) -> Explanation:
  """Compiles, times and profiles the training step of a run.

  Args:
    options: The run's options.
    num_steps: Steps that are timed, and as many that are profiled.
    devices: Of the mesh; None is all there are.

  Raises:
    ValueError: A bad config, or bad data.
  """
  with tempfile.TemporaryDirectory() as folder:
    # Evaluations are no part of a step.
    checkpoint = CheckpointOptions(keep_best=False)
    options = dataclasses.replace(options, checkpoint=checkpoint, evals={})
    run = set_up(options, pathlib.Path(folder) / 'run', devices=devices)
    state, batches = run.programs.init_state(), run.batches(0)
    step = run.programs.train_step.lower(state, next(batches)).compile()
    # Caches, memory and the pipeline's buffer warm up.
    state, _, _ = _take_steps(step, state, batches, 3)
    state, waits, times = _take_steps(step, state, batches, num_steps)
    text = step.as_text()
    seconds = profile(
      lambda: _take_steps(step, state, batches, num_steps),
      module=re.match(r'HloModule ([\w.\-]+)', text)[1],
    )
    produced = _seconds_per_batch(batches)
  parts, busy = attribute(compiled_lib.parse(text), seconds)
  step_seconds = float(np.median(times))
  return Explanation(
    step_seconds=step_seconds,
    step_spread=tuple(float(q) for q in np.quantile(times, (0.25, 0.75))),
    input_seconds=produced,
    busy_seconds=busy / num_steps,
    shares=shares_of_step(parts, busy, step_seconds, float(np.median(waits))),
  )


def _take_steps(step, state, batches, num_steps):
  """The new state, seconds of waiting for each batch, and of each step."""
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
  """Of a drained pipeline: what a batch costs, not what a full buffer hides."""
  times = []
  for _ in range(num):
    start = time.perf_counter()
    jax.block_until_ready(next(batches))
    times.append(time.perf_counter() - start)
  return float(np.mean(times[num // 2 :]))


def shares_of_step(parts, busy, step_seconds, wait) -> tuple[Share, ...]:
  """Busy time scaled to the step's, in the table's order."""
  scale = max(step_seconds - wait, 0.0) / busy if busy else 0.0
  rows = [
    Share(
      row,
      scale * parts.get((row, False), 0.0),
      scale * parts.get((row, True), 0.0),
    )
    for row in ROWS
    if row != INPUT
  ]
  rows = [row for row in rows if row.seconds or row.part == OTHER]
  return (*rows, Share(INPUT, wait, 0.0))


def table(explanation: Explanation) -> Table:
  """A row a part, in milliseconds and percent of the step."""
  e = explanation
  low, high = (f'{1e3 * seconds:.1f}' for seconds in e.step_spread)
  result = Table(
    title=f'a training step: {1e3 * e.step_seconds:.1f} ms ({low} to {high})',
    caption=(
      'Median and quartiles of the step. Its instructions, some of them at '
      f'once on several threads, took {1e3 * e.busy_seconds:.1f} ms in all; '
      'the rows split the step as they split that. Input is the wait for a '
      f'batch; making one takes {1e3 * e.input_seconds:.2f} ms in the '
      'background.'
    ),
  )
  result.add_column('part')
  for heading in ('forward ms', 'backward ms', 'ms', 'share'):
    result.add_column(heading, justify='right')
  for row in e.shares:
    result.add_row(
      row.part,
      f'{1e3 * row.forward:.2f}',
      f'{1e3 * row.backward:.2f}' if row.backward else '',
      f'{1e3 * row.seconds:.2f}',
      f'{row.seconds / e.step_seconds:.1%}',
    )
  return result


def main(argv: list[str]) -> None:
  """Prints where the time of the flag's config goes."""
  del argv
  logging.set_verbosity(logging.WARNING)
  host.keep_freed_memory()
  try:
    options, _ = config_flag.read()
    explanation = explain(options, num_steps=_STEPS.value)
  except (OSError, ValueError) as error:
    command_line.fail(str(error))
  print(_title(options))
  Console().print(table(explanation))


def _title(options: RunOptions) -> str:
  model, devices = options.model, jax.devices()
  moe, experts = getattr(model, 'moe', None), 'dense'
  if moe is not None and moe.num_experts:
    experts = (
      f'{moe.num_experts} experts in {moe.layers!r}, dispatch '
      f'{DISPATCHES.name_of(moe.dispatch)!r}'
    )
  return (
    f'{type(model).__name__.removesuffix("Options")}, {experts}; '
    f'{options.batch_size} x {options.data.seq_len} tokens, on '
    f'{len(devices)} x {devices[0].device_kind}'
  )


if __name__ == '__main__':
  config_flag.define()
  _STEPS = flags.DEFINE_integer(
    'steps', 10, 'Steps timed, and profiled.', lower_bound=1
  )
  app.run(main, flags_parser=command_line.parse)
