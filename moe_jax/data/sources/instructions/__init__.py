"""Tasks with instructions that need no network, in clusters of similar ones.

They are made from functions of the running Python's standard library, from
generators of our own, and from django's translations where that package is
installed. To add a task, add it to the `TASKS` of its cluster's file; a new
cluster is a new file, listed here.

    from moe_jax.data.sources import instructions

    instructions.TASKS['reverse']('validation', 0, num_shots=2)

Not here: the source of a run's data (`moe_jax.data.sources.instruction_suite`).
"""

import functools
import hashlib
import importlib.util
import pathlib

from moe_jax.data.sources.instructions import (
  arithmetic,
  ciphers,
  code_reading,
  code_writing,
  letters,
  library,
  number_series,
  recall,
  sequences,
  translation,
)
from moe_jax.data.sources.instructions.contract import Drawn, InstructionTask

__all__ = ['TASKS', 'Drawn', 'InstructionTask', 'identity', 'usable']

_CLUSTERS = (
  code_reading,
  code_writing,
  sequences,
  arithmetic,
  number_series,
  ciphers,
  recall,
  letters,
  translation,
)
TASKS = {task.name: task for file in _CLUSTERS for task in file.TASKS}
_ON_LIBRARY = {
  task.name for file in (code_reading, code_writing) for task in file.TASKS
}


def usable() -> dict[str, InstructionTask]:
  """The tasks by name whose packages are installed."""
  return {
    name: task
    for name, task in TASKS.items()
    if not task.needs or importlib.util.find_spec(task.needs)
  }


def identity(name: str) -> str:
  """A text that is equal only where the examples of a task are."""
  made_from = library.digest() if name in _ON_LIBRARY else ''
  if TASKS[name].needs:
    made_from = f'{TASKS[name].needs} {translation.version()}'
  return f'instructions {name} {_own_digest()} {made_from}'


@functools.cache
def _own_digest() -> str:
  """The sha256 of the code of all tasks, which decides their examples."""
  sha256 = hashlib.sha256()
  for path in sorted(pathlib.Path(__file__).parent.glob('*.py')):
    sha256.update(path.read_bytes())
  return sha256.hexdigest()
