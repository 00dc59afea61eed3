"""Finds by starting XLA which of its flags this jaxlib accepts."""

import importlib.metadata
import pathlib

from tests import programs


def accepts(flag: str, folder: pathlib.Path) -> bool:
  """Whether XLA starts with `flag`; an unknown flag ends the process.

  A child process tries the flag, since the name of a flag that was removed may
  still be in the library. The answer is kept in `folder` for this version.
  """
  version = importlib.metadata.version('jaxlib')
  answer = folder / f'{flag.lstrip("-")}-jaxlib-{version}'
  if not answer.exists():
    env = {'XLA_FLAGS': flag, 'JAX_PLATFORMS': 'cpu'}
    child = programs.run('-c', 'import jax; jax.devices()', env=env)
    folder.mkdir(parents=True, exist_ok=True)
    answer.write_text(str(child.returncode))
  return answer.read_text() == '0'
