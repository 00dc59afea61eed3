"""Runs of `python -m moe_jax.main` that sweeps and launchers start."""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from moe_jax import cli, run_config
from moe_jax.errors import InputError
from moe_jax.runs import workdir as workdir_lib

FINISHED = 'launched.json'
LOG = 'launch.log'
_OURS = 'moe_jax: '
_LONGEST = 200


@dataclasses.dataclass(frozen=True)
class Item:
  """One run of `python -m moe_jax.main`.

  Attributes:
    config: Config file, with its argument if it has one: 'configs/name.py' or
      'configs/name.py:runlocal'.
    overrides: Values of config keys by dotted name,
      `{'model.moe.num_experts': 4}`.
    workdir: Folder of this run, shared with no other.
  """

  config: str
  overrides: Mapping[str, Any]
  workdir: str

  def flags(self) -> list[str]:
    """The overrides as arguments of `moe_jax.main`."""
    return [f'--config.{key}={value}' for key, value in self.overrides.items()]

  def words(self) -> list[str]:
    """The arguments of `python -m` that start the run: module and flags."""
    main = ['moe_jax.main', f'--config={self.config}']
    return [*main, f'--workdir={self.workdir}', *self.flags()]

  def is_finished(self) -> bool:
    """Whether the workdir has a note that a run equal to this one is finished.

    `note_finished` writes the note. Two runs are equal if their configs and
    their overrides are equal.
    """
    path = pathlib.Path(self.workdir) / FINISHED
    return path.exists() and json.loads(path.read_text()) == self._described()

  def note_finished(self) -> None:
    """Records that all processes of the run have ended with status 0."""
    text = json.dumps(self._described(), indent=2)
    workdir_lib.write_text(pathlib.Path(self.workdir) / FINISHED, text + '\n')

  def _described(self) -> dict[str, Any]:
    described = {'config': self.config, 'overrides': dict(self.overrides)}
    return json.loads(json.dumps(described))


def pair(text: str) -> tuple[str, str]:
  """The key and the value of 'key=value', without 'config.' before the key.

  This is a `type` of argparse, so another text raises argparse's error.
  """
  key, equals, value = text.partition('=')
  if not equals or not key:
    raise argparse.ArgumentTypeError(f'{text!r} is not key=value')
  return key.removeprefix('config.'), value


def add_sweep(parser: argparse.ArgumentParser) -> None:
  """Adds the flag --sweep; its values are the argument `sweeps` of `swept`."""
  parser.add_argument(
    '--sweep',
    type=pair,
    action='append',
    default=[],
    metavar='KEY=V1,V2',
    help='values of a config key; several of these options multiply',
  )


def swept(
  config: str,
  overrides: Sequence[str],
  sweeps: Sequence[tuple[str, str]],
  output: str,
) -> list[Item]:
  """Makes an item for every combination of swept values.

  The value of the last key changes fastest from item to item.

  Args:
    config: Config of every item, 'configs/name.py'.
    overrides: Flags of all items, such as '--config.seed=1'; a flag without a
      value sets its key to true.
    sweeps: Keys, each with its values, separated by commas: ('seed', '0,1').
    output: Folder of the items' workdirs.

  Raises:
    ValueError: A key is given twice.
  """
  shared = [pair(flag if '=' in flag else f'{flag}=true') for flag in overrides]
  shared = [(cli.name_of(key), value) for key, value in shared]
  keys = [key for key, _ in (*shared, *sweeps)]
  for key in keys:
    if keys.count(key) > 1:
      raise InputError(f'{key} is given twice')
  # A workdir's name has the last word of each dotted key, as in
  # 'seed=0,num_experts=4', or all words where the last ones are not unique.
  names = [key.rpartition('.')[2] for key, _ in sweeps]
  if len(set(names)) < len(names):
    names = [key for key, _ in sweeps]
  items = []
  for values in itertools.product(*(text.split(',') for _, text in sweeps)):
    chosen = {key: value for (key, _), value in zip(sweeps, values)}
    name = ','.join(f'{name}={value}' for name, value in zip(names, values))
    folder = pathlib.Path(output) / (name.replace('/', '_') or 'run')
    items.append(Item(config, {**dict(shared), **chosen}, str(folder)))
  return items


def check(items: Sequence[Item]) -> list[run_config.RunConfig]:
  """Checks every item before any run starts; returns the items' options.

  Raises:
    ValueError: A config does not exist or is wrong, or two items share a
      workdir or a folder of checkpoints.
  """
  folders = [pathlib.Path(item.workdir) for item in items]
  options = [run_config.options_of(i.config, i.flags())[0] for i in items]
  directories = [of_item.checkpoint.directory for of_item in options]
  checkpoints = map(workdir_lib.checkpoints_of, folders, directories)
  for setting, paths in (
    ('workdir', folders),
    ('checkpoint.directory', checkpoints),
  ):
    names = list(map(os.fspath, paths))
    names = [n if '://' in n else os.path.realpath(n) for n in names]
    for name in names:
      if names.count(name) > 1:
        raise InputError(f'two items have the {setting} {name}')
  return options


def last_message(log: pathlib.Path) -> str:
  """The last message of this package in a log, or else the log's last line."""
  text = log.read_text(encoding='utf-8', errors='replace')
  lines = [line for line in text.splitlines() if line.strip()] or ['(empty)']
  messages = [line for line in lines if line.startswith(_OURS)]
  return (messages or lines)[-1][:_LONGEST]
