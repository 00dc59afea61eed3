"""Programs in a process of their own, which run in turn with those of others.

    PYTHONPATH=CHECKOUT python -P experiments/benchmarks/turns.py FILE

In one process the threads of PyTorch and those of XLA disturb each other, and
two checkouts of this project have modules of the same names. This file is run
with the modules of other checkouts too, so it imports none of them.
"""

import contextlib
import functools
import importlib.util
import json
import os
import pathlib
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Runs = Mapping[str, Callable[[], Any]]
# The threads of PyTorch wait for their next work on the processors: no other
# case should follow a program of PyTorch at once.
PAUSE: Runs = {'pause': functools.partial(time.sleep, 0.1)}
HERE = pathlib.Path(__file__).parents[2]


@contextlib.contextmanager
def turns(
  file: str,
  arguments: Mapping[str, Any],
  libraries: tuple[str, ...] = (),
  checkout: pathlib.Path = HERE,
) -> Iterator[Runs]:
  """The programs of a file as functions that run them in another process.

  The process sleeps between its turns.

  Args:
    file: A Python file, whose function `programs` gives the programs by name.
    arguments: Arguments of that function, as JSON can hold them. What a program
      returns has to be such a value, too.
    libraries: Names of the libraries that the programs need.
    checkout: The folder of this project whose modules the file imports.

  Raises:
    ValueError: The folder is no checkout of this project, or the process ended.
    SystemExit: One of the libraries is not installed.
  """
  from moe_jax.errors import InputError

  for name in libraries:
    if importlib.util.find_spec(name) is None:
      raise SystemExit(
        f"--peer needs the 'experiments' extra: {name} is not installed"
      )
  if not (checkout / 'moe_jax').is_dir():
    raise InputError(f'{str(checkout)!r} has no folder moe_jax: no checkout')
  process = subprocess.Popen(
    [sys.executable, '-P', __file__, file],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    cwd=checkout,
    env={**os.environ, 'PYTHONPATH': str(checkout)},
    text=True,
  )

  def ask(request):
    stdin, stdout = process.stdin, process.stdout
    assert stdin and stdout
    with contextlib.suppress(BrokenPipeError):
      print(json.dumps(request), file=stdin, flush=True)
    if answer := stdout.readline():
      return json.loads(answer)
    raise InputError(
      f'the process of the checkout {str(checkout)!r} has ended with status '
      f'{process.wait()}; its error stands above'
    )

  with process:
    try:
      yield {name: functools.partial(ask, name) for name in ask(arguments)}
    finally:
      process.terminate()


def main(file: str) -> None:
  """Runs a program of the file for each line of the input, which names it."""
  answers, sys.stdout = sys.stdout, sys.stderr
  arguments = json.loads(sys.stdin.readline())
  runs = runpy.run_path(file)['programs'](**arguments)
  print(json.dumps([*runs]), file=answers, flush=True)
  for line in sys.stdin:
    print(json.dumps(runs[json.loads(line)]()), file=answers, flush=True)


if __name__ == '__main__':
  main(*sys.argv[1:])
