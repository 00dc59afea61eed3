"""Commands of `experiments` with bad arguments: one message, nothing is run."""

import importlib
import logging
import pathlib

import pytest

from experiments.study import command
from tests.bad_inputs.cases import check_command

ROOT = pathlib.Path(__file__).parents[2]
HUGE = '9' * 5000
SWITCH = '--config=configs/tiny_switch.py'


@pytest.fixture(autouse=True)
def _root(monkeypatch):
  monkeypatch.chdir(ROOT)
  # Commands silence JAX for their own process.
  level = logging.getLogger('jax').level
  yield
  logging.getLogger('jax').setLevel(level)


# Bad values of each command's flags, each with the rule that it breaks.
COUNT = [
  ('-1', '-1 must be at least 0'),
  ('1.5', "'1.5'"),
  ('all', "'all'"),
  (HUGE, 'invalid int value'),
  ('2147483648', '32 bits'),
  ('', "''"),
]
POSITIVE = [('0', '0 must be at least 1'), ('-3', '-3 must be at least 1')]
SECONDS = [
  ('nan', 'must be finite'),
  ('inf', 'must be finite'),
  ('-1', '-1.0 must be at least 0'),
  ('long', "'long'"),
  ('1e39', 'float32'),
]
NUMBERS = {
  'launch': {
    'workers': POSITIVE + COUNT[1:5],
    'processes': POSITIVE,
    'devices': COUNT[:3],
    'devices_per_process': COUNT[:2],
    'grace_seconds': SECONDS,
  },
  'soak': {'minutes': [('0', '0.0 must be above 0'), SECONDS[0]]},
  'bench_moe_layer': {
    'seconds': SECONDS,
    'tokens': POSITIVE,
    'width': POSITIVE,
    'hidden': POSITIVE,
    'experts': POSITIVE,
    'selected': POSITIVE,
    'scaling': POSITIVE,
  },
  'bench_train_step': {'seconds': SECONDS, 'depths': POSITIVE},
  'bench_generation': {
    'seconds': SECONDS,
    'num_tokens': POSITIVE,
    'num_layers': POSITIVE,
    'prompt_len': POSITIVE,
    'batch_sizes': POSITIVE,
  },
  'bench_overhead': {'seconds': SECONDS, 'burst': POSITIVE},
  'compile_ahead': {'slices': POSITIVE + COUNT[1:5]},
}


@pytest.mark.parametrize(
  ('name', 'flag', 'value', 'phrase'),
  [
    (name, flag, value, phrase)
    for name, by_flag in NUMBERS.items()
    for flag, values in by_flag.items()
    for value, phrase in values
  ],
)
def test_a_number(name, flag, value, phrase, capsys):
  argv = [SWITCH] if name in ('launch', 'compile_ahead') else []
  argv = [*argv, f'--{flag}={value}']
  check_command(main_of(name), argv, (f'--{flag}', phrase), capsys)


def main_of(name):
  """Returns the `main` of a command of experiments."""
  module = importlib.import_module(f'experiments.{name}')
  if hasattr(module, 'main'):
    return module.main
  return lambda argv: command.main(module.STUDY, argv)


STUDIES = ('switch_table1', 'jacobs_table1', 'shazeer_appendix_f')
STUDY_FLAGS = {
  'seeds': COUNT[:4],
  'steps': COUNT[:3],
  'workers': COUNT[:3],
  'preset': [('none', "'none'")],
  'task': [('none', "'none'")],
}


@pytest.mark.parametrize('name', STUDIES)
@pytest.mark.parametrize(
  ('flag', 'value', 'phrase'),
  [(flag, *pair) for flag, pairs in STUDY_FLAGS.items() for pair in pairs],
)
def test_a_study(name, flag, value, phrase, capsys):
  argv = [f'--{flag}={value}']
  check_command(main_of(name), argv, (f'--{flag}', phrase), capsys)


OTHERS = {
  'a word of a study': ('switch_table1', ['fast'], ("'fast'", '--config.KEY')),
  'an unknown flag of a study': ('switch_table1', ['--sed=1'], ("'--sed=1'",)),
  'a key that a study lacks': (
    'switch_table1',
    ['--config.model.widht=3', '--output={folder}'],
    ("'model.widht'; did you mean 'model.width'",),
  ),
  'a value of another type': (
    'switch_table1',
    ['--config.batch_size=few', '--output={folder}'],
    ('batch_size=few',),
  ),
  'a value out of range': (
    'switch_table1',
    ['--config.batch_size=0', '--output={folder}'],
    ('batch_size=0 must be at least 1',),
  ),
  'an output that is a file': (
    'switch_table1',
    ['--output=setup.py', '--preset=quick', '--seeds=1', '--steps=1'],
    ('setup.py',),
  ),
  'no config to launch': ('launch', [], ('--config', '--items')),
  'a config and items': (
    'launch',
    [SWITCH, '--items=x.py'],
    ('not allowed with argument',),
  ),
  'no such config': (
    'launch',
    ['--config=configs/no.py'],
    ("'configs/no.py'",),
  ),
  'no such items': ('launch', ['--items=no.py'], ('no.py',)),
  'a sweep without values': ('launch', [SWITCH, '--sweep=seed'], ("'seed'",)),
  'a sweep of a key that is not there': (
    'launch',
    [SWITCH, '--sweep=sed=1,2', '--output={folder}'],
    ("'sed'", "'seed'"),
  ),
  'a sweep of bad values': (
    'launch',
    [SWITCH, '--sweep=seed=1,x', '--output={folder}'],
    ('seed=x',),
  ),
  'accelerators without a number': (
    'launch',
    [SWITCH, '--accelerator=gpu'],
    ('--accelerator and --devices',),
  ),
  'another accelerator': (
    'launch',
    [SWITCH, '--accelerator=abacus', '--devices=1'],
    ("'abacus'",),
  ),
  'accelerators and processes': (
    'launch',
    [SWITCH, '--accelerator=gpu', '--devices=1', '--processes=2'],
    ('one item a device',),
  ),
  'no config to compile': ('compile_ahead', [], ('--config',)),
  'no topology': ('compile_ahead', [SWITCH, '--topology='], ('topology',)),
  'an unknown topology': (
    'compile_ahead',
    [SWITCH, '--topology=v99:2x2'],
    ('v99',),
  ),
  'a topology without devices': (
    'compile_ahead',
    [SWITCH, '--topology=cpu:0'],
    ('cpu:0',),
  ),
  'a topology of words': (
    'compile_ahead',
    [SWITCH, '--topology=cpu:many'],
    ('cpu:many',),
  ),
  'an unknown device': (
    'compile_ahead',
    [SWITCH, '--device=abacus'],
    ('abacus',),
  ),
  'an unknown preset': ('bench_moe_layer', ['--preset=slow'], ("'slow'",)),
  'a routing that is not there': (
    'bench_moe_layer',
    ['--routings', 'even'],
    ("'even'",),
  ),
  'another dtype': ('bench_moe_layer', ['--dtype=int8'], ("'int8'",)),
  'a bench of no config': (
    'bench_train_step',
    ['--config=configs/no.py'],
    ("'configs/no.py'",),
  ),
  'an overhead of no config': (
    'bench_overhead',
    ['--config=configs/no.py'],
    ("'configs/no.py'",),
  ),
  'a report of no results': (
    'report',
    ['--results=no_such', '--output={folder}'],
    ('no_such',),
  ),
  'a comparison of one run': ('compare', ['runs'], ('give at least two',)),
  'a comparison of folders without runs': (
    'compare',
    ['configs', 'tests'],
    ('configs holds no run', 'config.json'),
  ),
  'a report of a file': (
    'report',
    ['--results=setup.py', '--output={folder}'],
    ('setup.py',),
  ),
}


@pytest.mark.parametrize(
  ('name', 'argv', 'phrases'), OTHERS.values(), ids=OTHERS
)
def test_other_arguments(name, argv, phrases, capsys, tmp_path):
  argv = [word.format(folder=tmp_path) for word in argv]
  check_command(main_of(name), argv, phrases, capsys)
  assert not any(tmp_path.iterdir())
