"""The files in a run's folder, each with its purpose.

Not here: what they contain (`run_sections.py`).
"""

import pathlib
from typing import NamedTuple

from moe_jax.analysis import html_pages, run_facts
from moe_jax.runs import workdir as workdir_lib

CURVES, LOAD, PAGE = 'curves.png', 'load.png', 'index.html'
REPORT, SAMPLE = 'routing_report.json', 'sample.txt'
_FILES = {
  PAGE: 'this page',
  'metrics.jsonl': 'a line of JSON for each logged step and each evaluation',
  'tensorboard': 'the same numbers for TensorBoard',
  CURVES: 'the curves',
  LOAD: "the load of each layer's experts over steps",
  'routing_report.md': 'what the routers did, as Markdown',
  REPORT: 'the same as JSON',
  SAMPLE: 'text from the trained model',
  'checkpoints': 'the newest checkpoints and the best, each with its manifest',
  'weights': 'the variables of a model in codes of few bits',
  'config.json': 'the whole config of the run',
  workdir_lib.CONFIG_SHA256: 'the sha256 of its values',
  workdir_lib.CONFIG_PY: 'the same config for commands that take --config',
  'config.py': 'the config with which the imported model began',
  'first_config.json': 'the values that config.py reads',
  'tokenizer.json': 'the tokenizer',
  'huggingface': 'files of the checkpoint that was imported',
  run_facts.FILE: 'model, machine and state of the run, for this page',
  'plugins.json': "sha256 of each file with a user's own class",
  'trace': 'the choices of experts of single tokens',
  'choices': 'the choices of experts in an evaluation',
  'profile': 'profiles of training steps',
  'nonfinite': 'batches of steps whose loss or gradient was not finite',
}


class FileLine(NamedTuple):
  """A file or folder of a run: name, purpose, and whether to link it."""

  name: str
  purpose: str
  is_link: bool


def files(folder: pathlib.Path) -> list[FileLine]:
  """The files of a run that are there, or will be once the page is written."""
  paths = {path.name: path for path in folder.iterdir()}
  examples = {
    name: 'what the model wrote in an evaluation'
    for name in sorted(paths)
    if name.endswith('_examples.txt')
  }
  return [
    FileLine(name, purpose, not paths[name].is_dir())
    for name, purpose in (_FILES | examples).items()
    if name in paths and name != PAGE
  ]


def trace_pages(folder: pathlib.Path) -> list[str]:
  """Pages on traces in the run's folder, by their names from there."""
  name = html_pages.ROUTES
  pages = [*folder.glob(name), *folder.glob(f'*/{name}')]
  return sorted(path.relative_to(folder).as_posix() for path in pages)
