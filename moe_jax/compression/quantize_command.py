"""The command that quantises a run.

    python -m moe_jax.compression quantize --run=runs/tiny --output=runs/int4 \
      --format=int4 --method=gptq --batches=16
"""

import argparse
from typing import Any

from moe_jax import command_line, config_file, sections
from moe_jax.compression import whole_run
from moe_jax.compression.quantize import BATCHES, METHODS, quantize
from moe_jax.data import DataOptions
from moe_jax.errors import InputError
from moe_jax.layers.kernel_format import FORMATS, KernelFormat


def add(commands: Any) -> None:
  """Adds the command `quantize`."""
  text = 'stores experts in codes of few bits'
  command = commands.add_parser(
    'quantize', help=text, **command_line.about(__doc__)
  )
  command.set_defaults(run=_run)
  add = command.add_argument
  whole = command_line.NOT_NEGATIVE
  add('--run', required=True, help='folder of the run', dest='workdir')
  add('--output', required=True, help='folder of the new run')
  add('--step', type=whole, help='checkpoint; else newest')
  add('--format', required=True, choices=FORMATS)
  add('--method', default='gptq', choices=METHODS, help='rtn reads no data')
  add('--batches', type=command_line.POSITIVE, help=f'{BATCHES} if left out')
  add(
    '--config',
    default='',
    help="config of the data, by path or name; else the run's",
  )


def _run(options: argparse.Namespace, overrides: list[str]) -> str:
  data, num_batches = None, options.batches or BATCHES
  if options.method == 'rtn':
    for name in ('batches', 'config'):
      if value := getattr(options, name):
        raise InputError(
          f'--{name}={value} has no effect with --method=rtn, which reads no '
          'data; leave it out'
        )
  if options.config:
    section = config_file.config_of(options.config, overrides).data
    data = sections.read(DataOptions, section, 'data.')
  numbers = quantize(
    options.workdir,
    options.output,
    KernelFormat(options.format),
    step=options.step,
    method=options.method,
    num_batches=num_batches,
    data=data,
    allow=options.allow_module,
  )
  disk = whole_run.bytes_on_disk(options.output)
  return (
    f'{options.output}: {numbers["bytes"]:,.0f} bytes of parameters in memory, '
    f'of {numbers["bytes before"]:,.0f} before; {disk:,} bytes on disk\n'
    f'quantised kernels: {numbers["code bits"]:.2f} bits a weight of codes and '
    f'{numbers["metadata bits"]:.2f} of metadata, zeros '
    f'{100 * numbers["zeros"]:.1f} %'
  )
