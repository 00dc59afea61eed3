"""Every notebook runs from top to bottom, reads well and keeps its outputs.

Numbers are not compared: a notebook's words must hold, but another machine
rounds otherwise.
"""

import os
import pathlib
import re
import sys

import jax
import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from colab import run_notebooks

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / 'colab').glob('*.ipynb'))
MESHES = ROOT / 'colab' / '05_train_on_an_accelerator.ipynb'
MAX_LINES = 15
MAX_BYTES = 1_000_000
WIDGET = 'application/vnd.jupyter.widget-view+json'
# Pictures at both ends of each slider, in place of sliders. (A view of a slider
# can make nbclient wait for ever.)
ENDS = (
  "import sys, types; sys.modules['ipywidgets'] = types.SimpleNamespace("
  'interact=lambda draw, **ends: [draw(**{name: end[i] for name, end in '
  'ends.items()}) for i in (0, 1)])'
)
# Such paths exist on one machine only: the home of a user, a mounted disk, a
# temporary folder. Colab's own /content is everyone's.
MACHINE_PATH = re.compile(
  r'(?<![\w./:])/(?:home|Users|root|work|workspace|tmp|mnt|opt|usr|var)/\w'
  r'|\b[A-Z]:\\+Users\b|file://|site-packages|/ipykernel_\d'
)

each_notebook = pytest.mark.parametrize(
  'path', NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS]
)


def read(path):
  return nbformat.read(path, as_version=4)


def code_cells(notebook):
  """The code cells that are not empty."""
  cells = [cell for cell in notebook.cells if cell.cell_type == 'code']
  return [cell for cell in cells if cell.source.strip()]


def faults(notebook):
  """Faults of the notebook as it is stored, one line for each."""
  problems = []
  images = 0
  for i, cell in enumerate(code_cells(notebook), 1):
    lines = sum(bool(line.strip()) for line in cell.source.splitlines())
    if lines > MAX_LINES:
      problems.append(f'code cell {i} has {lines} lines > {MAX_LINES}')
    if cell.execution_count != i:
      problems.append(f'code cell {i} was run as number {cell.execution_count}')
    for output in cell.outputs:
      if output.output_type == 'error':
        problems.append(f'code cell {i} keeps an error: {output.ename}')
      if output.get('name') == 'stderr':
        problems.append(f'code cell {i} keeps warnings: {output.text[:80]}')
      if WIDGET in output.get('data', {}):
        problems.append(f'code cell {i} keeps the view of a widget')
      images += 'image/png' in output.get('data', {})
  if not images:
    problems.append('no picture is kept')
  kernel = notebook.metadata.get('kernelspec', {}).get('name')
  if kernel != 'python3':
    problems.append(
      f"kernelspec {kernel!r} is not 'python3'; Colab has no other"
    )
  if not notebook.metadata.get('colab', {}).get('toc_visible'):
    problems.append("no 'colab' metadata that shows the table of contents")
  if 'widgets' in notebook.metadata:
    problems.append('the states of widgets are kept')
  if match := MACHINE_PATH.search(text_of(notebook)):
    problems.append(f"a machine's path: {match[0]!r}")
  return problems


def text_of(notebook):
  """All readable text: sources, printed outputs, metadata, without images."""
  texts = [str(notebook.metadata)]
  for cell in notebook.cells:
    texts += [cell.source, str(cell.metadata)]
    for output in cell.get('outputs', []):
      texts.append(str(output.get('text', '')))
      texts += output.get('traceback', [])
      for kind, value in output.get('data', {}).items():
        if not kind.startswith('image/'):
          texts.append(str(value))
  return '\n'.join(texts)


def test_there_are_notebooks():
  assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize(
  'path', [path for path in NOTEBOOKS if path != MESHES], ids=lambda p: p.stem
)
def test_notebook_runs(path):
  """A notebook runs in quick sizes, in an empty kernel, with this code.

  The one on meshes runs in `test_notebook_meshes.py`, on eight devices.
  """
  notebook = run_notebooks.executed(
    path,
    timeout=600,  # on a busy machine
    begin=ENDS,
    MOE_JAX_QUICK='1',
    JAX_COMPILATION_CACHE_DIR=jax.config.jax_compilation_cache_dir,
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0.2',
  )
  assert all(cell.execution_count for cell in code_cells(notebook))


def test_the_kernel_is_this_interpreter():
  assert run_notebooks.python3_kernel().format_kernel_cmd()[0] == sys.executable


@each_notebook
def test_notebook_is_kept_well(path):
  notebook = read(path)
  nbformat.validate(notebook)
  assert not faults(notebook)
  assert notebook.metadata.colab.name == path.name
  assert path.stat().st_size < MAX_BYTES


def address():
  """The address of the repository, which stands in one place."""
  setup = (ROOT / 'setup.py').read_text(encoding='utf-8')
  return re.search(r"^REPOSITORY = '(.+)'$", setup, re.MULTILINE)[1]


def test_all_notebooks_begin_alike_with_the_address_of_setup():
  """To move the repository, one changes a line and replaces the old address."""
  titles = [cell.source for _, cell, *_ in (read(p).cells for p in NOTEBOOKS)]
  first = [code_cells(read(path))[0].source for path in NOTEBOOKS]
  assert len({*titles}) == len({*first}) == 1
  assert f"REPOSITORY = 'git+{address()}'" in first[0]
  for path in (*NOTEBOOKS, ROOT / 'colab' / 'README.md'):
    text = path.read_text(encoding='utf-8')
    addresses = re.findall(r'github(?:\.com)?/[\w-]+/moe_jax', text)
    assert {*addresses} <= {address().replace('https://', ''), colab_name()}


def colab_name():
  """The repository as the links of Colab name it."""
  return address().replace('https://github.com', 'github')


def test_an_error_fails_the_run_and_its_kernel_ends(tmp_path):
  pid = "import os, pathlib; pathlib.Path('pid').write_text(str(os.getpid()))"
  lines = [pid, 'raise ValueError("seven slots")']
  cells = [nbformat.v4.new_code_cell(line) for line in lines]
  path = tmp_path / 'broken.ipynb'
  nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
  with pytest.raises(CellExecutionError, match='seven slots'):
    run_notebooks.executed(path, timeout=60)
  with pytest.raises(ProcessLookupError):
    os.kill(int((tmp_path / 'pid').read_text()), 0)


def test_faults_are_seen():
  v4 = nbformat.v4
  cells = [
    v4.new_code_cell('x = 1\n' * 16, execution_count=1),
    v4.new_code_cell('y = 2\n\n' * 15, execution_count=3),
    v4.new_code_cell(
      'z',
      execution_count=3,
      outputs=[
        v4.new_output('error', ename='NameError', evalue='z', traceback=[]),
        v4.new_output('stream', name='stderr', text='old option'),
        v4.new_output('stream', name='stdout', text='saved /home/ada/x.png'),
        v4.new_output('display_data', {WIDGET: {'model_id': '7'}}),
      ],
    ),
  ]
  problems = '\n'.join(faults(v4.new_notebook(cells=cells)))
  for part in (
    'cell 1 has 16 lines',
    'cell 2 was run as number 3',
    'cell 3 keeps an error: NameError',
    'cell 3 keeps warnings: old option',
    'cell 3 keeps the view of a widget',
    'no picture',
    "kernelspec None is not 'python3'",
    "no 'colab' metadata",
    "a machine's path: '/home/a'",
  ):
    assert part in problems
  assert 'cell 2 has' not in problems


def test_paths_everyone_has_are_allowed():
  for text in ('/content/moe_jax', 'https://github.com/tmp/x', 'a/home/b'):
    assert not MACHINE_PATH.search(text)
