"""Training steps of two checkouts, timed in turns by two processes.

Both take every case once in each round, so that they meet the machine in the
same state.
"""

import contextlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.benchmarks import timing
from moe_jax.errors import InputError

_SERVER = pathlib.Path(__file__).with_name('step_server.py')
_HERE = _SERVER.parents[2]


class Checkout:
  """A process that takes steps with the code of one checkout.

  Attributes:
    losses: The loss of every step by case, as exact hexadecimal numbers.
  """

  def __init__(self, process: 'subprocess.Popen[str]', folder: pathlib.Path):
    self._process, self._folder = process, folder
    self.losses: dict[str, list[str]] = {}

  def ask(self, request: Any) -> str:
    """Sends a request; returns the answer.

    Raises:
      ValueError: The process has ended.
    """
    stdin, stdout = self._process.stdin, self._process.stdout
    assert stdin and stdout
    with contextlib.suppress(BrokenPipeError):
      stdin.write(json.dumps(request) + '\n')
      stdin.flush()
    if answer := stdout.readline().strip():
      return answer
    raise InputError(
      f'the process of the checkout {str(self._folder)!r} has ended with '
      f'status {self._process.wait()}; its error stands above'
    )

  def take(self, case: str) -> None:
    """Takes one step of a case."""
    self.losses.setdefault(case, []).append(self.ask(case))


@contextlib.contextmanager
def serving(folder: str | os.PathLike[str]) -> Iterator[Checkout]:
  """Starts the process of a checkout, which ends with the context.

  Raises:
    ValueError: The folder is no checkout of this project.
  """
  path = pathlib.Path(folder).resolve()
  if not (path / 'moe_jax').is_dir():
    raise InputError(f'{str(folder)!r} has no folder moe_jax: no checkout')
  with subprocess.Popen(
    [sys.executable, '-P', str(_SERVER)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    cwd=path,
    env={**os.environ, 'PYTHONPATH': str(path)},
    text=True,
  ) as process:
    try:
      yield Checkout(process, path)
    finally:
      process.terminate()


def compare(
  old: str, config: str, cases: Mapping[str, Any], seconds: float
) -> list[dict[str, Any]]:
  """Times the cases of both checkouts, interleaved; one row for each case.

  A last row has the difference between the second case and the first.

  Args:
    old: Folder of the other checkout.
    config: File of the config, which both have.
    cases: Overrides of the config's model by name.
    seconds: Time for all steps together.
  """
  with serving(old) as before, serving(_HERE) as after:
    sides = {'old': before, 'new': after}
    for side in sides.values():
      side.ask({'config': config, 'cases': cases})
    times = timing.interleave(
      {
        (side, case): lambda side=side, case=case: sides[side].take(case)
        for case in cases
        for side in sides
      },
      seconds=seconds,
      most=2000,
    )
  base, other, *_ = cases
  arrays = {key: 1e3 * np.array(values) for key, values in times.items()}
  rows = [
    _row(
      case,
      arrays['old', case],
      arrays['new', case],
      before.losses[case] == after.losses[case],
    )
    for case in cases
  ]
  differences = [arrays[side, other] - arrays[side, base] for side in sides]
  return [*rows, _row(f'{other} minus {base}', *differences, None)]


def _row(case, old, new, same_losses) -> dict[str, Any]:
  spreads = {'old': old, 'new': new, 'change': new - old, 'ratio': new / old}
  return {
    'case': case,
    'rounds': len(old),
    'same_losses': same_losses,
    **{name: timing.Spread.of(values) for name, values in spreads.items()},
  }


def report(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
  """The table of both checkouts' steps, in Markdown."""
  same = {True: 'the same bits', False: 'differ', None: ''}
  columns = {
    'case': '{case}',
    'old ms': '{old:.2f}',
    'new ms': '{new:.2f}',
    'new minus old, ms': '{change:.2f}',
    'new / old': '{ratio:.3f}',
    'losses': lambda row: same[row['same_losses']],
    'rounds': '{rounds}',
  }
  return (
    f'# A training step of {title} in two checkouts\n\n'
    f'{timing.conditions()} Two processes take turns; differences are taken '
    'within a round, too. Random tokens, full rows.\n\n'
    f'{timing.table(rows, columns)}'
  )
