"""Runs notebooks from top to bottom in fresh kernels and stores their outputs.

    python colab/store.py colab/01_routing_tour.ipynb

Views of widgets are not stored: a page cannot move them, and each follows a
picture that stays.
"""

import os
import pathlib
import sys

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = pathlib.Path(__file__).resolve().parents[1]
WIDGET = 'application/vnd.jupyter.widget-view+json'


def own_kernel() -> AsyncKernelManager:
  """A manager of 'python3' as the running interpreter.

  It has no folders to search, so that the specification is ipykernel's own; a
  kernel of that name in the user's folder could be another interpreter.
  """
  specs = KernelSpecManager(kernel_dirs=[], ensure_native_kernel=True)
  return AsyncKernelManager(kernel_name='python3', kernel_spec_manager=specs)


def executed(
  path: pathlib.Path, timeout: float | None = None, **env: str
) -> nbformat.NotebookNode:
  """The notebook as its cells leave it, run on this checkout's code.

  Args:
    path: The file, whose folder the cells run in.
    timeout: Seconds that one cell may take; no limit if None.
    **env: Environment variables of the kernel, beside those that are set here.

  Raises:
    CellExecutionError: A cell raised an error.
  """
  search = [str(ROOT), os.environ.get('PYTHONPATH', '')]
  env = {'PYTHONPATH': os.pathsep.join(filter(None, search)), **env}
  client = NotebookClient(
    nbformat.read(path, as_version=4),
    km=own_kernel(),
    timeout=timeout,
    coalesce_streams=True,
    record_timing=False,
    store_widget_state=False,
    resources={'metadata': {'path': str(path.parent)}},
  )
  return client.execute(env=os.environ | env)


def has_view(output: nbformat.NotebookNode) -> bool:
  """Whether an output is the view of a widget."""
  return WIDGET in output.get('data', {})


def main(paths: list[str]) -> None:
  """Runs and stores each of the files."""
  for path in map(pathlib.Path, paths):
    notebook = executed(path)
    for cell in notebook.cells:
      if 'outputs' in cell:
        cell.outputs = [out for out in cell.outputs if not has_view(out)]
    notebook.metadata.language_info = {'name': 'python'}
    nbformat.write(notebook, path)
    print(f'{path}: {path.stat().st_size / 1e3:.0f} KB')


if __name__ == '__main__':
  main(sys.argv[1:])
