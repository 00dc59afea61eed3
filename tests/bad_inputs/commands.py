"""Told bad command lines: the program, its arguments, parts of the message."""

import importlib

import moe_jax.generate
import moe_jax.interop.__main__
import moe_jax.main
from experiments.study import command

SWITCH = '--config=configs/tiny_switch.py:runlocal'


def train(*argv):
  return moe_jax.main.main, [SWITCH, *argv]


def bad_config(text):
  """A training with a config file of this text, which stands in {folder}."""
  return moe_jax.main.main, ['--config={folder}/own.py', text]


def generate(*argv):
  return moe_jax.generate.main, [*argv]


def interop(*argv):
  return moe_jax.interop.__main__.main, [*argv]


def experiment(name, *argv):
  """A command of `experiments`, or a study."""
  module = importlib.import_module(f'experiments.{name}')
  if hasattr(module, 'main'):
    return module.main, [*argv]
  return lambda words: command.main(module.STUDY, words), [*argv]


COMMANDS = [
  ((moe_jax.main.main, []), 'required: --config | --config=moe_jax:'),
  (
    (moe_jax.main.main, ['--config=configs/tiny_switch.py:tiny']),
    'tiny | runlocal',
  ),
  (train(), '--workdir is missing'),
  (train('--confg=x'), "unknown arguments ['--confg=x']"),
  (train('--describe=sed'), "unknown config key 'sed'; did you mean 'seed'"),
  (
    train('--dry_run', '--num_processes=2'),
    'leave out --coordinator, --num_processes',
  ),
  (
    train('--workdir={folder}/x', '--config.data.source.kind=files'),
    'give --config.data.source.files.pattern=...',
  ),
  (
    train(
      '--workdir={folder}/x',
      '--config.mesh.data=-1',
      '--config.batch_size=16',
      '--config.model.width=1000000',
    ),
    'have | make it smaller, or take more devices',
  ),
  (train(f'--config.seed={"9" * 5000}'), 'seed=999 | digits'),
  (train('--config.model.kind=os:system', '--workdir={folder}/x'), 'os:system'),
  (bad_config('def get_config(:\n  pass'), 'line 1 | SyntaxError'),
  (bad_config(''), 'own.py defines no get_config'),
  (
    bad_config('def get_config():\n  return {{}}'),
    'get_config returned a dict',
  ),
  (
    bad_config('def get_config():\n  return confg'),
    'own.py, line 2 | NameError',
  ),
  (
    bad_config(
      'import ml_collections\ndef get_config():\n'
      '  return ml_collections.ConfigDict(dict(total_step=3))'
    ),
    "'total_step'; did you mean 'total_steps'",
  ),
  (
    generate('--workdir=no_such', '--prompt=x'),
    'no_such | no such folder; give a --workdir of a training run',
  ),
  (interop('import', 'setup.py', '--workdir', 'x'), 'setup.py is no folder'),
  (interop('import', 'tests', '--workdir', 'x'), 'tests has no config.json'),
  (interop('verify', 'tests', '--expected', 'setup.py'), 'setup.py'),
  (experiment('switch_table1', 'fast'), "'fast' | --config.KEY"),
  (
    experiment(
      'switch_table1', '--output=setup.py', '--preset=quick', '--steps=1'
    ),
    'setup.py',
  ),
  (experiment('shazeer_appendix_f', '--preset=none'), "--preset | 'none'"),
  # Runs would be another study's, or not the preset's.
  (experiment('switch_table1', '--config.seed=7'), 'runs do not share'),
  (experiment('switch_table1', '--config.total_steps=2'), 'runs do not share'),
  (experiment('switch_table1', '--resource=num_gpus=1'), 'has none'),
  (
    experiment('launch', SWITCH, '--sweep=sed=1,2', '--output={folder}'),
    "'sed' | 'seed'",
  ),
  (
    experiment('launch', SWITCH, '--accelerator=gpu'),
    '--accelerator and --devices',
  ),
  (experiment('compile_ahead', SWITCH, '--topology=v99:2x2'), 'v99'),
  (experiment('compare', 'configs', 'tests'), 'configs holds no run'),
]
