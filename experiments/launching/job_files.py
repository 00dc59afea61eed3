"""Files of jobs on clusters, made from the templates beside this file."""

import argparse
import json
import pathlib
import re
import shlex
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

import jinja2

from experiments.launching import topologies
from experiments.launching.topologies import Topology
from moe_jax import run_config
from moe_jax.errors import InputError
from moe_jax.items import Item
from moe_jax.runs import workdir

FOLDER = pathlib.Path('runs/jobs')  # of job files that are submitted
_LONGEST_NAME = 40  # of a workload of xpk; names of pods are longer


class _Target(NamedTuple):
  """A way to submit jobs.

  Attributes:
    suffix: Ending of the job file.
    submit: Command that submits the file, whose path follows.
    flags: Options of the command line that are needed; others of
      `_FLAGS` have no effect.
    runs_on: Devices of a job: 'nodes' of GPUs, a 'slice' of TPUs, or several
      'slices'.
  """

  suffix: str
  submit: str
  flags: Sequence[str]
  runs_on: Sequence[str]


_FLAGS = ('image', 'cluster', 'volume')
_ALL = ('nodes', 'slice', 'slices')
TARGETS = {
  'sbatch': _Target('sh', 'sbatch', (), _ALL[:1]),
  'jobset': _Target('yaml', 'kubectl apply -f', ('image', 'volume'), _ALL),
  'xpk': _Target('sh', 'bash', ('image', 'cluster'), _ALL[1:]),
  'skypilot': _Target('yaml', 'sky jobs launch', ('volume',), _ALL[:2]),
}


def check(options: argparse.Namespace, topology: Topology) -> None:
  """Refuses what the target `options.to` cannot run, or has no use for.

  Raises:
    ValueError: The devices do not exist there, or an option is missing or has
      no effect.
  """
  to, several = options.to, 'slices' if topology.groups > 1 else 'slice'
  devices = several if topology.shape else 'nodes'
  able = [name for name, t in TARGETS.items() if devices in t.runs_on]
  if to not in able:
    raise InputError(f'--to={to} cannot run on {topology}; have --to={able}')
  for flag in _FLAGS:
    is_needed = flag in TARGETS[to].flags
    if bool(getattr(options, flag)) != is_needed:
      problem = 'needs' if is_needed else 'does not use'
      raise InputError(f'--to={to} {problem} --{flag}')


def job_name(item: Item, first: str = '') -> str:
  """The name of an item's job: letters, digits and '-', as Kubernetes has it.

  Args:
    item: The run.
    first: First part of the name; '' is the config's name. A second part tells
      swept values.

  Raises:
    ValueError: The name is too long, or does not begin with a letter.
  """
  words = [first or pathlib.PurePath(item.config.replace(':', '-')).stem]
  words += [name for name in [pathlib.Path(item.workdir).name] if '=' in name]
  name = re.sub('[^a-z0-9]+', '-', '-'.join(words).lower()).strip('-')
  if not name[:1].isalpha() or len(name) > _LONGEST_NAME:
    raise InputError(
      f'the job name {name!r} has to begin with a letter and have at most '
      f'{_LONGEST_NAME} letters, digits and -; give another --name'
    )
  return name


def render(item: Item, options: argparse.Namespace) -> str:
  """The text of an item's job file.

  Args:
    item: The run.
    options: The command line of `experiments.launch`.

  Raises:
    ValueError: The mesh does not fit the topology, the workdir would be lost
      with the job, or the target has no such devices.
  """
  topology = topologies.topology_of(options.topology)
  check(options, topology)
  run_options, _ = run_config.options_of(item.config, item.flags())
  mesh = topologies.mesh_on(run_options, topology)
  sizes = ', '.join(f'{axis} {size}' for axis, size in mesh.items())
  folder = workdir.folder_of(item.workdir)
  volume, _, mount = options.volume.rpartition(':')
  if options.to != 'sbatch' and not folder.is_relative_to(mount or '/'):
    raise InputError(
      f'the workdir {folder} would be lost with the machines: give an --output '
      f'below {mount or "the folder of an attached storage"}'
    )
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
  )
  environment.filters |= {'json': json.dumps, 'quote': shlex.quote}
  return environment.get_template(f'{options.to}.jinja').render(
    vars(options),
    summary=f'{item.config} on {topology}; mesh: {sizes}',
    name=job_name(item, options.name),
    topology=topology,
    words=item.words(),
    volume=volume,
    mount=mount,
  )


def run(items: Sequence[Item], options: argparse.Namespace) -> int:
  """Prints the job file of each item, or writes and submits all of them.

  Returns:
    The exit status: 0, or that of the first command that failed.
  """
  target = TARGETS[options.to]
  texts = [render(item, options) for item in items]
  if not options.submit:
    print('---\n'.join(texts), end='')
    return 0
  FOLDER.mkdir(parents=True, exist_ok=True)
  # The other templates have these options among their own.
  words = options.option if target.suffix == 'yaml' else []
  for item, text in zip(items, texts):
    path = FOLDER / f'{job_name(item, options.name)}.{target.suffix}'
    path.write_text(text, encoding='utf-8')
    command = [*target.submit.split(), str(path), *words]
    print(shlex.join(command), flush=True)
    if status := subprocess.run(command).returncode:
      return status
  return 0
