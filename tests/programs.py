"""Starts Python programs in the project's folder, as a user does."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def free_port() -> int:
  """A port of this machine that nobody listens at."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def started(*words, env=(), without=(), **options) -> subprocess.Popen:
  """Starts `python WORDS`, whose texts go to pipes.

  Args:
    *words: The words after `python`.
    env: Variables of the environment that are set.
    without: Beginnings of the names of variables that are left out.
    **options: Other options of `subprocess.Popen`.
  """
  kept = {k: v for k, v in os.environ.items() if not k.startswith(without)}
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  options = dict(cwd=ROOT, **pipes) | options
  command = [sys.executable, *map(str, words)]
  return subprocess.Popen(command, env=kept | dict(env), **options)


def run(*words, timeout=300, **options) -> subprocess.CompletedProcess:
  """Runs `python WORDS` to its end, with the options of `started`."""
  with started(*words, **options) as process:
    try:
      out, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
      process.kill()
      raise
  return subprocess.CompletedProcess(words, process.returncode, out, errors)
