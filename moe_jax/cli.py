"""Command lines: flags, config files, and messages of a line."""

import argparse
import contextlib
import copy
import importlib
import importlib.machinery
import importlib.util
import io
import os
import pathlib
import re
import signal
import sys
import textwrap
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TextIO, cast

import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from moe_jax import cli
from moe_jax.config import (
  Check,
  OptionError,
  Spec,
  at_least,
  flatten,
  unknown,
  unknown_key_text,
  unknown_text,
  value_problem,
)
from moe_jax.errors import InputError, ReportedError

_MOE_JAX = 'moe_jax'
_PACKAGE = re.compile(r'[a-zA-Z_]\w*(\.[a-zA-Z_]\w*)*')
_NO_BOOLEAN = re.compile(r"\('Non-boolean argument to boolean flag', (.*)\)")
_NO_INTEGER = re.compile(r'invalid literal for int\(\) with base 10: (.*)')


def config_of(
  base: str | ml_collections.ConfigDict, overrides: Sequence[str] = ()
) -> ml_collections.ConfigDict:
  """Returns a config with `--config.key=value` overrides applied.

  Args:
    base: A config, or its path or name; see `load_config`.
    overrides: Flags such as '--config.seed=1'.

  Raises:
    ValueError: The file or a key does not exist, or a value has another type.
  """
  # Overrides are set in the config.
  config = load_config(base) if isinstance(base, str) else copy.deepcopy(base)
  argv = ['', *overrides]
  _check_keys(config, dict(_options(argv)))
  values = flags.FlagValues()
  holder = config_flags.DEFINE_config_dict(
    'config',
    config,
    '',
    flag_values=values,
    accept_new_attributes=True,
    lock_config=False,
    sys_argv=argv,
  )
  try:
    values(argv)
  except flags.Error as error:
    raise InputError(flag_problem(error)) from None
  return holder.value


def flag_problem(error: Exception) -> str:
  """A line on a wrong flag, which says what it should be."""
  message = str(error).strip().splitlines()[0]
  if message.startswith('flag --config=None:'):
    return (
      '--config is missing: the config of the run, such as '
      '--config=moe_jax:tiny_switch'
    )
  message = _NO_BOOLEAN.sub(r'\1 is no boolean; give the flag alone', message)
  return _NO_INTEGER.sub(r'\1 is no integer; give one, such as 1000', message)


def load_config(spec: str) -> ml_collections.ConfigDict:
  """The config of a file.

  Args:
    spec: Path 'configs/name.py' or name 'moe_jax:name', either of which may end
      in ':argument'.

  Raises:
    ValueError: The file does not exist, cannot be run, has no `get_config`,
      refuses the argument, or returns something else than a config.
  """
  file, path, argument = _locate(spec)
  module = _run(file, path)
  if not hasattr(module, 'get_config'):
    raise InputError(f'{file} defines no get_config(arg)')
  try:
    config = module.get_config(*([argument] if argument else []))
  except InputError as error:
    raise InputError(f'{file}: {error}') from error
  except Exception as error:
    raise InputError(_error_text(file, path, error)) from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise InputError(
      f'{file}: get_config returned a {type(config).__name__}, not a ConfigDict'
    )
  return config


def _locate(spec: str) -> tuple[str, pathlib.Path, str]:
  """The name of a config's file in messages, its path, and the argument.

  Raises:
    ValueError: There is no such file.
  """
  file, _, argument = spec.partition(':')
  path = pathlib.Path(file)
  if path.is_file():
    return file, path, argument
  if _PACKAGE.fullmatch(file) and path.suffix != '.py' and ':' in spec:
    name, _, argument = argument.partition(':')
    files = package_configs(file)
    if name not in files:
      raise unknown(f'config of {file}', name, files)
    return f'{file}:{name}', files[name], argument
  files = package_configs(_MOE_JAX)
  hint = f'{_MOE_JAX}:{path.stem} works in every folder'
  if path.stem not in files:
    hint = f'{_MOE_JAX}:NAME works in every folder, for NAME: '
    hint += unknown_text('config', path.stem, files)
  problem = f'does not exist under {os.getcwd()}'
  if path.is_dir():
    problem = 'is a folder, and a config is a file'
  raise InputError(f'config file {file!r} {problem}; {hint}')


def package_configs(package: str) -> dict[str, pathlib.Path]:
  """The files of a package's configs by name, sorted.

  Args:
    package: Name of an installed package, whose configs are the files of its
      package `configs`.

  Raises:
    ValueError: The package or its `configs` cannot be imported.
  """
  try:
    folders = importlib.import_module(f'{package}.configs').__path__
  except (ImportError, AttributeError) as error:
    raise InputError(
      f'package {package!r} has no configs: {error}; a config is a file, '
      f'configs/own.py, or a name, {_MOE_JAX}:tiny_switch'
    ) from None
  files = {
    path.stem: path
    for folder in folders
    for path in sorted(pathlib.Path(folder).glob('*.py'))
  }
  files.pop('__init__', None)
  return files


def with_paths(argv: Sequence[str]) -> list[str]:
  """The words of a command line, with a path where --config gives a name.

  ml_collections reads paths alone.

  Raises:
    ValueError: The config's file does not exist.
  """
  words = list(argv)
  for i, word in enumerate(words[1:], start=1):
    flag, equals, spec = word.partition('=')
    if word.startswith('-') and flag.lstrip('-') == 'config':
      at = i if equals else i + 1
      _, path, argument = _locate(spec if equals else words[at])
      words[at] = f'{flag}=' * bool(equals) + f'{path}:{argument}'.rstrip(':')
  return words


def _run(file: str, path: pathlib.Path) -> types.ModuleType:
  """The module of a config file; raises ValueError that names the file."""
  loader = importlib.machinery.SourceFileLoader(path.stem, str(path))
  spec = importlib.util.spec_from_file_location(path.stem, path, loader=loader)
  module = importlib.util.module_from_spec(cast(Any, spec))
  try:
    loader.exec_module(module)
  except ModuleNotFoundError as error:
    raise InputError(
      f'{file}: {error}; modules of your own are looked for in '
      f'{os.getcwd()} and PYTHONPATH'
    ) from None
  except Exception as error:
    raise InputError(_error_text(file, path, error)) from error
  return module


def _error_text(file: str, path: pathlib.Path, error: Exception) -> str:
  """The message for an error of a config file, with the line it is in."""
  lines = [
    frame.lineno
    for frame in traceback.extract_tb(error.__traceback__)
    if pathlib.Path(frame.filename) == path
  ]
  line = getattr(error, 'lineno', None) or (lines[-1] if lines else None)
  location = file if line is None else f'{file}, line {line}'
  message = getattr(error, 'msg', None) or str(error)
  return f'{location}: {type(error).__name__}: {message}'


def check_flags(argv: Sequence[str]) -> None:
  """Checks the config file and the keys that a command line names.

  Raises:
    OptionError: Keys do not exist; all are listed.
    ValueError: The file cannot be read.
  """
  options = dict(_options(argv))
  spec = options.pop('config', None)
  if spec is not None:
    _check_keys(load_config(spec), options)


def _check_keys(
  config: ml_collections.ConfigDict, options: Mapping[str, str]
) -> None:
  """Raises OptionError with all options that are no keys of the config."""
  config_keys = flatten(config)
  problems = [
    unknown_key_text(name, _siblings(name, config_keys))
    + _section_hint(config, name)
    for name in _unknown_keys(config, options)
  ]
  if problems:
    raise OptionError(problems)


def _unknown_keys(
  config: ml_collections.ConfigDict, options: Iterable[str]
) -> Iterator[str]:
  """The names of options that are no keys of the config."""
  config_keys = flatten(config)
  for key in options:
    name = key.removeprefix('config.')
    if name != key and name not in config_keys and not _is_open(config, name):
      yield name


def known_flags(argv: Sequence[str]) -> tuple[str, list[str]]:
  """The config that a command line names, and the overrides of keys it has.

  Raises:
    ValueError: The file cannot be read.
  """
  options = dict(_options(argv))
  spec = options.pop('config', '')
  bad = {f'config.{key}' for key in _unknown_keys(load_config(spec), options)}
  overrides = []
  for word, after in zip(argv[1:], [*argv[2:], '--']):
    name, equals, _ = word.lstrip('-').partition('=')
    if word.startswith('-') and name.startswith('config.') and name not in bad:
      overrides += [word] if equals or after.startswith('-') else [word, after]
  return spec, overrides


def _is_open(config: ml_collections.ConfigDict, name: str) -> bool:
  """Whether `name` may be a new key: its section exists and is not locked."""
  *parents, key = name.split('.')
  for part in parents:
    section = config.get(part)
    if not isinstance(section, ml_collections.ConfigDict):
      return False
    config = section
  return key not in config and not config.is_locked


def _section_hint(config: ml_collections.ConfigDict, name: str) -> str:
  """Text on the flag that sets a key in an open section; '' in a locked one.

  No flag replaces a section, and one that does not exist is given as a whole.
  """
  path, rest = '', name.split('.')
  while rest and rest[0] in config:
    config = cast(Any, config[rest[0]])
    path += f'.{rest.pop(0)}'
    if not isinstance(config, ml_collections.ConfigDict):
      return ''
  if not path or config.is_locked:
    return ''
  if not rest:
    return f'; {name} is a section, whose keys are set: --config{path}.KEY=...'
  text = '...'
  for key in reversed(rest[1:]):
    text = f"{{'{key}': {text}}}"
  return f'; a new section is given whole: --config{path}.{rest[0]}="{text}"'


def _options(argv: Sequence[str]):
  """The (name, value) pairs of `--name=value` and `--name value`."""
  for i, word in enumerate(argv[1:], start=1):
    if word.startswith('-') and word.lstrip('-').startswith('config'):
      name, equals, value = word.lstrip('-').partition('=')
      if not equals:
        value = argv[i + 1] if i + 1 < len(argv) else ''
      yield name, value


def _siblings(name: str, config_keys: dict[str, Any]) -> list[str]:
  """The existing keys beside the first part of `name` that does not exist."""
  name_parts = name.split('.')
  prefix = ''
  for part in name_parts:
    if not any(key.startswith(f'{prefix}{part}.') for key in config_keys):
      break
    prefix += f'{part}.'
  depth = prefix.count('.') + 1
  siblings = [key for key in config_keys if key.startswith(prefix)]
  return sorted({'.'.join(key.split('.')[:depth]) for key in siblings})


# Exit status (EX_TEMPFAIL) of a run that SIGTERM stopped before its last step;
# the same command goes on with it.
STOPPED = 75
# Exit status of a program that Ctrl-C stopped, as shells have it.
INTERRUPTED = 128 + signal.SIGINT
# Errors whose message says what to do; any other is a defect of the program,
# of a library or of a user's class, and keeps its traceback.
REPORTED = (MemoryError, OSError, ReportedError)
CONFIG = 'path of a config file, own.py, or name of one, moe_jax:tiny_switch'
# Console commands by the module that `python -m` starts instead.
CONSOLE = {
  'moe_jax.analysis.cost': 'moe-cost',
  'moe_jax.analysis.routes': 'moe-routes',
  'moe_jax.compression': 'moe-compress',
  'moe_jax.data.prepare': 'moe-prepare',
  'moe_jax.generate': 'moe-generate',
  'moe_jax.interop': 'moe-interop',
  'moe_jax.main': 'moe-train',
}
# Beginnings of JAX's messages about JAX_PLATFORMS.
_PLATFORM = ('Unable to initialize backend', 'Unknown backend')


def program(module: str) -> str:
  """The words that start a module here, as the user started this program.

  Returns:
    'moe-train' or 'python -m moe_jax.main'.
  """
  console = CONSOLE.get(module)
  if console and pathlib.Path(sys.argv[0]).stem in CONSOLE.values():
    return console
  return f'python -m {module}'


def about(text: str | None) -> dict[str, Any]:
  """Arguments of a parser whose help ends with the examples of a docstring.

  Args:
    text: The docstring of the command's module: a sentence, and examples. Text
      after '
  """
  text = text or ''  # python -OO keeps no docstrings
  # A backslash at the end of a docstring's line has joined it with the next.
  text = re.sub(r'(?<=\S) {6,}', ' \\\\\n      ', text)
  first, _, rest = with_programs(text).partition('\n')
  rest = rest.strip('\n')
  return dict(
    description=first,
    epilog=f'examples:\n{rest}' if rest.startswith(' ') else rest,
    formatter_class=_Help,
    allow_abbrev=False,
  )


class _Help(argparse.RawDescriptionHelpFormatter):
  """Help that shows the default of each option that has one."""

  def _get_help_string(self, action: argparse.Action) -> str:
    text, value = action.help or '', action.default
    if isinstance(value, bool) or value in (None, '', [], argparse.SUPPRESS):
      return text
    if not action.option_strings or 'default' in text:
      return text
    return f'{text} (default: %(default)s)'


def with_programs(text: str) -> str:
  """A text that names programs as the user starts them."""
  return re.sub(r'python -m (moe_jax[\w.]*)', lambda m: program(m[1]), text)


def complain(text: str) -> None:
  """Prints what is wrong; a reader that has closed the pipe is no error."""
  print_line(f'moe_jax: {text}', sys.stderr)


def fail(text: str) -> NoReturn:
  """Prints the reason and ends the program with status 1."""
  complain(text)
  sys.exit(1)


@contextlib.contextmanager
def reported(show_traceback: bool = False) -> Iterator[None]:
  """Ends the program with a message where the body raises a user's mistake.

  Ctrl-C ends it without a traceback, too, with the shell's usual status.

  Args:
    show_traceback: Whether errors are raised as they are; they also are where
      the environment has MOE_JAX_TRACEBACK.
  """
  find_own_modules()
  show_traceback = show_traceback or 'MOE_JAX_TRACEBACK' in os.environ
  try:
    yield
  except KeyboardInterrupt:
    complain('interrupted')
    sys.exit(INTERRUPTED)
  except (*REPORTED, RuntimeError) as error:
    is_mistake = isinstance(error, REPORTED) or str(error).startswith(_PLATFORM)
    if show_traceback or not is_mistake:
      raise
    fail(str(error))
  except AssertionError as error:
    # Without a GPU, JAX passes over 'cuda' and then has no platform at all.
    last = traceback.extract_tb(error.__traceback__)[-1]
    if show_traceback or pathlib.Path(last.filename).stem != 'xla_bridge':
      raise
    fail(
      f'JAX_PLATFORMS={os.environ.get("JAX_PLATFORMS")}: JAX finds no such '
      "device; JAX_PLATFORMS='' takes what there is"
    )


def find_own_modules() -> None:
  """Lets modules of the user be imported from the working folder.

  `python -m` does so, too; a console command would not. The folder is searched
  last, so that no file there hides a module of a library.
  """
  if '' not in sys.path:
    sys.path.append('')


class Parser(argparse.ArgumentParser):
  """A parser that reports a wrong argument in one line, with status 1."""

  def error(self, message: str) -> NoReturn:
    """Prints the message and ends the program."""
    fail(message)


def add_config(parser: argparse.ArgumentParser) -> None:
  """Adds --config, which `parse_command` lets overrides follow."""
  parser.add_argument('--config', required=True, help=CONFIG)
  text = 'show where in the code an error came from'
  parser.add_argument('--traceback', action='store_true', help=text)


def number(kind: type[int | float], *checks: Check) -> Callable[[str], Any]:
  """The `type` of an argument that is a finite number within a range.

  Args:
    kind: `int` or `float`.
    *checks: Rules for its values.
  """

  def parsed(text: str) -> Any:
    value = kind(text)
    problem = value_problem('', value, kind, Spec(checks=checks))
    if problem is not None:
      raise argparse.ArgumentTypeError(problem.removeprefix('='))
    return value

  parsed.__name__ = kind.__name__  # named where the text is no number
  return parsed


POSITIVE = number(int, at_least(1))
NOT_NEGATIVE = number(int, at_least(0))
SECONDS = number(float, at_least(0))


def print_line(text: str, out: TextIO | io.TextIOBase | None = None) -> None:
  """Prints a line at once; a reader that has closed the pipe is no error.

  Ctrl-C ends the reader of a pipe, too (`| tee log`), and a run has yet to
  save.

  Args:
    text: The line.
    out: Stream to write to; None is `sys.stdout`.
  """
  stream = sys.stdout if out is None else out
  try:
    print(text, file=stream, flush=True)
  except BrokenPipeError:
    # Python would report the pipe once more when it closes the stream.
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(lines: Iterable[str]) -> None:
  """Prints lines; a reader that closes the pipe early is no error."""
  for line in lines:
    print_line(line)


def ignore_closed_loops() -> None:
  """Silences a report that each thread of a failed save would print.

  Threads of the storage library that still write when a save has failed each
  report that the event loop they belong to is closed.
  """
  old_hook = sys.unraisablehook

  def hook(unraisable):
    if str(unraisable.exc_value) != 'Event loop is closed':
      old_hook(unraisable)

  sys.unraisablehook = hook


def parse_command(
  parser: Parser,
  argv: Sequence[str] | None,
  has_config: Callable[[argparse.Namespace], Any],
) -> tuple[argparse.Namespace, list[str]]:
  """Parses a command that may end in overrides of a config.

  Args:
    parser: The parser, whose commands set `run`.
    argv: The words of the command; None takes the program's own.
    has_config: Whether the parsed command has a config to override.

  Returns:
    The options, and the overrides, words that begin with --config.
  """
  options, overrides = parser.parse_known_args(argv)
  unknown = [word for word in overrides if not word.startswith('--config.')]
  if unknown or (overrides and not has_config(options)):
    parser.error(f'unknown arguments {unknown or overrides}')
  return options, overrides


def run_command(options: argparse.Namespace, overrides: list[str]) -> Any:
  """The result of options.run(options, overrides); see `reported`."""
  logging.set_verbosity(logging.WARNING)
  ignore_closed_loops()
  with reported(options.traceback):
    return options.run(options, overrides)


def parse(
  argv: Sequence[str],
  text: str | None = None,
  other_problems: Callable[[Sequence[str]], list[str]] = lambda _: [],
) -> list[str]:
  """Parses flags for `app.run`; a wrong one ends the program in a few lines.

  Args:
    argv: The words of the command line.
    text: The docstring of the command's module, for --help; see `about`.
    other_problems: Gives what else is wrong where keys do not exist.
  """
  if any(word in ('-h', '-help', '--help', '--helpshort') for word in argv):
    say(_flags_help(text, argv[0]))
    sys.exit(0)
  find_own_modules()
  try:
    cli.check_flags(argv)
    return flags.FLAGS(cli.with_paths(argv))
  except OptionError as error:
    fail('\n'.join([*error.problems, *other_problems(argv)]))
  except (flags.Error, InputError, OSError) as error:
    fail(cli.flag_problem(error))


def _flags_help(text: str | None, program_name: str) -> Iterator[str]:
  """Lines on a command and its own flags; those of libraries are left out."""
  texts = about(text)
  yield from (texts['description'], '', texts['epilog'], '', 'flags:')
  for module, module_flags in flags.FLAGS.flags_by_module_dict().items():
    # absl knows a module that was started by the name of the program.
    if module != program_name and not module.startswith('moe_jax.'):
      continue
    for flag in module_flags:
      sentence = flag.help.partition(';\n')[0]  # absl adds how to repeat it
      line = f'  --{flag.name}: {sentence}'
      yield from textwrap.wrap(line, width=80, subsequent_indent='      ')
