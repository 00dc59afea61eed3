"""Memory that a process needs to load a checkpoint.

    python -m experiments.bench_loading --gigabytes=10

A random checkpoint in bfloat16 is written in files of at most half a gigabyte
and loaded onto one CPU device and onto eight, by a process for each case. The
bound is the parameters as they are placed, the largest file, and 1 GB. The peak
is VmHWM: all pages of the process that were resident at once, those of Python
and of libraries included. Files are read, not mapped, so that the system's
cache of them is not in it. Parameters that the sharding table leaves whole are
on each device: next to none on the mesh `fsdp=8`; on `expert=4,fsdp=2` half of
all but the experts. Writes `table.md` and `results.json` to
`results/bench_loading/<device>`. Linux only.
"""

import collections
import dataclasses
import math
import multiprocessing
import pathlib
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np

from experiments.benchmarks import random_checkpoint, timing
from experiments.benchmarks.random_checkpoint import Written
from moe_jax import cli, interop, partitioning

NAME = 'bench_loading'
# The sizes of the axes of each mesh; none is one device.
CASES = {}, {'fsdp': 8}, {'expert': 4, 'fsdp': 2}
ROOM = 10**9  # bytes allowed beside the parameters and one file


def memory() -> dict[str, int]:
  """The resident bytes of this process by Linux' names; VmHWM is the peak."""
  text = pathlib.Path('/proc/self/status').read_text(encoding='utf-8')
  rows = re.findall(r'^(VmHWM|VmRSS):\s+(\d+) kB$', text, re.MULTILINE)
  return {name: 1024 * int(kilobytes) for name, kilobytes in rows}


def load(folder: pathlib.Path, axes: Mapping[str, int]) -> dict[str, Any]:
  """Loads a checkpoint; numbers by name, bytes unless the name says otherwise.

  Args:
    folder: The checkpoint.
    axes: The sizes of the mesh; {} is the first device alone.
  """
  mesh = partitioning.make_mesh(axes) if axes else None
  jax.block_until_ready(jax.numpy.zeros(1))  # JAX has started
  before, begin = memory(), time.perf_counter()
  loaded = interop.load(folder, mesh=mesh)
  jax.block_until_ready(loaded.variables)
  seconds, after = time.perf_counter() - begin, memory()
  dtypes, digest = collections.Counter(), 0
  leaves = jax.tree.leaves(loaded.variables)
  shards = [shard for leaf in leaves for shard in leaf.addressable_shards]
  for shard in shards:
    dtypes[shard.data.dtype.name] += shard.data.nbytes
    if shard.replica_id == 0:
      digest += random_checkpoint.digest_of(np.asarray(shard.data))
  return {
    'before': before['VmRSS'],
    'peak': after['VmHWM'],
    'left': after['VmRSS'],
    'placed': sum(dtypes.values()),
    'once': sum(leaf.nbytes for leaf in leaves),
    'dtypes': dict(dtypes),
    'digest': digest % 2**64,
    'seconds': seconds,
  }


def _start(num_devices: int) -> None:
  """Gives a new process its CPU devices."""
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', num_devices)


def measure(
  folder: pathlib.Path,
  written: Written,
  cases: Sequence[Mapping[str, int]] = CASES,
) -> list[dict[str, Any]]:
  """A row for each mesh, loaded in a process of its own.

  Args:
    folder: The checkpoint.
    written: Its sizes.
    cases: The sizes of the meshes; {} is one device.

  Raises:
    RuntimeError: A process failed, or loaded other values than were written.
  """
  rows, spawn = [], multiprocessing.get_context('spawn')
  for axes in cases:
    devices = (math.prod(axes.values()),)
    with futures.ProcessPoolExecutor(1, spawn, _start, devices) as pool:
      row = pool.submit(load, folder, axes).result()
    mesh = ','.join(f'{name}={size}' for name, size in axes.items())
    if row['digest'] != written.digest:
      raise RuntimeError(
        f'the sum of all bits is {row["digest"]} on {mesh!r}, and '
        f'{written.digest} in the files'
      )
    bound = row['placed'] + written.largest_file + ROOM
    holds = row['peak'] <= bound
    rows.append({'mesh': mesh, **row, 'bound': bound, 'holds': holds})
    print(rows[-1], flush=True)
  return rows


def _gigabytes(name: str) -> timing.Cell:
  return lambda row: f'{row[name] / 1e9:.2f}'


COLUMNS = {
  'devices': lambda row: row['mesh'] or '1',
  'parameters placed, GB': _gigabytes('placed'),
  'before, GB': _gigabytes('before'),
  'peak, GB': _gigabytes('peak'),
  'bound, GB': _gigabytes('bound'),
  'within': lambda row: 'yes' if row['holds'] else 'NO',
  'seconds': '{seconds:.0f}',
}


def report(rows: Sequence[Mapping[str, Any]], written: Written) -> str:
  """The table, in Markdown."""
  return (
    f'# Memory of loading\n\n{timing.machine()} '
    f'{written.total / 1e9:.2f} GB in bfloat16, {written.files} files of at '
    f'most {written.largest_file / 1e9:.2f} GB; the bound is the parameters as '
    'placed, one file and 1 GB, for the peak of the whole process. Every value '
    f'arrived, by the sum of all bits.\n\n{timing.table(rows, COLUMNS)}\n'
  )


@cli.reported()
def main(argv: Sequence[str] | None = None) -> None:
  """Writes the checkpoint, loads it in all cases and writes the table."""
  parser = timing.parser(NAME, __doc__, peaks=False)
  add, positive = parser.add_argument, cli.number(float, above=0)
  add('--gigabytes', type=positive, default=2.0, help='size of the checkpoint')
  add('--file_gb', type=positive, default=0.5, help='largest size of one file')
  add('--folder', default='', help='folder of the data, which is removed again')
  options = parser.parse_args(argv)
  with tempfile.TemporaryDirectory(dir=options.folder or None) as name:
    folder = pathlib.Path(name)
    config = random_checkpoint.config_of(1e9 * options.gigabytes)
    written = random_checkpoint.write(folder, config, 1e9 * options.file_gb)
    rows = measure(folder, written)
  text = report(rows, written)
  facts = {'config': config, 'written': dataclasses.asdict(written)}
  timing.write(options.output, NAME, text, rows, facts)


if __name__ == '__main__':
  main()
