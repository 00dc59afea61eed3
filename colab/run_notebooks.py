"""Runs notebooks from top to bottom in fresh kernels and stores their outputs.

    python colab/run_notebooks.py colab/01_routing_tour.ipynb

`00_one_file.ipynb` is made of `one_file_moe.py` first (`of_one_file`).

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
ONE_FILE = ROOT / 'colab' / 'one_file_moe.py'
_COLAB = 'https://colab.research.google.com'
_BADGE = (
  f'[![Open in Colab]({_COLAB}/assets/colab-badge.svg)]'
  f'({_COLAB}/github/moe-jax/moe_jax/blob/main/colab/00_one_file.ipynb)'
)
_TIME = (
  'It takes about six minutes on a CPU of two cores. A GPU or TPU is used '
  'where the runtime has one, but the notebook was timed on none.'
)
# Headings of sections, by the first words of the file's part below each.
_HEADINGS = {
  'import ': 'Setup',
  '@dataclasses': 'Sizes',
  'class MoE': 'The sparse layer: choose, queue, go there, compute, come back',
  'class Attention': 'The decoder around it',
  'def loss_fn': 'Training',
  'def read_text': 'Text and a picture',
  'def main': 'The run',
}
_INSTALL = """\
import importlib.util
import os
import tempfile

if not importlib.util.find_spec('flax'):
  %pip install -q flax optax

QUICK = bool(os.environ.get('MOE_JAX_QUICK'))  # the sizes of a test
os.chdir(tempfile.mkdtemp())
"""
_RUN = """\
config = Config(total_steps=3, width=32, hidden=64) if QUICK else Config()
params = main(config)
"""
_PICTURE = """\
import matplotlib.pyplot as plt
from IPython.display import HTML

tokens = batch(read_text()[1], config, 0)[:, :-1]
_, aux = Decoder(config).apply({'params': params}, tokens)
_, axes = plt.subplots(1, len(aux['load']), figsize=(8, 2.4), sharey=True)
for axis, load, name in zip(axes, aux['load'], ('first', 'second')):
  colours = [f'C{expert}' for expert in range(config.num_experts)]
  axis.bar(range(config.num_experts), 100 * load, color=colours)
  axis.axhline(100 / config.num_experts, color='grey')  # an even share
  axis.set(title=f'{name} sparse layer', xlabel='expert', ylabel='% of bytes')
plt.show()
HTML(filename='routing.html')
"""
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


def of_one_file() -> nbformat.NotebookNode:
  """The notebook of the one file: a cell for each of its parts, in order."""
  new = nbformat.v4
  words, *parts = ONE_FILE.read_text(encoding='utf-8').split('\n\n\n')
  _, words, imports = words.split('"""')
  title = ['# A mixture of experts in one file', _BADGE, words.strip(), _TIME]
  cells = [new.new_markdown_cell('\n\n'.join(title))]
  cells.append(new.new_code_cell(_INSTALL))
  for part in (imports.strip(), *parts[:-1]):
    for words, heading in _HEADINGS.items():
      if part.startswith(words):
        cells.append(new.new_markdown_cell(f'## {heading}'))
    cells.append(new.new_code_cell(part))
  cells += [new.new_code_cell(_RUN), new.new_code_cell(_PICTURE)]
  for number, cell in enumerate(cells):
    cell.id = f'cell-{number}'  # else it were drawn at random
    cell.source = cell.source.strip()
  return new.new_notebook(cells=cells)


def main(paths: list[str]) -> None:
  """Runs and stores each of the files."""
  for path in map(pathlib.Path, paths):
    if path.stem == '00_one_file':
      nbformat.write(of_one_file(), path)
    notebook = executed(path)
    notebook.metadata.language_info = {'name': 'python'}
    nbformat.write(notebook, path)
    print(f'{path}: {path.stat().st_size / 1e3:.0f} KB')


if __name__ == '__main__':
  main(sys.argv[1:])
