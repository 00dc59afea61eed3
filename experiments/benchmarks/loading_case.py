"""One checkpoint is loaded in a process of its own, whose memory is measured.

    python -m experiments.benchmarks.loading_case FOLDER MESH

MESH is empty for one device, or the sizes of axes of a mesh of CPU devices:
'fsdp=8'. Prints a line of JSON.
"""

import collections
import json
import math
import pathlib
import re
import sys
import time
from typing import Any

import jax
import numpy as np

from experiments.benchmarks.random_checkpoint import digest_of
from moe_jax import interop, partitioning


def memory() -> dict[str, int]:
  """The resident bytes of this process by Linux' names; VmHWM is the peak."""
  text = pathlib.Path('/proc/self/status').read_text(encoding='utf-8')
  rows = re.findall(r'^(VmHWM|VmRSS|RssAnon):\s+(\d+) kB$', text, re.MULTILINE)
  return {name: 1024 * int(kilobytes) for name, kilobytes in rows}


def measure(folder: str, axes: dict[str, int]) -> dict[str, Any]:
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
      digest += digest_of(np.asarray(shard.data))
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


def main(folder: str, mesh: str) -> None:
  """Measures one case and prints it."""
  axes = {
    name: int(size)
    for name, _, size in (
      part.partition('=') for part in mesh.split(',') if part
    )
  }
  jax.config.update('jax_num_cpu_devices', math.prod(axes.values()))
  print(json.dumps(measure(folder, axes)))


if __name__ == '__main__':
  main(*sys.argv[1:])
