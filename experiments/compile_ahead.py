"""How much memory do a step and evaluations need, and do they fit the devices?

    python -m experiments.compile_ahead --config=configs/mixtral_8x7b.py \
      --topology=v5p:4x4x4 --config.mesh.expert=4 --config.microbatches=8
    python -m experiments.compile_ahead --config=configs/switch_c.py \
      --topology=v5p:4x8x16 --config.mesh.tensor=4

Compiles a config's step, and the model of each entry of `evals` over a batch,
for devices that need not be there: any number of CPUs, or TPUs by their
topology through PyPI's libtpu (the `tpu-compiler` extra). No parameter or batch
is allocated, only their shapes are known. Prints the memory that a device
needs, the bytes that it sends, a step's FLOPs, and a verdict; the exit status
is 1 where the step or an evaluation does not fit. Caches of generated text are
not counted. CPUs stand in for any device: their attention is not fused and
their matrices are not padded, so temporaries differ from those of an
accelerator.
"""

import importlib.util
import logging
import os
import re
import resource
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from jax.stages import Compiled, Lowered
from rich.console import Console
from rich.table import Table

from moe_jax import cli, run_config
from moe_jax.analysis import cost, roofline, sharded
from moe_jax.errors import InputError
from moe_jax.models import Model
from moe_jax.models.trees import variables
from moe_jax.training.evaluate import compiled_eval_step
from moe_jax.training.programs import Programs, make_programs
from moe_jax.training.run_options import RunOptions

_TOPOLOGY = re.compile(r'cpu:[1-9]\d{0,5}|v\w+:[1-9]\d*(x[1-9]\d*)*')


class DoesNotFit(Exception):
  """The compiler found that the program needs more memory than there is."""


class Evaluation(NamedTuple):
  """An evaluation, by name, and the bytes that a device needs while it runs."""

  name: str
  needed_bytes: int


class Report(NamedTuple):
  """Memory, communication and cost of a compiled run.

  Attributes:
    step: Memory and communication of the compiled step.
    evaluation: The evaluation that needs most memory; 'none' and 0 for none.
    seconds: Time of tracing, lowering and compiling.
    host_bytes: Peak host memory of this process so far.
  """

  step: sharded.Sharded
  evaluation: Evaluation
  seconds: float
  host_bytes: int

  @property
  def needed_bytes(self) -> int:
    """Bytes that a device must have free for the whole run."""
    return max(self.step.needed_bytes, self.evaluation.needed_bytes)


def described_devices(topology: str, slices: int = 1) -> list[jax.Device]:
  """The devices of a topology.

  Args:
    topology: A number of CPUs, 'cpu:64', or a TPU topology, 'v5p:4x4x4'.
    slices: Number of TPU slices of that topology.

  Raises:
    ValueError: There is no such topology, or jax has created its CPU devices
      already.
  """
  if not _TOPOLOGY.fullmatch(topology):
    raise InputError(
      f"--topology={topology} is neither CPUs, 'cpu:64', nor TPUs, 'v5p:4x4x4'"
    )
  kind, _, size = topology.partition(':')
  if kind == 'cpu':
    try:
      jax.config.update('jax_num_cpu_devices', int(size))
    except RuntimeError as error:
      raise InputError(f'--topology={topology}: {error}') from None
    return jax.devices('cpu')
  # Without these libtpu looks for a TPU's host and logs at length that there is
  # none, and it locks the TPU, which is not used here, against other programs.
  quiet = {
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_ACCELERATOR_TYPE': f'{kind}-1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
  }
  for name, value in quiet.items():
    os.environ.setdefault(name, value)
  if not importlib.util.find_spec('libtpu'):
    raise InputError(
      f'--topology={topology} needs the compiler for TPUs: '
      "pip install 'moe_jax[tpu-compiler]'"
    )
  from jax.experimental import topologies

  more = {'num_slices': slices} if slices > 1 else {}
  try:
    return topologies.get_topology_desc(topology, 'tpu', **more).devices
  except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError) as e:
    raise InputError(f'--topology={topology}: {e}') from None


def mesh_of(options: RunOptions, devices: list[jax.Device]) -> Mesh:
  """The mesh of a run over the devices; checks that its batch can be split.

  Raises:
    ValueError: The mesh does not fit the devices, or the batch does not split.
  """
  try:
    mesh = options.mesh.make(devices)
  except NotImplementedError as error:  # the TPU's torus cannot be split so
    raise InputError(f'mesh={options.mesh}: {error}') from None
  options.check_rows(options.sharding.row_parts(mesh))
  return mesh


def largest_evaluation(options: RunOptions, programs: Programs) -> Evaluation:
  """The evaluation that needs most memory, compiled for the programs' mesh.

  Raises:
    DoesNotFit: The compiler reports that memory is too small.
  """
  model, sharding = options.build(), programs.put.sharding
  batch = {
    name: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
    for name, shape in options.batch_shapes(model).items()
  }
  state, held = programs.abstract_state, sharded.held_by_evaluations(programs)
  # Kernels with merged adapters are like those without.
  params = programs.adapters.base(state.params)
  arguments = variables(params, state.router_state), batch
  needed: dict[Model, Evaluation] = {}
  for name, entry in options.evals.items():
    changed = entry.overridden(options.model)
    model = changed.build(options.sharding.rules)
    if model not in needed:
      step = compiled_eval_step(model, programs.put)
      memory = _compiled(step.lower(*arguments)).memory_analysis()
      num_bytes = (
        held
        + sharded.device_bytes(batch)
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
      )
      needed[model] = Evaluation(name, num_bytes)
  none = Evaluation('none', 0)
  return max(needed.values(), key=lambda e: e.needed_bytes, default=none)


def _compiled(lowered: Lowered) -> Compiled:
  try:
    return lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    text = str(error)
    if 'RESOURCE_EXHAUSTED' not in text:
      raise
    line = text.removeprefix('RESOURCE_EXHAUSTED: ').splitlines()[0]
    raise DoesNotFit(re.sub(r'\s+', ' ', line)) from None


def report(options: RunOptions, mesh: Mesh) -> Report:
  """Compiles the step and evaluations, and reads what they need and send.

  Raises:
    DoesNotFit: The compiler reports that memory is too small.
  """
  start = time.perf_counter()
  model = options.build()
  programs = make_programs(options, model, mesh)
  arguments = programs.abstract_state, options.batch_shapes(model)
  step = _compiled(programs.train_step.lower(*arguments))
  evaluation = largest_evaluation(options, programs)
  seconds = time.perf_counter() - start
  peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  step_costs = sharded.read(step, programs.abstract_state)
  return Report(step_costs, evaluation, seconds, peak)


def table(report: Report, formula: float) -> Table:
  """Table of the step's numbers on one device, a row for each.

  Args:
    report: Numbers of the compiled run.
    formula: FLOPs of the step by formula.
  """
  step, (name, num_bytes) = report.step, report.evaluation
  memory, sent = step.memory, step.collectives
  sizes = {
    'parameters': step.param_bytes,
    'optimizer state': step.optimizer_bytes,
    'arguments (state and batch)': memory.argument_size_in_bytes,
    'results': memory.output_size_in_bytes,
    'of them in the place of arguments': memory.alias_size_in_bytes,
    'temporaries': memory.temp_size_in_bytes,
    'program': memory.generated_code_size_in_bytes,
    'needed in all': step.needed_bytes,
    f'needed in the largest evaluation, {name}': num_bytes,
  }
  ram = cost.in_bytes(report.host_bytes)
  caption = f'Compiled in {report.seconds:.0f} s; at most {ram} of host memory.'
  if sent.unknown_loops:
    caption += (
      f' {sent.unknown_loops} loops are as long as the data asks: what is in '
      'them counts once, in collectives.'
    )
  result = Table(title='a step, by device', caption=caption)
  result.add_column('what')
  result.add_column('', justify='right')
  for what, size in sizes.items():
    result.add_row(what, cost.in_bytes(size))
  result.add_row('FLOPs by formula, nothing twice', f'{formula:.3g}')
  for kind, traffic in sorted(sent.by_kind.items()):
    text = f'{traffic.count}, {cost.in_bytes(traffic.num_bytes)}'
    result.add_row(f'{kind}: count, bytes sent', text)
  return result


def verdicts(topology: str, device: str, needed_bytes: int) -> dict[str, bool]:
  """Lines that say whether a run fits, and the answer of each.

  Args:
    topology: Topology that the run was compiled for.
    device: Name of the device whose memory is compared; '' takes the
      topology's device, or where that is a CPU every known device.
    needed_bytes: Bytes that the run needs on a device.

  Raises:
    ValueError: The device is unknown.
  """
  kind = topology.partition(':')[0]
  names = [*roofline.DEVICES]
  if device or kind in roofline.DEVICES:
    names = [device or kind]
  lines = {}
  for name in names:
    candidate = roofline.device_of(name)
    fits = needed_bytes <= (num_bytes := candidate.num_bytes)
    text = f'{"fits" if fits else "DOES NOT FIT"} {candidate.name}: '
    text += f'{cost.in_bytes(needed_bytes)} of {cost.in_bytes(num_bytes)} '
    lines[f'{text}({needed_bytes / num_bytes:.0%})'] = fits
  return lines


def formula_flops(options: RunOptions, num_devices: int) -> float:
  """FLOPs of a step on one device, by formula, without recomputation."""
  lengths = options.data.seq_len, options.data.target_len
  price = cost.count(options.build(), *lengths, options.batch_size)
  return 3 * price.example_flops * options.batch_size / num_devices


@cli.reported()
def main(argv: Sequence[str] | None = None) -> None:
  """Prints the report; the exit status is 0 if the run fits, else 1."""
  parser = cli.parser('experiments.compile_ahead', __doc__)
  add = parser.add_argument
  add('--config', required=True, help=cli.CONFIG)
  text = "devices: CPUs, 'cpu:64', or TPUs, 'v5p:4x4x4', 'v5e:16x16'"
  add('--topology', default='cpu:64', help=text)
  text = 'TPU slices of that topology'
  add('--slices', type=cli.POSITIVE, default=1, help=text)
  text = "device whose memory must suffice; '': the topology's, or all known"
  add('--device', default='', help=text)
  command, overrides = parser.parse_known_args(argv)
  logging.getLogger('jax').setLevel(logging.ERROR)
  jax.config.update('jax_platforms', 'cpu')
  options, _ = run_config.options_of(command.config, overrides)
  if command.device:
    roofline.device_of(command.device)  # refused before anything is compiled
  options = cost.with_own_vocabulary(options)
  if forced := options.build().stacks.forced_balance:
    print(f'WARNING: {forced}')
  devices = described_devices(command.topology, command.slices)
  mesh = mesh_of(options, devices)
  sizes = ', '.join(f'{axis} {n}' for axis, n in mesh.shape.items())
  print(f'{mesh.size} x {devices[0].device_kind}: {sizes}', flush=True)
  try:
    compiled = report(options, mesh)
  except DoesNotFit as error:
    print(f'DOES NOT FIT: {error}')
    raise SystemExit(1) from None
  Console().print(table(compiled, formula_flops(options, mesh.size)))
  lines = verdicts(command.topology, command.device, compiled.needed_bytes)
  print('\n'.join(lines), flush=True)
  if not any(lines.values()):
    raise SystemExit(1)


if __name__ == '__main__':
  main()
