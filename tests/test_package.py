"""The package alone: configs by name, console commands, and the wheel."""

import importlib
import re
import runpy
import shutil
import sys
import tarfile
import zipfile

import pytest
import setuptools

from moe_jax import cli, run_config
from moe_jax.config import flatten
from moe_jax.data import document_files
from moe_jax.data.tokenizers.sentencepiece_tokenizer import SentencePiece
from moe_jax.data.tokenizers.trained_tokenizer import TrainedOptions
from moe_jax.evaluation.scores import make_scores
from tests import programs
from tests.programs import ROOT

UNIGRAM = TrainedOptions(model='unigram')


@pytest.fixture
def packaging(monkeypatch):
  """The names of setup.py, and as `setup` the arguments of that function."""
  arguments = {}
  monkeypatch.setattr(
    setuptools, 'setup', lambda **options: arguments.update(options)
  )
  monkeypatch.chdir(ROOT)
  return {**runpy.run_path('setup.py'), 'setup': arguments}


def test_a_config_has_a_name_in_every_folder(tmp_path, monkeypatch):
  paths = 'configs/tiny_switch.py', 'configs/switch_base.py:e8'
  monkeypatch.chdir(ROOT)
  by_path = [flatten(cli.load_config(path)) for path in paths]
  monkeypatch.chdir(tmp_path)
  names = 'moe_jax:tiny_switch', 'moe_jax:switch_base:e8'
  assert [flatten(cli.load_config(name)) for name in names] == by_path
  changed = cli.config_of(names[0], ['--config.seed=3'])
  assert flatten(changed) == {**by_path[0], 'seed': 3}
  options, _ = run_config.options_of(f'{names[0]}:runlocal')
  assert (options.total_steps, options.model.width) == (2, 32)


@pytest.mark.parametrize(
  ('module', 'extra', 'use'),
  [
    ('sacrebleu.metrics', 'scores', lambda: make_scores('chrf')),
    ('sentencepiece', 'sentencepiece', lambda: SentencePiece(b'')),
    ('sentencepiece', 'sentencepiece', lambda: UNIGRAM.fit(['a'])),
    ('pyarrow', 'data', lambda: document_files.CODECS['.zst'](None)),
  ],
)
def test_what_an_extra_installs_is_named(
  module, extra, use, packaging, monkeypatch
):
  monkeypatch.setitem(sys.modules, module, None)  # as if it were not there
  message = rf"^[^:]*: import of {module} .*; pip.*'moe_jax\[{extra}\]'$"
  with pytest.raises(ValueError, match=message):
    use()
  (requirement,) = packaging['setup']['extras_require'][extra]
  assert requirement.startswith(module.split('.')[0])
  assert requirement not in packaging['setup']['install_requires']


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ('moe_jax:tiny_swich', "did you mean 'tiny_switch'?"),
    ('no_package:tiny_switch', "No module named 'no_package'"),
    ('os:path', "package 'os' has no configs"),
    ('configs/tiny_switch.py:runlocal', 'moe_jax:tiny_switch works in every'),
    ('own.py', 'does not exist under'),
    ('.', "config file '.' is a folder"),
  ],
)
def test_what_is_no_config_is_told_of_the_nearest_name(
  spec, message, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=re.escape(message)):
    cli.load_config(spec)


def test_another_package_names_its_configs_alike(tmp_path, monkeypatch):
  folder = tmp_path / 'somebodys' / 'configs'
  folder.mkdir(parents=True)
  (folder.parent / '__init__.py').touch()
  (folder / '__init__.py').touch()
  (folder / 'large.py').write_text(
    'from moe_jax.configs import tiny_switch\n'
    'def get_config(arg=""):\n'
    '  config = tiny_switch.get_config(arg)\n'
    '  config.total_steps = 7\n'
    '  return config\n'
  )
  monkeypatch.syspath_prepend(tmp_path)
  config = cli.load_config('somebodys:large:runlocal')
  assert (config.total_steps, config.model.width) == (7, 32)
  with pytest.raises(ValueError, match=r"unknown config of somebodys 'small'"):
    cli.load_config('somebodys:small')
  # A file of that name would be the config.
  monkeypatch.chdir(tmp_path)
  shutil.copy(folder / 'large.py', 'own')
  assert cli.load_config('own:runlocal').total_steps == 7


def test_console_commands_start_what_python_would(packaging):
  commands = packaging['COMMANDS']
  modules = {
    name: entry.partition(':')[0].removesuffix('.__main__')
    for name, entry in commands.items()
  }
  assert modules == {name: path for path, name in cli.CONSOLE.items()}
  assert packaging['setup']['entry_points']['console_scripts'] == [
    f'{name} = {entry}' for name, entry in commands.items()
  ]


@pytest.mark.parametrize('command', sorted(cli.CONSOLE.values()))
def test_help_shows_an_example_as_the_user_types_it(
  command, packaging, monkeypatch, capsys
):
  module, _, function = packaging['COMMANDS'][command].partition(':')
  monkeypatch.setattr(sys, 'argv', [f'/usr/bin/{command}', '--help'])
  with pytest.raises(SystemExit) as exit_error:
    getattr(importlib.import_module(module), function)()
  assert not exit_error.value.code
  text = capsys.readouterr().out
  assert f'examples:\n    {command} ' in text and 'python -m' not in text


def run(folder, *words):
  """Runs `python WORDS`, as setup.py of a folder needs it."""
  process = programs.run(*words, cwd=folder)
  assert process.returncode == 0, process.stderr


def pip(folder, *words):
  offline = '--no-deps', '--no-index', '--no-build-isolation'
  run(folder, '-m', 'pip', *words, *offline)


@pytest.fixture(scope='module')
def distributions(tmp_path_factory):
  """A copy of what is packaged, its wheel, and its source distribution."""
  tmp_path = tmp_path_factory.mktemp('built')
  source = tmp_path / 'source'
  source.mkdir()
  for name in ('moe_jax', 'configs'):
    shutil.copytree(
      ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__')
    )
  for name in ('setup.py', 'README.md', 'LICENSE'):
    shutil.copy(ROOT / name, source)
  run(source, 'setup.py', '-q', 'sdist', '--dist-dir', '../dist')
  pip(source, 'wheel', '-w', '../dist', '.')
  (wheel,) = (tmp_path / 'dist').glob('*.whl')
  (archive,) = (tmp_path / 'dist').glob('*.tar.gz')
  return source, wheel, archive


# `.ci/wheel` runs what the wheel installs, in an empty folder.
@pytest.mark.slow
def test_distributions_hold_all_modules_and_configs(distributions):
  source, wheel, archive = distributions
  # The build leaves copies of its own.
  paths = [path.relative_to(source) for path in source.rglob('*.py')]
  modules = {str(path) for path in paths if path.parts[0] == 'moe_jax'}
  configs = {
    f'moe_jax/configs/{p.name}' for p in (source / 'configs').iterdir()
  }
  names = set(zipfile.ZipFile(wheel).namelist())
  members = {name for name in names if not name.startswith('moe_jax-')}
  configs -= {'moe_jax/configs/README.md'}
  other = {'moe_jax/py.typed', 'moe_jax/analysis/run_page.html'}
  assert members == modules | configs | other
  assert 'moe_jax-0.1.0.dist-info/licenses/LICENSE' in names
  with tarfile.open(archive) as files:
    archived = {name.partition('/')[2] for name in files.getnames()}
  assert archived >= modules | {'configs/base.py', 'configs/tiny_switch.py'}


@pytest.mark.slow
def test_an_editable_installation_copies_no_configs(distributions, tmp_path):
  source, _, _ = distributions
  shutil.rmtree(source / 'build', ignore_errors=True)
  pip(source, 'install', '--target', tmp_path / 'target', '-e', '.')
  assert not (source / 'moe_jax' / 'configs' / 'base.py').exists()
