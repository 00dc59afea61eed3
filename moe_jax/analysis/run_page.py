"""The page of a run, `index.html`: numbers, pictures, commands to go on."""

import base64
import concurrent.futures
import dataclasses
import importlib.metadata
import math
import pathlib
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from moe_jax import models
from moe_jax.analysis import counts, roofline
from moe_jax.config import keys_of
from moe_jax.devices import is_first
from moe_jax.run_config import RunConfig
from moe_jax.runs import metrics
from moe_jax.runs import workdir as workdir_lib
from moe_jax.training.setup import Hook, Run

PAGE, SAMPLE = 'index.html', 'sample.txt'
CURVES, LOAD = 'curves.png', 'load.png'
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy')
# A page is drawn during the training. The next page waits for this many times
# the seconds that the last one took: drawing takes a hundredth of the time at
# most.
_PAUSE = 100
# Whatever text the page shows is escaped, and browsers refuse every script.
_TEMPLATE = pathlib.Path(__file__).with_name('run_page.html')


class Page(Hook):
  """Writes `index.html`, `curves.png` and `load.png` into a run's folder.

  The three files are written at the start, anew in a thread after evaluations
  and before checkpoints, and at the end, also of a run that is stopped or
  fails. If a file cannot be written, the run says so and goes on. This hook
  comes after the hooks whose files the page shows.
  """

  _run: Run | None = None
  _pause_until = 0.0
  _problem = ''

  def start(self, run: Run) -> None:
    """Collects facts about the machine; a thread then writes the first page."""
    if not is_first():
      return
    self._run, self._outer_error = run, sys.exception()
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'page')
    self._environment = {
      'devices': roofline.describe_mesh(run.mesh),
      'started': _now(),
      'Python': f'{platform.python_version()}, {platform.system()} '
      f'{platform.machine()}',
      **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    self.paused()

  def paused(self) -> None:
    """Has the thread draw the page, unless it draws one or just drew one."""
    if self._run is not None and time.monotonic() >= self._pause_until:
      self._pause_until = math.inf
      self._thread.submit(self._write, self._run, 'In training')

  def end(self, run: Run, state: object) -> None:
    """Writes the last page, with the files that other hooks have written."""
    self._write_last('Finished')

  def close(self) -> None:
    """Writes the last page of a run that was stopped or that failed."""
    error = sys.exception()
    if self._run is None or error is None or error is self._outer_error:
      self._write_last('Stopped')
    elif isinstance(error, KeyboardInterrupt):
      self._write_last('Stopped', 'interrupted')
    else:
      folder = self._run.workdir
      message = str(error).replace(str(folder), folder.name)
      self._write_last('Failed', message or type(error).__name__)

  def _write_last(self, state: str, message: str = '') -> None:
    if (run := self._run) is not None:
      self._thread.shutdown(cancel_futures=True)
      self._write(run, state, message)
      if state == 'Finished' and not self._problem:
        run.message(f'page: {run.workdir / PAGE}')
      self._run = None

  def _write(self, run: Run, state: str, message: str = '') -> None:
    """Writes the page; raises no error, and prints the first error."""
    start_time = time.monotonic()
    try:
      run.recorder.confirm()
      write(run, state, message, self._environment)
    except Exception as error:
      if not self._problem:
        self._problem = f'{type(error).__name__}: {error}'
        run.message(f'{PAGE} was not written: {self._problem}')
    now = time.monotonic()
    self._pause_until = now + _PAUSE * (now - start_time)


def write(
  run: Run, state: str, message: str, environment: Mapping[str, str]
) -> None:
  """Writes the page and the pictures of a run into its folder.

  Args:
    run: The run.
    state: What the run does, such as 'In training'.
    message: Message of the error that ended the run; '' without an error.
    environment: Texts on devices, versions and the time of the start, by name.
  """
  folder = run.workdir
  path, sample = folder / metrics.FILE_NAME, folder / SAMPLE
  rows = metrics.read_metrics(path) if path.exists() else []
  step = max((row['step'] for row in rows), default=0)
  # Imported here, as a run's first step would wait for matplotlib.
  from moe_jax.analysis import plot_style

  template = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
  ).from_string(_TEMPLATE.read_text(encoding='utf-8'))
  name = name_of(folder)
  page = template.render(
    title=folder.resolve().name,
    state=f'{state}: step {step:,} of {run.options.total_steps:,}.',
    message=message,
    facts={**_facts(run, rows), **environment},
    curves=_picture(folder / CURVES, plot_style.curves_figure(rows)),
    load=_picture(folder / LOAD, plot_style.load_figure(rows)),
    sample=sample.read_text(encoding='utf-8') if sample.exists() else '',
    changed=[key for key in keys_of(RunConfig, run.config) if key.changed],
    required=dataclasses.MISSING,
    run=name,
    commands=commands(run, name),
    now=_now(),
  )
  workdir_lib.write_text(folder / PAGE, page)


def commands(run: Run, name: str) -> dict[str, str]:
  """The commands that continue or use a run, by what they do.

  Args:
    run: The run.
    name: The run's folder, as commands name it.
  """
  options, quote = run.options, shlex.quote
  workdir, quoted = f'--workdir={quote(name)}', quote(name)
  train = f'moe_jax.main --config={quote(f"{name}/{workdir_lib.CONFIG_PY}")}'
  # In the command to fine-tune this run, the options by which the run itself
  # began with another get their defaults, since its parameters need no change.
  start = ' '.join(
    quote(f'--config.{leaf.path}={leaf.default}')
    for leaf in keys_of(RunConfig, run.config)
    if leaf.changed
    and leaf.path.startswith(('init_from.', 'distill.'))
    and leaf.path != 'init_from.workdir'
  )
  lines = {
    'Go on, or train longer': f'{train} {workdir} '
    f'--config.total_steps={2 * options.total_steps} --resume',
    'Train a variant': f'{train} --workdir={quote(f"{name}_variant")} '
    '--config.seed=1',
    'Fine-tune': f'{train} --workdir={quote(f"{name}_finetuned")} '
    f'--config.init_from.workdir={quoted} {start}'.rstrip(),
  }
  try:
    models.check_generates(run.model)
  except ValueError:
    pass
  else:
    lines |= {
      'Generate text': f'moe_jax.generate {workdir} '
      f'--prompt={quote(options.sample.prompt or "Once ")}',
      'Export for Hugging Face transformers': 'moe_jax.interop export '
      f'{workdir} --output={quote(f"{name}_exported")}',
      'Quantise to 4 bits': 'moe_jax.compression quantize '
      f'--run={quoted} --output={quote(f"{name}_int4")} --format=int4',
    }
  if run.model.stacks.sparse_layers:
    choices = quote(f'{name}/choices')
    lines['See what the routers did'] = (
      f'moe_jax.analysis.record_evaluation {workdir} --trace={choices}\n'
      f'python -m moe_jax.analysis.routes {choices} '
      f'--output={quote(f"{name}/routes")}'
    )
  return {title: f'python -m {line}' for title, line in lines.items()}


def _picture(path: pathlib.Path, figure: Any) -> str:
  """Writes a figure as a file, and returns it as a data URL; '' for None."""
  from moe_jax.analysis import plot_style

  if figure is None:
    return ''
  plot_style.save(figure, path)
  content = base64.b64encode(path.read_bytes()).decode()
  return f'data:image/png;base64,{content}'


def _facts(run: Run, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
  """The facts about a run that its page shows, by name; '' where not known."""

  def values(key: str) -> list[float]:
    return [row[key] for row in rows if isinstance(row.get(key), int | float)]

  cost = counts.count(run.model, run.options.data.seq_len)
  speeds = sorted(values('train/tokens_per_second'))
  losses, drops = values('train/loss'), values('train/drop_rate')
  sparse_layers = run.model.stacks.sparse_layers
  return {
    'model': type(run.options.model).__name__,
    'sparse layers': ', '.join(map(str, sparse_layers)),
    'parameters': f'{cost.total_params:,}',
    'active per token': f'{cost.active_params:,}' if sparse_layers else '',
    'last training loss (nats/token)': f'{losses[-1]:.4f}' if losses else '',
    'dropped choices': f'{drops[-1]:.1%}' if drops else '',
    'median speed': f'{speeds[len(speeds) // 2]:,.0f} tokens/s'
    if speeds
    else '',
  }


def _now() -> str:
  return time.strftime('%Y-%m-%d %H:%M %Z')


def name_of(folder: pathlib.Path) -> str:
  """A folder as commands name it: its path from the working directory.

  A folder outside that directory is named by its last part alone, so that the
  page does not tell the names of a machine's other folders.
  """
  folder, current = folder.resolve(), pathlib.Path.cwd()
  if folder != current and folder.is_relative_to(current):
    return str(folder.relative_to(current))
  return folder.name
