"""Command lines: their flags are parsed, and mistakes reported in a line."""

import argparse
import contextlib
import os
import pathlib
import re
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

from absl import flags, logging

from moe_jax import config_file
from moe_jax.errors import InputError, ReportedError
from moe_jax.options import Check, OptionError, Spec, at_least, value_problem
from moe_jax.runs.progress import print_line

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
  'moe_jax.prepare': 'moe-prepare',
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
    config_file.check_flags(argv)
    return flags.FLAGS(config_file.with_paths(argv))
  except OptionError as error:
    fail('\n'.join([*error.problems, *other_problems(argv)]))
  except (flags.Error, InputError, OSError) as error:
    fail(config_file.flag_problem(error))


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
