"""Commands with which one goes on from a run's folder.

They are the same in a checkout and with an installed package. Not here: the
page that shows them (`run_page.py`).
"""

import pathlib
import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from moe_jax.analysis.run_facts import FAILED, RunFacts
from moe_jax.runs import packed_weights
from moe_jax.runs import workdir as workdir_lib

# A config file of the run's own, as commands take the names of such files.
CONFIG_PY = 'this_config.py'
_TEXT = '''"""The config of the run in this folder, for flags --config."""

import pathlib

from moe_jax import run_config


def get_config():
  return run_config.from_file(pathlib.Path(__file__).with_name('config.json'))
'''


class Command(NamedTuple):
  """The commands with which one may go on from a run.

  Attributes:
    title: What it does.
    note: Sentences on it; may be empty.
    lines: The commands, each of which may have several lines.
  """

  title: str
  note: str
  lines: list[str]


def write_config(folder: pathlib.Path) -> None:
  """Writes the file `this_config.py` into a run's folder."""
  if (folder / workdir_lib.CONFIG).exists():
    workdir_lib.write_text(folder / CONFIG_PY, _TEXT)


def name_of(folder: pathlib.Path) -> str:
  """A folder as commands name it: from here if it is below, else by its name.

  Names of other folders of a machine stay on it.
  """
  folder, here = folder.resolve(), pathlib.Path.cwd()
  if folder != here and folder.is_relative_to(here):
    return str(folder.relative_to(here))
  return folder.name


def commands(
  folder: pathlib.Path,
  facts: RunFacts,
  config: Mapping[str, Any],
  *,
  ended: bool,
) -> list[Command]:
  """The commands that fit a run.

  Args:
    folder: The run's folder.
    facts: What is known of it.
    config: Its config.
    ended: Whether no step of it is left.
  """
  run = name_of(folder)
  made = (
    []
    if packed_weights.are_in(folder)
    else _training(run, facts, config, ended)
  )
  if facts.generates:
    prompt = _of(config, 'sample', 'prompt') or 'Once upon a time'
    line = ['moe_jax.generate', workdir(run), _flag('prompt', prompt)]
    sample = config.get('sample')
    heat = sample.get('temperature') if isinstance(sample, Mapping) else 0
    if heat and isinstance(heat, int | float):
      line.append(f'--temperature={heat}')
    if facts.by_task:
      line.append('--task=TASK')
    made.append(Command('Generate text', '', [_line(*line)]))
  if facts.is_sparse:
    made.append(_routes(folder, run))
  if not facts.model or facts.generates:
    made += _elsewhere(folder, run, facts)
  page = _line('moe_jax.analysis.run_page', shlex.quote(run))
  return [*made, Command('Make this page anew', '', [page])]


def _training(
  run: str, facts: RunFacts, config: Mapping[str, Any], ended: bool
) -> list[Command]:
  """Commands that train: go on, vary, begin with this run's parameters."""

  def train(folder: str, *flags: str) -> str:
    own = _flag('config', f'{run}/{CONFIG_PY}')
    return _line('moe_jax.main', own, workdir(folder), *flags)

  steps = config.get('total_steps')
  longer = f'--config.total_steps={2 * steps if type(steps) is int else "N"}'
  made = []
  if not ended:
    note = 'It goes on from the newest good checkpoint.'
    if facts.state == FAILED:
      note += ' Mend first what the error above names.'
    made.append(Command('Go on with this run', note, [train(run)]))
  note = 'The schedule of the learning rate is then that of the new length.'
  made += [
    Command('Train longer', note, [train(run, longer, '--resume')]),
    Command(
      'Train a variant',
      'Any key of the config can be changed; --describe in place of --workdir '
      'prints them all.',
      [train(f'{run}_variant', '--config.seed=1')],
    ),
  ]
  if not _of(config, 'distill', 'teacher'):
    start = _flag('config.init_from.workdir', run)
    made.append(
      Command(
        'Fine-tune: a new run that begins with these parameters',
        'As it stands it trains on the same data; give data, steps and '
        'learning rate of your own with --config.data..., '
        '--config.total_steps=... and --config.optimizer.learning_rate=...',
        [train(f'{run}_finetuned', start)],
      )
    )
  return made


def _routes(folder: pathlib.Path, run: str) -> Command:
  """Commands that show routers' choices, from the run's trace or a new one."""
  title, module = 'See what the routers did', 'moe_jax.analysis.routes'
  output = _flag('output', f'{run}/routes')
  if (folder / 'trace').is_dir():
    trace = shlex.quote(f'{run}/trace')
    return Command(title, '', [_line(module, trace, output)])
  record = 'moe_jax.analysis.record_evaluation'
  trace = _flag('trace', f'{run}/choices')
  return Command(
    title,
    'The first records the choices in an evaluation; the second writes a page '
    'with tables and pictures of them.',
    [
      _line(record, workdir(run), trace),
      _line(module, shlex.quote(f'{run}/choices'), output),
    ],
  )


def _elsewhere(
  folder: pathlib.Path, run: str, facts: RunFacts
) -> list[Command]:
  """Commands that write the model in another form."""
  note = ''
  if not (folder / workdir_lib.IMPORTED).is_dir():
    note = 'Where transformers has no such model, it says what differs.'
  output = _flag('output', f'{run}_exported')
  export = _line('moe_jax.interop export', workdir(run), output)
  made = [Command('Export for Hugging Face transformers', note, [export])]
  if packed_weights.are_in(folder) or (facts.model and not facts.has_blocks):
    return made
  flags = ['--format=int4', *['--kernels=all'] * (not facts.is_sparse)]
  output = _flag('output', f'{run}_int4')
  line = _line(
    'moe_jax.compression quantize', _flag('run', run), output, *flags
  )
  return [*made, Command('Quantise to 4 bits', '', [line])]


def workdir(run: str) -> str:
  """The flag --workdir."""
  return _flag('workdir', run)


def _flag(name: str, value: str) -> str:
  return f'--{name}={shlex.quote(value)}'


def _line(module: str, *words: str) -> str:
  """A command, broken where it would not fit beside a page's margin."""
  lines = [f'python -m {module}']
  for word in words:
    if len(lines[-1]) + len(word) > 78:
      lines[-1] += ' \\'
      lines.append(f'  {word}')
    else:
      lines[-1] += f' {word}'
  return '\n'.join(lines)


def _of(config: Mapping[str, Any], section: str, key: str) -> str:
  """A text in a section of a config; '' where there is none."""
  values = config.get(section)
  value = values.get(key) if isinstance(values, Mapping) else ''
  return value if isinstance(value, str) else ''
