"""Memory that a process needs to load a checkpoint.

    python -m experiments.bench_loading --gigabytes=10

A random checkpoint in bfloat16 is written in files of at most half a gigabyte
and loaded onto one CPU device and onto eight, by a process for each case. The
bound is the parameters as they are placed, the largest file, and 1 GB. The peak
is VmHWM: all pages of the process that were resident at once, those of Python
and of libraries included. Files are read, not mapped, so that the system's
cache of them is not in it. Parameters that the sharding table leaves whole are
on each device: next to none on the mesh `fsdp=8`; on `expert=4,fsdp=2` half of
all but the experts. Writes `table.md`, `rows.csv` and `results.json` to
`results/bench_loading/<device>`. Linux only.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.benchmarks import random_checkpoint, timing
from experiments.benchmarks.random_checkpoint import Written
from moe_jax import cli

NAME = 'bench_loading'
CASES = '', 'fsdp=8', 'expert=4,fsdp=2'
ROOM = 10**9  # bytes allowed beside the parameters and one file
_CASE = 'experiments.benchmarks.loading_case'


def measure(
  folder: pathlib.Path, written: Written, cases: Sequence[str] = CASES
) -> list[dict[str, Any]]:
  """A row for each mesh, loaded in a process of its own.

  Args:
    folder: The checkpoint.
    written: Its sizes.
    cases: The meshes; '' is one device.

  Raises:
    RuntimeError: A process failed, or loaded other values than were written.
  """
  rows = []
  for mesh in cases:
    child = subprocess.run(
      [sys.executable, '-m', _CASE, str(folder), mesh],
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
      stdout=subprocess.PIPE,
      text=True,
      check=False,
    )
    if child.returncode:
      raise RuntimeError(f'loading onto {mesh!r} failed: {child.returncode}')
    row = json.loads(child.stdout.splitlines()[-1])
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


COLUMNS = {
  'devices': lambda row: row['mesh'] or '1',
  'parameters placed, GB': lambda row: f'{row["placed"] / 1e9:.2f}',
  'before, GB': lambda row: f'{row["before"] / 1e9:.2f}',
  'peak, GB': lambda row: f'{row["peak"] / 1e9:.2f}',
  'bound, GB': lambda row: f'{row["bound"] / 1e9:.2f}',
  'within': lambda row: 'yes' if row['holds'] else 'NO',
  'seconds': '{seconds:.0f}',
}


def report(rows: Sequence[Mapping[str, Any]], written: Written) -> str:
  """The table, in Markdown."""
  f = timing.facts()
  return (
    f'# Memory of loading\n\n{f["device"]} ({f["cores"]} cores), {f["date"]}. '
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
