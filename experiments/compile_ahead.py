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

import argparse
import importlib.util
import logging
import os
import re
import resource
import time
from collections.abc import Sequence

import jax
from jax.sharding import Mesh
from jax.stages import Compiled, Lowered
from rich.console import Console

from experiments.benchmarks import program_counts
from experiments.benchmarks.compile_ahead_tables import (
  Evaluation,
  Report,
  table,
  verdicts,
)
from moe_jax import cli, run_config
from moe_jax.analysis import cost, roofline, sharded
from moe_jax.errors import InputError
from moe_jax.models import Model
from moe_jax.models.trees import variables
from moe_jax.run_config import RunConfig
from moe_jax.training.evaluate import compiled_eval_step
from moe_jax.training.programs import Programs, make_programs
from moe_jax.training.run_options import RunOptions

_TOPOLOGY = re.compile(r'cpu:[1-9]\d{0,5}|v\w+:[1-9]\d*(x[1-9]\d*)*')


class DoesNotFit(Exception):
  """The compiler found that the program needs more memory than there is."""


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

  slice_options = {'num_slices': slices} if slices > 1 else {}
  try:
    return topologies.get_topology_desc(
      platform='tpu', topology_name=topology, **slice_options
    ).devices
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


def compile_step(options: RunOptions, mesh: Mesh) -> tuple[Compiled, Programs]:
  """The training step of a run, compiled for a mesh.

  Raises:
    DoesNotFit: The compiler reports that memory is too small.
  """
  model = options.build()
  programs = make_programs(options, model, mesh)
  lowered = programs.train_step.lower(
    programs.abstract_state, options.batch_shapes(model)
  )
  return _compiled(lowered), programs


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
      memory = sharded.memory_of(_compiled(step.lower(*arguments)))
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
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise DoesNotFit(_first_sentences(str(error))) from None


def _first_sentences(text: str) -> str:
  line = text.removeprefix('RESOURCE_EXHAUSTED: ').splitlines()[0]
  return re.sub(r'\s+', ' ', line)


def report(options: RunOptions, mesh: Mesh) -> Report:
  """Compiles the step and evaluations, and reads what they need and send."""
  start = time.perf_counter()
  step, programs = compile_step(options, mesh)
  evaluation = largest_evaluation(options, programs)
  seconds = time.perf_counter() - start
  peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  step_costs = sharded.read(step, programs.abstract_state)
  return Report(step_costs, evaluation, seconds, peak)


def counted_flops(options: RunOptions, mesh: Mesh) -> str:
  """FLOPs of a step on one device, counted by XLA with recomputation."""

  def count(short: RunOptions) -> float:
    return program_counts.counts(compile_step(short, mesh)[0]).flops

  try:
    return f'{program_counts.extrapolate(options, count):.3g}'
  except DoesNotFit:  # the short models' unrolled layers need more memory
    return 'a short model does not fit'


def formula_flops(options: RunOptions, num_devices: int) -> float:
  """FLOPs of a step on one device, by formula, without recomputation."""
  lengths = options.data.seq_len, options.data.target_len
  price = cost.count(options.build(), *lengths, options.batch_size)
  return 3 * price.example_flops * options.batch_size / num_devices


def run(
  options: RunConfig,
  topology: str,
  slices: int = 1,
  device: str = '',
  flops: bool = True,
) -> bool:
  """Compiles the run and prints the report; whether it fits any device asked.

  Args:
    options: Options of the run.
    topology: Topology of the devices; see `described_devices`.
    slices: Number of TPU slices.
    device: Name of the device whose memory is compared; see `verdicts`.
    flops: Whether XLA's count of FLOPs is printed too.

  Raises:
    ValueError: The topology or the device is unknown, or the run does not fit
      the mesh.
  """
  if device:
    roofline.device_of(device)  # refused before anything is compiled
  options = cost.with_own_vocabulary(options)
  if forced := options.build().stacks.forced_balance:
    print(f'WARNING: {forced}')
  devices = described_devices(topology, slices)
  mesh = mesh_of(options, devices)
  sizes = ', '.join(f'{axis} {n}' for axis, n in mesh.shape.items())
  print(f'{mesh.size} x {devices[0].device_kind}: {sizes}', flush=True)
  formula = formula_flops(options, mesh.size)
  try:
    compiled = report(options, mesh)
  except DoesNotFit as error:
    print(f'DOES NOT FIT: {error}')
    return False
  Console().print(table(compiled, formula))
  lines = verdicts(topology, device, compiled.needed_bytes)
  print('\n'.join(lines), flush=True)
  if flops:
    print(f'FLOPs as XLA counts: {counted_flops(options, mesh)}')
  return any(lines.values())


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
  """The command line, and the config's overrides."""
  parser = cli.Parser(
    prog='python -m experiments.compile_ahead',
    description=__doc__.split('\n')[0],
    epilog='Keys of the config can be changed: --config.mesh.expert=8',
    allow_abbrev=False,
  )
  add = parser.add_argument
  add('--config', required=True, help=cli.CONFIG)
  add(
    '--topology',
    default='cpu:64',
    help="devices: CPUs, 'cpu:64', or TPUs, 'v5p:4x4x4', 'v5e:16x16'",
  )
  add(
    '--slices', type=cli.POSITIVE, default=1, help='TPU slices of that topology'
  )
  add(
    '--device',
    default='',
    help="device whose memory must suffice; '': the topology's, or all known",
  )
  add(
    '--flops',
    action=argparse.BooleanOptionalAction,
    default=True,
    help='count FLOPs with XLA too, which compiles two to six short models',
  )
  options, overrides = parser.parse_known_args(argv)
  return options, overrides


@cli.reported()
def main(argv: Sequence[str] | None = None) -> None:
  """Prints the report; the exit status is 0 if the run fits, else 1."""
  options, overrides = parse(argv)
  logging.getLogger('jax').setLevel(logging.ERROR)
  jax.config.update('jax_platforms', 'cpu')
  read, _ = run_config.options_of(options.config, overrides)
  fits = run(
    read, options.topology, options.slices, options.device, options.flops
  )
  if not fits:
    raise SystemExit(1)


if __name__ == '__main__':
  main()
