"""Command lines with bad arguments: one message, no traceback, nothing written.

Every command runs in this process. What a run needs beyond its flags (a trained
folder, a checkpoint) is in the other files here.
"""

import pathlib

import pytest

import moe_jax.generate
import moe_jax.interop.__main__
import moe_jax.main
from moe_jax import cli
from tests.bad_inputs.cases import check_command

ROOT = pathlib.Path(__file__).parents[2]
SWITCH = '--config=configs/tiny_switch.py:runlocal'
HUGE = '9' * 5000


def train(argv):
  """Runs `python -m moe_jax.main`."""
  moe_jax.main.main(argv)


@pytest.fixture(autouse=True)
def _root(monkeypatch):
  monkeypatch.chdir(ROOT)


def config_file(folder, text):
  path = folder / 'own.py'
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  return f'--config={path}'


TRAINING = {
  'no config': ([], ('required: --config', '--config=moe_jax:')),
  'no such config': (['--config=configs/no.py'], ("'configs/no.py'", 'exist')),
  'a folder as config': (['--config=configs'], ("'configs'",)),
  'an empty config': (['--config='], ("config file ''",)),
  'a wrong argument': (
    ['--config=configs/tiny_switch.py:tiny'],
    ('tiny', 'runlocal'),
  ),
  'no workdir': ([SWITCH], ('--workdir is missing',)),
  'an empty workdir': ([SWITCH, '--workdir='], ('--workdir is missing',)),
  'a word': (
    [SWITCH, 'more', '--workdir=x'],
    ("unknown arguments ['more']",),
  ),
  'an unknown flag': ([SWITCH, '--wrkdir=x'], ('wrkdir', 'workdir')),
  'a section as a value': ([SWITCH, '--config.model=3'], ("'model'",)),
  'no key': ([SWITCH, '--config.=3'], ('unknown config key',)),
  'no value': ([SWITCH, '--config.seed='], ('seed',)),
  'a source without its files': (
    [SWITCH, '--workdir=x', '--config.data.source.kind=files'],
    ('give --config.data.source.files.pattern=...',),
  ),
  'a model that is too large': (
    [SWITCH, '--workdir=x', '--config.mesh.data=-1', '--config.batch_size=16']
    + ['--config.model.width=1000000'],
    ('have', 'make it smaller, or take more devices'),
  ),
  'a fraction': ([SWITCH, '--config.seed=1.5'], ('seed=1.5', 'int')),
  'an exponent': ([SWITCH, '--config.seed=1e3'], ('seed=1e3', 'int')),
  'a word for a number': (
    [SWITCH, '--config.optimizer.learning_rate=fast'],
    ('learning_rate=fast', 'number'),
  ),
  'thousands of digits': (
    [SWITCH, f'--config.seed={HUGE}'],
    ('seed=999', 'digits'),
  ),
  'no boolean': (
    [SWITCH, '--config.model.scan_layers=maybe'],
    ('scan_layers=maybe',),
  ),
  'no tuple': (
    [SWITCH, '--workdir=x', '--config.optimizer.decay_rules=x'],
    ('decay_rules',),
  ),
  'a key below a value': ([SWITCH, '--config.seed.x=1'], ('seed.x',)),
  'a key twice too deep': (
    [SWITCH, '--config.model.moe.num_experts.x=1'],
    ('num_experts.x',),
  ),
  'an evaluation without kind': (
    [SWITCH, '--config.evals.mine.every_steps=1', '--workdir=x'],
    ('evals.mine',),
  ),
  'an unknown kind': (
    [SWITCH, '--config.model.kind=transformer', '--workdir=x'],
    ("unknown model 'transformer'",),
  ),
  'a module that is not there': (
    [SWITCH, '--config.model.kind=no_such:Model', '--workdir=x'],
    ('no_such',),
  ),
  'a name that is not there': (
    [SWITCH, '--config.model.kind=os:Model', '--workdir=x'],
    ('os', 'Model'),
  ),
  'a function that is no class': (
    [SWITCH, '--config.model.kind=os:system', '--workdir=x'],
    ('os:system',),
  ),
  'a kind with two colons': (
    [SWITCH, '--config.model.kind=a:b:c', '--workdir=x'],
    ('a:b:c',),
  ),
  'a number of processes alone': (
    [SWITCH, '--workdir=x', '--num_processes=2'],
    ('--coordinator', '--process_id'),
  ),
  'a number that is a word': (
    [SWITCH, '--workdir=x', '--num_processes=two'],
    ('num_processes', 'two'),
  ),
  'a process of none': (
    [
      SWITCH,
      '--workdir=x',
      '--num_processes=0',
      '--process_id=0',
      '--coordinator=localhost:1',
    ],
    ('num_processes=0',),
  ),
  'a negative process': (
    [
      SWITCH,
      '--workdir=x',
      '--num_processes=2',
      '--process_id=-1',
      '--coordinator=localhost:1',
    ],
    ('process_id=-1',),
  ),
  'a process too many': (
    [
      SWITCH,
      '--workdir=x',
      '--num_processes=2',
      '--process_id=2',
      '--coordinator=localhost:1',
    ],
    ('process_id=2',),
  ),
  'a coordinator without port': (
    [
      SWITCH,
      '--workdir=x',
      '--num_processes=2',
      '--process_id=0',
      '--coordinator=localhost',
    ],
    ("coordinator='localhost'",),
  ),
  'a switch with a value': (
    [SWITCH, '--workdir=x', '--resume=maybe'],
    ('resume', 'maybe'),
  ),
}


@pytest.mark.parametrize(('argv', 'phrases'), TRAINING.values(), ids=TRAINING)
def test_training(argv, phrases, capsys, tmp_path, monkeypatch):
  # A run that is not refused would begin in this folder.
  argv = [
    word.replace('--workdir=x', f'--workdir={tmp_path}/x') for word in argv
  ]
  check_command(train, argv, phrases, capsys)
  assert not any(tmp_path.iterdir())


FILES = {
  'that does not parse': (
    'def get_config(:\n  pass',
    ('line 1', 'SyntaxError'),
  ),
  'with a null byte': (b'x = 1\0', ('own.py', 'null byte')),
  'that is no text': (b'\xff\xfe\xfa\x00', ('own.py',)),
  'that is empty': ('', ('own.py defines no get_config',)),
  'that returns nothing': (
    'def get_config():\n  pass',
    ('get_config returned a NoneType',),
  ),
  'that returns a dict': (
    'def get_config():\n  return {}',
    ('get_config returned a dict',),
  ),
  'that returns a list': (
    'def get_config():\n  return [1]',
    ('get_config returned a list',),
  ),
  'that raises': (
    'def get_config():\n  return {}["model"]',
    ('own.py, line 2', 'KeyError'),
  ),
  'that divides by zero': ('1 / 0\n', ('own.py, line 1', 'ZeroDivisionError')),
  'with an unknown name': (
    'def get_config():\n  return confg',
    ('own.py, line 2', 'NameError'),
  ),
  'whose function wants more': (
    'def get_config(a, b):\n  pass',
    ('own.py', 'TypeError'),
  ),
  'that is no function': ('get_config = 3\n', ('own.py', 'TypeError')),
  'that imports what is not there': (
    'import no_such_module\n',
    ('own.py', 'no_such_module'),
  ),
  'that imports a name that is not there': (
    'from os import no_such_name\n',
    ('own.py, line 1', 'no_such_name'),
  ),
  'that calls itself': (
    'def get_config():\n  return get_config()',
    ('own.py, line 2', 'RecursionError'),
  ),
  'that returns another config': (
    'import ml_collections\n'
    'def get_config():\n  return ml_collections.ConfigDict({"width": 3})',
    ("unknown config key 'width'",),
  ),
  'that returns an empty config with a typo': (
    'import ml_collections\n'
    'def get_config():\n  return ml_collections.ConfigDict({"total_step": 3})',
    ("'total_step'; did you mean 'total_steps'",),
  ),
  'with a section for a value': (
    'import ml_collections\n'
    'def get_config():\n'
    '  return ml_collections.ConfigDict({"seed": {"a": 3}})',
    ('seed',),
  ),
  'with a value for a section': (
    'import ml_collections\n'
    'def get_config():\n  return ml_collections.ConfigDict({"model": 3})',
    ('model=3',),
  ),
}


@pytest.mark.parametrize(('text', 'phrases'), FILES.values(), ids=FILES)
def test_a_config_file(text, phrases, capsys, tmp_path):
  argv = [config_file(tmp_path, text), f'--workdir={tmp_path}/run']
  check_command(train, argv, phrases, capsys)
  assert not (tmp_path / 'run').exists()


PROMPT = '--prompt=x'
GENERATING = {
  'no workdir': ([PROMPT], ('--workdir',)),
  'no prompt': (['--workdir=x'], ('--prompt',)),
  'two prompts': (
    ['--workdir=x', PROMPT, '--prompts_file=y'],
    ('--prompts_file', '--prompt'),
  ),
  'no such run': (
    ['--workdir=no_such', PROMPT],
    ('no_such', 'no such folder; give a --workdir of a training run'),
  ),
  'an unknown flag': (['--workdir=x', PROMPT, '--topk=3'], ('--topk',)),
  'a chat in a language': (
    ['--workdir=x', PROMPT, '--chat', '--source_language=eng_Latn'],
    ('--chat', '--source_language'),
  ),
  **{
    f'{flag}={value}': (
      ['--workdir=x', PROMPT, f'--{flag}={value}'],
      (f'--{flag}', phrase),
    )
    for flag, value, phrase in [
      ('temperature', 'nan', 'must be finite'),
      ('temperature', 'inf', 'must be finite'),
      ('temperature', '-1', 'must be at least 0'),
      ('temperature', 'hot', "'hot'"),
      ('temperature', '1e39', 'float32'),
      ('top_p', '0', 'not in (0, 1]'),
      ('top_p', '1.5', 'not in (0, 1]'),
      ('top_p', 'nan', 'must be finite'),
      ('top_k', '-1', 'must be at least 0'),
      ('top_k', '1.5', "'1.5'"),
      ('num_tokens', '0', 'must be at least 1'),
      ('num_tokens', '-5', 'must be at least 1'),
      ('num_tokens', 'all', "'all'"),
      ('num_tokens', HUGE, '--num_tokens'),
      ('num_beams', '0', 'must be at least 1'),
      ('num_beams', '99999999999999999999', '32 bits'),
      ('length_penalty', 'nan', 'must be finite'),
      ('length_penalty', '-inf', 'must be finite'),
      ('seed', '-1', 'not in [0, 4294967296)'),
      ('seed', '4294967296', '32 bits'),
      ('step', '-1', 'must be at least 0'),
      ('step', 'last', "'last'"),
    ]
  },
}


@pytest.mark.parametrize(
  ('argv', 'phrases'), GENERATING.values(), ids=GENERATING
)
def test_generating(argv, phrases, capsys):
  check_command(moe_jax.generate.main, argv, phrases, capsys)


PROMPTS = {
  'missing': (None, ('No such file', 'prompts.txt')),
  'empty': (b'', ('prompts.txt has no prompts',)),
  'only line ends': (b'\n\n', ('prompts.txt has no prompts',)),
  'no text': (b'\xff\xfe\xfa', ('prompts.txt',)),
}


@pytest.mark.parametrize(('content', 'phrases'), PROMPTS.values(), ids=PROMPTS)
def test_a_file_of_prompts(content, phrases, capsys, tmp_path):
  path = tmp_path / 'prompts.txt'
  if content is not None:
    path.write_bytes(content)
  argv = ['--workdir=x', f'--prompts_file={path}']
  check_command(moe_jax.generate.main, argv, phrases, capsys)


INTEROP = {
  'no command': ([], ('COMMAND',)),
  'an unknown command': (['convert'], ('convert', 'import')),
  'no source': (['import', '--workdir', 'x'], ('SOURCE',)),
  'no workdir': (['import', 'y'], ('--workdir',)),
  'no such folder': (['import', './no/such', '--workdir', 'x'], ('./no/such',)),
  'a file as source': (
    ['import', 'setup.py', '--workdir', 'x'],
    ('setup.py is no folder',),
  ),
  'a folder without a config': (
    ['import', 'tests', '--workdir', 'x'],
    ('tests has no config.json',),
  ),
  'another dtype': (
    ['import', 'tests', '--workdir', 'x', '--dtype', 'float16'],
    ('float16', 'bfloat16'),
  ),
  'an unknown argument': (
    ['import', 'tests', '--workdir', 'x', '--fast'],
    ("['--fast']",),
  ),
  'an override that is not there': (
    ['import', 'tests', '--workdir', 'x', '--config.sed=1'],
    ("'sed'; did you mean 'seed'",),
  ),
  'overrides of an export': (
    ['export', '--workdir', 'x', '--output', 'y', '--config.seed=1'],
    ('--config.seed=1',),
  ),
  'an export of no run': (
    ['export', '--workdir', 'no_such', '--output', 'y'],
    ('no_such',),
  ),
  'no output': (['export', '--workdir', 'x'], ('--output',)),
  'no expected outputs': (['verify', 'tests'], ('--expected',)),
  'expected outputs that are not there': (
    ['verify', 'tests', '--expected', 'no.npz'],
    ('no.npz',),
  ),
  'expected outputs that are no npz': (
    ['verify', 'tests', '--expected', 'setup.py'],
    ('setup.py',),
  ),
}


@pytest.mark.parametrize(('argv', 'phrases'), INTEROP.values(), ids=INTEROP)
def test_interop(argv, phrases, capsys):
  check_command(moe_jax.interop.__main__.main, argv, phrases, capsys)


def test_an_error_in_the_program_keeps_its_traceback():
  with pytest.raises(RuntimeError, match='a defect'), cli.reported():
    raise RuntimeError('a defect')


def test_an_interrupted_command_has_the_shells_status(capsys):
  with pytest.raises(SystemExit) as ended, cli.reported():
    raise KeyboardInterrupt
  assert ended.value.code == 130
  assert capsys.readouterr().err == 'moe_jax: interrupted\n'


def test_an_unknown_platform_is_named(capsys):
  message = "Unable to initialize backend 'abacus': not in the list"
  with pytest.raises(SystemExit), cli.reported():
    raise RuntimeError(message)
  assert message in capsys.readouterr().err
