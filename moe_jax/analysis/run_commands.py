"""Commands with which one goes on from a run's folder.

They are the same in a checkout and with an installed package. Not here: the
page that shows them (`run_page.py`).
"""

import pathlib
import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from moe_jax import sections
from moe_jax.analysis.run_facts import FAILED, RunFacts
from moe_jax.run_config import RunConfig
from moe_jax.runs import packed_weights
from moe_jax.runs import workdir as workdir_lib

_CONFIG = '''"""The config of the run in this folder, for flags --config."""

import pathlib

from moe_jax import run_config


def get_config():
  return run_config.from_file(pathlib.Path(__file__).with_name('config.json'))
'''


class Command(NamedTuple):
  """The commands with which one may go on from a run.

  Attributes:
    title: Purpose of the commands, in a few words.
    note: Sentences on them; may be empty.
    lines: The commands, each of which may have several lines.
  """

  title: str
  note: str
  lines: list[str]


def write_config(folder: pathlib.Path) -> None:
  """Writes the file `this_config.py` into a run's folder."""
  if (folder / workdir_lib.CONFIG).exists():
    workdir_lib.write_text(folder / workdir_lib.CONFIG_PY, _CONFIG)


def name_of(folder: pathlib.Path) -> str:
  """A folder as commands name it: its path from the working directory.

  A folder outside that directory is named by its last part alone, so that names
  of other folders of a machine stay on it.
  """
  folder, current = folder.resolve(), pathlib.Path.cwd()
  if folder != current and folder.is_relative_to(current):
    return str(folder.relative_to(current))
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
    facts: The known facts of the run.
    config: Its config.
    ended: Whether no step of it is left.
  """
  run = name_of(folder)
  suitable = (
    []
    if packed_weights.are_in(folder)
    else _train_commands(run, facts, config, ended)
  )
  if facts.generates:
    prompt = _config_text(config, 'sample', 'prompt') or 'Once upon a time'
    words = ['moe_jax.generate', workdir(run), _flag('prompt', prompt)]
    sample = config.get('sample')
    temperature = (
      sample.get('temperature') if isinstance(sample, Mapping) else 0
    )
    if temperature and isinstance(temperature, int | float):
      words.append(f'--temperature={temperature}')
    if facts.by_task:
      words.append('--task=TASK')
    suitable.append(Command('Generate text', '', [_line(*words)]))
  if facts.is_sparse:
    suitable.append(_route_command(folder, run))
  if not facts.model or facts.generates:
    suitable += _export_commands(folder, run, facts)
  page = _line('moe_jax.analysis.run_page', shlex.quote(run))
  return [*suitable, Command('Make this page anew', '', [page])]


def _train_commands(
  run: str, facts: RunFacts, config: Mapping[str, Any], ended: bool
) -> list[Command]:
  """Commands that train: go on, vary, begin with this run's parameters."""

  def train(folder: str, *flags: str) -> str:
    config_flag = _flag('config', f'{run}/{workdir_lib.CONFIG_PY}')
    return _line('moe_jax.main', config_flag, workdir(folder), *flags)

  steps = config.get('total_steps')
  length = f'--config.total_steps={2 * steps if type(steps) is int else "N"}'
  suitable = []
  if not ended:
    note = 'The run goes on from the newest good checkpoint.'
    if facts.state == FAILED:
      note += ' First mend the cause of the error that is shown above.'
    suitable.append(Command('Go on with this run', note, [train(run)]))
  note = 'The schedule of the learning rate is then that of the new length.'
  suitable += [
    Command('Train longer', note, [train(run, length, '--resume')]),
    Command(
      'Train a variant',
      'Any key of the config can be changed; --describe in place of --workdir '
      'prints them all.',
      [train(f'{run}_variant', '--config.seed=1')],
    ),
  ]
  if not _config_text(config, 'distill', 'teacher'):
    start_flags = [_flag('config.init_from.workdir', run), *_as_it_is(config)]
    suitable.append(
      Command(
        'Fine-tune: a new run that begins with these parameters',
        'As it stands, the command trains on the same data; give data, steps '
        'and learning rate of your own with --config.data..., '
        '--config.total_steps=... and --config.optimizer.learning_rate=...',
        [train(f'{run}_finetuned', *start_flags)],
      )
    )
  return suitable


def _as_it_is(config: Mapping[str, Any]) -> list[str]:
  """Flags by which a run is not begun with in the way in which it began.

  It may have begun with a checkpoint, or with copies of experts, of its own.
  """
  section = config.get('init_from')
  if not isinstance(section, Mapping):
    return []
  defaults: Any = sections.section(RunConfig)['init_from']
  return [
    _flag(f'config.init_from.{name}', str(default))
    for name, default in defaults.items()
    if name != 'workdir' and section.get(name, default) != default
  ]


def _route_command(folder: pathlib.Path, run: str) -> Command:
  """Commands that show routers' choices, from the run's trace or a new one."""
  title, module = 'See what the routers did', 'moe_jax.analysis.routes'
  output = _flag('output', f'{run}/routes')
  if (folder / 'trace').is_dir():
    trace = shlex.quote(f'{run}/trace')
    return Command(title, '', [_line(module, trace, output)])
  record_module = 'moe_jax.analysis.record_evaluation'
  trace = _flag('trace', f'{run}/choices')
  return Command(
    title,
    'The first records the choices in an evaluation; the second writes a page '
    'with tables and pictures of them.',
    [
      _line(record_module, workdir(run), trace),
      _line(module, shlex.quote(f'{run}/choices'), output),
    ],
  )


def _export_commands(
  folder: pathlib.Path, run: str, facts: RunFacts
) -> list[Command]:
  """Commands that write the model in another form."""
  note = ''
  if not (folder / workdir_lib.IMPORTED).is_dir():
    note = 'If transformers has no such model, the command says what differs.'
  output = _flag('output', f'{run}_exported')
  export = _line('moe_jax.interop export', workdir(run), output)
  exports = [Command('Export for Hugging Face transformers', note, [export])]
  if packed_weights.are_in(folder) or (facts.model and not facts.has_blocks):
    return exports
  flags = ['--format=int4', *['--kernels=all'] * (not facts.is_sparse)]
  output = _flag('output', f'{run}_int4')
  line = _line(
    'moe_jax.compression quantize', _flag('run', run), output, *flags
  )
  return [*exports, Command('Quantise to 4 bits', '', [line])]


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


def _config_text(config: Mapping[str, Any], section: str, key: str) -> str:
  """A text in a section of a config; '' where there is none."""
  values = config.get(section)
  value = values.get(key) if isinstance(values, Mapping) else ''
  return value if isinstance(value, str) else ''
