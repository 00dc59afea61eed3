"""Runs commands of modules, each in a process that has imported JAX already.

    python -m tests.readme_commands

Each line of the input is a job, as JSON: `argv`, the words after `python -m`,
or after `python` if the first one is a file; `folder`, to run in; `settings`,
values of JAX's options by name; `is_read`, whether the command only reads its
words and its config. For each, a line is printed once it is done: its exit
status and its output. A process that is forked before a backend starts saves
the seconds that an import takes.
"""

import argparse
import importlib
import json
import os
import runpy
import sys
import tempfile
import traceback

import jax

from moe_jax import cli

IMPORTED = (
  *('moe_jax.analysis.hooks', 'moe_jax.training.loop'),
  *('moe_jax.compression', 'matplotlib.pyplot', 'experiments.study.command'),
)


def read_only():
  """Ends each command once its parser and its config have read all words."""
  parse, open_parsers = argparse.ArgumentParser.parse_known_args, []

  def outermost(parser, *args, **kwargs):
    open_parsers.append(parser)
    options, rest = parse(parser, *args, **kwargs)
    open_parsers.pop()
    if open_parsers:  # a subcommand's parser
      return options, rest
    if unknown := [w for w in rest if not w.startswith('--config.')]:
      parser.error(f'unknown arguments {unknown}')
    if config := getattr(options, 'config', ''):
      cli.config_of(config, rest)
    raise SystemExit(0)

  argparse.ArgumentParser.parse_known_args = outermost


def status_of(job):
  """Does in this process what `python -m` does; returns the exit status."""
  os.chdir(job['folder'])
  for name, value in job['settings'].items():
    jax.config.update(name, value)
  if job['is_read']:
    read_only()
  sys.argv = job['argv']
  try:
    if sys.argv[0].endswith('.py'):
      runpy.run_path(sys.argv[0], run_name='__main__')
    else:
      runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
  except SystemExit as end:
    if isinstance(end.code, str):
      print(end.code, file=sys.stderr)
      return 1
    return end.code or 0
  except BaseException:
    traceback.print_exc()
    return 1
  return 0


def outcome(job):
  """Exit status and output of a job in a process of its own."""
  with tempfile.TemporaryFile() as log:
    child = os.fork()
    if not child:
      os.dup2(log.fileno(), 1)
      os.dup2(log.fileno(), 2)
      code = status_of(job)
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    log.seek(0)
    return code, log.read().decode(errors='replace')


if __name__ == '__main__':
  for module in IMPORTED:
    importlib.import_module(module)
  for line in sys.stdin:
    print(json.dumps(outcome(json.loads(line))), flush=True)
