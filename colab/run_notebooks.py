"""Runs notebooks from top to bottom in fresh kernels and stores their outputs.

    python colab/run_notebooks.py colab/01_routing_tour.ipynb

Widgets are not shown in the outputs: a page cannot move them, and each follows
a picture that stays. Nor could a program wait for them safely: nbclient
sometimes waits for ever for a cell that holds one.
"""

import os
import pathlib
import sys

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Python's sign that a module cannot be imported.
NO_WIDGETS = "import sys; sys.modules['ipywidgets'] = None"


def python3_kernel() -> AsyncKernelManager:
  """A manager of 'python3' as the running interpreter.

  It has no folders to search, so that the specification is ipykernel's own; a
  kernel of that name in the user's folder could be another interpreter.
  """
  specs = KernelSpecManager(kernel_dirs=[], ensure_native_kernel=True)
  return AsyncKernelManager(kernel_name='python3', kernel_spec_manager=specs)


def executed(
  path: pathlib.Path,
  timeout: float | None = None,
  begin: str = NO_WIDGETS,
  **env: str,
) -> nbformat.NotebookNode:
  """The notebook as its cells leave it, run on this checkout's code.

  Args:
    path: The file, whose folder the cells run in.
    timeout: Seconds that one cell may take; no limit if None.
    begin: A line of Python that the kernel runs before the first cell.
    **env: Environment variables of the kernel, beside those that are set here.

  Raises:
    CellExecutionError: A cell raised an error.
  """
  search = [str(ROOT), os.environ.get('PYTHONPATH', '')]
  env = {'PYTHONPATH': os.pathsep.join(filter(None, search)), **env}
  client = NotebookClient(
    nbformat.read(path, as_version=4),
    km=python3_kernel(),
    timeout=timeout,
    coalesce_streams=True,
    record_timing=False,
    extra_arguments=[f'--IPKernelApp.exec_lines={begin}'],
    resources={'metadata': {'path': str(path.parent)}},
  )
  # Else the kernel of a manager that is given would live on, with its memory.
  return client.execute(env=os.environ | env, cleanup_kc=True)


def main(paths: list[str]) -> None:
  """Runs and stores each of the files."""
  for path in map(pathlib.Path, paths):
    notebook = executed(path)
    notebook.metadata.language_info = {'name': 'python'}
    nbformat.write(notebook, path)
    print(f'{path}: {path.stat().st_size / 1e3:.0f} KB')


if __name__ == '__main__':
  main(sys.argv[1:])
