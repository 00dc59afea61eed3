"""Command lines: config files, their overrides, flags, and short messages.

A config is named by a path, 'configs/tiny_switch.py', or by a name that works
in every folder: 'moe_jax:tiny_switch' is the file `tiny_switch.py` of the
package `moe_jax.configs`, and configs of another installed package are named
alike. Text after one more colon is the argument of `get_config`. Flags such as
`--config.seed=1` override keys.
"""

import argparse
import contextlib
import difflib
import importlib
import importlib.machinery
import importlib.util
import io
import os
import pathlib
import re
import signal
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TextIO, cast

import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from moe_jax.config import (
  Field,
  Option,
  OptionError,
  Options,
  flatten,
  merge,
  read_options,
  settle,
  unknown,
  unknown_key_text,
  unknown_text,
  value_problem,
)
from moe_jax.errors import InputError, ReportedError

# Exit status (EX_TEMPFAIL) of a run that SIGTERM stopped before its last step;
# the same command continues the run.
STOPPED = 75
# Exit status of a program that Ctrl-C stopped, as shells have it.
INTERRUPTED = 128 + signal.SIGINT
# Errors whose message says what to do; any other is a defect of the program,
# of a library or of a user's class, and keeps its traceback.
REPORTED = (MemoryError, OSError, ReportedError)
CONFIG = 'path of a config file, own.py, or name of one, moe_jax:tiny_switch'
# The console command of each module that `python -m` can also start.
CONSOLE = {
  'moe_jax.analysis.cost': 'moe-cost',
  'moe_jax.analysis.routes': 'moe-routes',
  'moe_jax.compression': 'moe-compress',
  'moe_jax.data.prepare': 'moe-prepare',
  'moe_jax.generate': 'moe-generate',
  'moe_jax.interop': 'moe-interop',
  'moe_jax.main': 'moe-train',
  'moe_jax.sweep': 'moe-sweep',
}
_MOE_JAX = 'moe_jax'
_NUMBER = re.compile(r'-[\d.]+(e[+-]?\d+)?')
_PACKAGE = re.compile(r'[a-zA-Z_]\w*(\.[a-zA-Z_]\w*)*')
_NO_BOOLEAN = re.compile(r"\('Non-boolean argument to boolean flag', (.*)\)")
_NO_NUMBER = re.compile(r'could not convert string to float: (.*)')
_NO_INTEGER = re.compile(r'invalid literal for int\(\) with base 10: (.*)')
# Beginnings of JAX's messages about JAX_PLATFORMS.
_PLATFORM = ('Unable to initialize backend', 'Unknown backend')


def config_of(
  base: str | ml_collections.ConfigDict, overrides: Sequence[str] = ()
) -> ml_collections.ConfigDict:
  """Returns a config with `--config.key=value` overrides applied.

  Args:
    base: A config, or its path or name.
    overrides: Flags such as '--config.seed=1'.

  Raises:
    ValueError: The file or a key does not exist, or a value has another type;
      all such overrides are named.
  """
  config, problems = applied(base, overrides)
  if problems:
    raise OptionError(problems)
  return config


def applied(
  base: str | ml_collections.ConfigDict, overrides: Sequence[str]
) -> tuple[ml_collections.ConfigDict, list[str]]:
  """A config with the overrides that fit it, and the problems of all others.

  Overrides are flags such as '--config.seed=1'; a value of another type than
  the key's does not fit. `base` is a config, or its path or name.

  Raises:
    ValueError: The file cannot be read.
  """
  config = merge(load_config(base) if isinstance(base, str) else base, {})
  problems = []
  for word in overrides:
    # A key that does not exist is found first, since ml_collections' error for
    # such a key does not give its path.
    if problem := _unknown_key(config, name_of(word)):
      problems.append(problem)
      continue
    values, argv = flags.FlagValues(), ['', word]
    config_flags.DEFINE_config_dict(
      'config',
      config,
      '',
      flag_values=values,
      accept_new_attributes=True,  # in open sections
      lock_config=False,
      sys_argv=argv,
    )
    try:
      values(argv)
    except flags.Error as error:
      text = str(error).strip().splitlines()[0]
      text = _NO_BOOLEAN.sub(r'\1 is no boolean; give the flag alone', text)
      text = _NO_INTEGER.sub(r'\1 is no integer; give one, such as 1000', text)
      problems.append(_NO_NUMBER.sub(r'\1 is no number', text))
  return config, problems


def options_of(
  root: type[Options],
  base: str | ml_collections.ConfigDict,
  overrides: Sequence[str] = (),
  part: str = '',
) -> tuple[Any, list[str]]:
  """The options of a config with overrides, or of a part of the config.

  Args:
    root: The class of the options.
    base: A config, or its path or name.
    overrides: Flags such as '--config.seed=1'. Flags that have no effect are
      refused.
    part: Name of the section of the config that is read; '' reads it all.

  Returns:
    The options, and a line for each value of the file that is ignored since it
    has no effect.

  Raises:
    ValueError: The message gives everything that is wrong, by name.
  """
  config, problems = applied(base, overrides)
  section: Any = (
    config.get(part, ml_collections.ConfigDict()) if part else config
  )
  path = f'{part}.' if part else ''
  names = list(map(name_of, overrides))
  settled, ignored = settle(root, section, names, path)
  options = None
  try:
    options = read_options(root, settled, path)
  except OptionError as error:
    problems += error.problems
  if problems:
    raise OptionError(problems)
  return options, [
    f'{name}={value!r} has no effect with these flags; ignored'
    for name, value in ignored.items()
  ]


def said_options(
  root: type[Options], base: str, overrides: Sequence[str], part: str
) -> Any:
  """The options of a config's section `part`, as checked by `options_of`.

  A line is printed for each value of the file that is ignored, since it has no
  effect.
  """
  options, ignored = options_of(root, base, overrides, part)
  say(ignored)
  return options


def name_of(override: str) -> str:
  """The dotted name of the key that '--config.seed=1' overrides."""
  return override.partition('=')[0].lstrip('-').removeprefix('config.')


def _unknown_key(config: ml_collections.ConfigDict, name: str) -> str | None:
  """The message for a dotted `name` that is no key; None if it may be set."""
  keys: dict[str, Any] = flatten(config)
  section: Any = config
  path, rest = list[str](), name.split('.')
  if name in keys:
    return None
  while rest and isinstance(section.get(rest[0]), ml_collections.ConfigDict):
    section = section[rest[0]]
    path.append(rest.pop(0))
  is_open = bool(path) and not section.is_locked
  if is_open and len(rest) == 1:
    return None
  if not rest:
    return (
      f'unknown config key {name!r}: it is a section, whose keys are set, '
      f'--config.{name}.KEY=...; have {sorted(section)}'
    )
  # The keys that exist where the first unknown part of the name stands.
  beside = [
    '.'.join([*path, key]) for key in section if flatten({key: section[key]})
  ]
  text = unknown_key_text(name, beside)
  if is_open and rest[0] not in section:
    value = '...'
    for key in reversed(rest[1:]):
      value = f"{{'{key}': {value}}}"
    new = '.'.join([*path, rest[0]])
    text += f'; a new section is given whole: --config.{new}="{value}"'
  return text


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
  """A config file's name in messages, its path, and its argument, '' for none.

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


def _run(file: str, path: pathlib.Path) -> types.ModuleType:
  """The module at `path`; errors are ValueErrors that call it `file`."""
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
  """The message for an error of the config at `path`: `file`, line, error."""
  lines = [
    frame.lineno
    for frame in traceback.extract_tb(error.__traceback__)
    if pathlib.Path(frame.filename) == path
  ]
  line = getattr(error, 'lineno', None) or (lines[-1] if lines else None)
  location = file if line is None else f'{file}, line {line}'
  message = getattr(error, 'msg', None) or str(error)
  return f'{location}: {type(error).__name__}: {message}'


def program(module: str) -> str:
  """The words with which the user can start a module.

  Returns:
    The module's console command, such as 'moe-train', if the user has started
    this program by such a command; or else 'python -m moe_jax.main'.
  """
  console = CONSOLE.get(module)
  if console and pathlib.Path(sys.argv[0]).stem in CONSOLE.values():
    return console
  return f'python -m {module}'


def about(text: str | None) -> dict[str, Any]:
  """Keyword arguments of argparse's parser: a help made of a docstring.

  Args:
    text: The docstring of the command's module: a sentence, and examples.
  """
  text = text or ''  # python -OO keeps no docstrings
  # A backslash at the end of a docstring's line has joined it with the next
  # line; here both are put back.
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
  """The text with each 'python -m moe_jax...' as the user can start it."""
  return re.sub(r'python -m (moe_jax[\w.]*)', lambda m: program(m[1]), text)


def complain(text: str) -> None:
  """Prints a message to standard error, where a closed pipe is no error."""
  print_line(f'moe_jax: {text}', sys.stderr)


def fail(text: str) -> NoReturn:
  """Prints the reason and ends the program with status 1."""
  complain(text)
  sys.exit(1)


@contextlib.contextmanager
def reported(show_traceback: bool = False) -> Iterator[None]:
  """Ends the program with a message where the body raises a user's mistake.

  Ctrl-C, too, ends the program without a traceback, with status 130.

  Args:
    show_traceback: Whether errors are raised as they are, with a traceback. If
      the environment has MOE_JAX_TRACEBACK, errors always are.
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
    # Without a GPU, JAX passes over 'cuda' and then has no platform at all, so
    # that an assertion of its own fails.
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
    if message.endswith('required: --config'):
      message += ', such as --config=moe_jax:tiny_switch'
    fail(message)

  def unknown(self, words: Sequence[str]) -> NoReturn:
    """Ends the program with a message on unknown words and the nearest flag."""
    name, flags = words[0].partition('=')[0], [*self._option_string_actions]
    near = difflib.get_close_matches(name, flags, n=1)
    hint = f'; did you mean {near[0]}?' if near else ''
    self.error(f'unknown arguments {list(words)}{hint}')


def parser(module: str, text: str | None) -> Parser:
  """The parser of a module's command; the docstring `text` becomes its help."""
  return Parser(prog=program(module), **about(text))


def add_config(parser: argparse.ArgumentParser) -> None:
  """Adds --config, whose overrides `parse_command` takes, and --traceback."""
  parser.add_argument('--config', required=True, help=CONFIG)
  add_traceback(parser)


def add_traceback(parser: argparse.ArgumentParser) -> None:
  """Adds --traceback, with which `reported` raises errors as they are."""
  text = 'show where in the code an error came from'
  parser.add_argument('--traceback', action='store_true', help=text)


def add_allow_module(parser: argparse.ArgumentParser) -> None:
  """Adds --allow_module, a list of modules that a run's config may name."""
  text = 'module or package that the run may import; repeatable'
  parser.add_argument('--allow_module', action='append', default=[], help=text)


def number(kind: type[int | float], **bounds: Any) -> Callable[[str], Any]:
  """A function from an argument's text to a finite number within a range.

  It is for the `type` of argparse; for other texts it raises argparse's error
  or `ValueError`.

  Args:
    kind: `int` or `float`.
    **bounds: Bounds of the number: `minimum`, `above`, `maximum` or `below`.
  """

  field = Field('', kind, None, Option(**bounds))

  def parsed(text: str) -> Any:
    value = kind(text)
    problem = value_problem('', value, field)
    if problem is not None:
      raise argparse.ArgumentTypeError(problem.removeprefix('='))
    return value

  parsed.__name__ = kind.__name__  # named where the text is no number
  return parsed


POSITIVE = number(int, minimum=1)
NOT_NEGATIVE = number(int, minimum=0)
SECONDS = number(float, minimum=0)
SHARE = number(float, above=0, maximum=1)


def print_line(text: str, out: TextIO | io.TextIOBase | None = None) -> None:
  """Prints a line at once; it is no error if its reader has closed the pipe.

  In a pipe (`| tee log`) Ctrl-C ends the reader before the run, which still has
  to save, and must not fail at its next line.

  Args:
    text: The line.
    out: Stream to write to; None is `sys.stdout`.
  """
  stream = sys.stdout if out is None else out
  try:
    print(text, file=stream, flush=True)
  except BrokenPipeError:
    # The stream now writes to the null device, since Python would report the
    # closed pipe once more when it closes the stream.
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def say(lines: Iterable[str]) -> None:
  """Prints lines; it is no error if their reader closes the pipe early."""
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
  has_config: Callable[[argparse.Namespace], Any] | None = None,
) -> tuple[argparse.Namespace, list[str]]:
  """Parses a command that may end in overrides of a config.

  Args:
    parser: The parser; it sets `run`, the function of the command.
    argv: The words of the command; None takes the program's own.
    has_config: Function that says whether the parsed command has a config to
      override; None asks whether the command has --config.

  Returns:
    The options, and the overrides: words such as --config.seed=1.
  """
  rest, overrides = list[str](), list[str]()
  before = ''
  for word in sys.argv[1:] if argv is None else argv:
    is_flag = word.startswith('-') and not _NUMBER.fullmatch(word)
    if before.startswith('--config.') and '=' not in before and not is_flag:
      overrides[-1] += f'={word}'
    elif word.startswith('--config.'):
      overrides.append(word)
    else:
      rest.append(word)
    before = word
  options, others = parser.parse_known_args(rest)
  config = has_config or (lambda options: getattr(options, 'config', ''))
  if others or (overrides and not config(options)):
    parser.unknown(others or overrides)
  return options, overrides


def run_command(options: argparse.Namespace, overrides: list[str]) -> Any:
  """Calls options.run(options, overrides), whose errors `reported` prints."""
  logging.set_verbosity(logging.WARNING)
  ignore_closed_loops()
  with reported(options.traceback):
    return options.run(options, overrides)
