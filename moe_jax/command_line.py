"""Command lines: their flags are parsed, and mistakes reported in a line.

Not here: config files and their overrides (`config_file.py`).
"""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

from absl import flags, logging

from moe_jax import config_file
from moe_jax.data import DataError
from moe_jax.options import Check, Spec, at_least, value_problem
from moe_jax.runs.checkpointer import CheckpointError
from moe_jax.runs.recorder import NonFiniteError

# Exit status (EX_TEMPFAIL) of a run that SIGTERM stopped before its last step;
# the same command goes on with it.
STOPPED = 75
# Exit status of a program that Ctrl-C stopped, as shells have it.
INTERRUPTED = 128 + signal.SIGINT
# Errors whose message says what to do; any other is a defect of the program.
REPORTED = (
  CheckpointError,
  DataError,
  MemoryError,
  NonFiniteError,
  OSError,
  ValueError,
)
# Beginnings of JAX's messages about JAX_PLATFORMS.
_PLATFORM = ('Unable to initialize backend', 'Unknown backend')


def fail(text: str) -> NoReturn:
  """Prints the reason and ends the program with status 1."""
  print(f'moe_jax: {text}', file=sys.stderr)
  sys.exit(1)


@contextlib.contextmanager
def reported(show_traceback: bool = False) -> Iterator[None]:
  """Ends the program with a message where the body raises a user's mistake.

  Ctrl-C ends it without a traceback, too, with the shell's usual status.

  Args:
    show_traceback: Whether errors are raised as they are; they also are where
      the environment has MOE_JAX_TRACEBACK.
  """
  show_traceback = show_traceback or 'MOE_JAX_TRACEBACK' in os.environ
  try:
    yield
  except KeyboardInterrupt:
    print('moe_jax: interrupted', file=sys.stderr)
    sys.exit(INTERRUPTED)
  except (*REPORTED, RuntimeError) as error:
    mistake = isinstance(error, REPORTED) or str(error).startswith(_PLATFORM)
    if show_traceback or not mistake:
      raise
    fail(str(error))


class Parser(argparse.ArgumentParser):
  """A parser that reports a wrong argument in one line, with status 1."""

  def error(self, message: str) -> NoReturn:
    """Prints the message and ends the program."""
    fail(message)


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
  try:
    for line in lines:
      print(line)
    sys.stdout.flush()
  except BrokenPipeError:
    # Python would report the pipe once more when it closes the stream.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def ignore_closed_loops() -> None:
  """Silences a report that each thread of a failed save would print.

  Threads of the storage library that still write when a save has failed each
  report that the event loop they belong to is closed.
  """
  before = sys.unraisablehook

  def hook(unraisable):
    if str(unraisable.exc_value) != 'Event loop is closed':
      before(unraisable)

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
  options, rest = parser.parse_known_args(argv)
  unknown = [word for word in rest if not word.startswith('--config.')]
  if unknown or (rest and not has_config(options)):
    parser.error(f'unknown arguments {unknown or rest}')
  return options, rest


def run_command(options: argparse.Namespace, overrides: list[str]) -> Any:
  """The result of options.run(options, overrides); see `reported`."""
  logging.set_verbosity(logging.WARNING)
  ignore_closed_loops()
  with reported(options.traceback):
    return options.run(options, overrides)


def parse(argv: Sequence[str]) -> list[str]:
  """Parses flags for `app.run`; a wrong one ends the program in a few lines."""
  try:
    config_file.check_flags(argv)
    return flags.FLAGS(argv)
  except (flags.Error, ValueError, OSError) as error:
    fail(config_file.flag_problem(error))
