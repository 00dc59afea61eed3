"""The package alone: configs by name, console commands, and the wheel."""

import importlib
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
import setuptools

import moe_jax.main
from moe_jax import cli, run_config
from moe_jax.config import flatten

ROOT = pathlib.Path(__file__).parents[1]


def flat(config):
  return flatten(config)


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
  by_path = [flat(cli.load_config(path)) for path in paths]
  monkeypatch.chdir(tmp_path)
  names = 'moe_jax:tiny_switch', 'moe_jax:switch_base:e8'
  assert [flat(cli.load_config(name)) for name in names] == by_path
  changed = cli.config_of(names[0], ['--config.seed=3'])
  assert flat(changed) == {**by_path[0], 'seed': 3}
  options, _ = run_config.options_of(f'{names[0]}:runlocal')
  assert (options.total_steps, options.model.width) == (2, 32)


def test_every_config_of_the_folder_has_a_name():
  files = {path.stem: path for path in (ROOT / 'configs').glob('*.py')}
  assert cli.package_configs('moe_jax') == files


@pytest.mark.parametrize(
  ('spec', 'message'),
  [
    ('moe_jax:tiny_swich', "did you mean 'tiny_switch'? have ['base', "),
    ('moe_jax:', "unknown config of moe_jax ''"),
    ('moe_jax:tiny_switch:small', 'moe_jax:tiny_switch: unknown config argum'),
    ('no_package:tiny_switch', "No module named 'no_package'"),
    ('os:path', "package 'os' has no configs"),
    ('tiny_switch', 'moe_jax:tiny_switch works in every folder'),
    ('configs/tiny_switch.py:runlocal', 'moe_jax:tiny_switch works in every'),
    ('configs/tiny_swich.py', "did you mean 'tiny_switch'?"),
    ('own.py', 'does not exist under'),
    ('.', "config file '.' is a folder, and a config is a file; moe_jax:NAME"),
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


def test_names_of_configs_in_texts_exist():
  texts = [*ROOT.glob('*.md'), *ROOT.glob('configs/*')]
  texts += [p for p in ROOT.glob('moe_jax/**/*') if p.suffix in ('.md', '.py')]
  names = set()
  for path in texts:
    if path.is_file():
      text = path.read_text(encoding='utf-8')
      names |= set(re.findall(r'--config[= ]moe_jax:(\w+)', text))
  assert 'tiny_switch' in names
  assert names <= set(cli.package_configs('moe_jax'))


@pytest.mark.parametrize(
  'words',
  [
    ['--config=moe_jax:tiny_switch:runlocal'],
    ['--config', 'moe_jax:tiny_switch:runlocal'],
  ],
)
def test_training_takes_a_name(words, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  flags, overrides = moe_jax.main.parse([*words, '--config.seed=5'])
  options, _ = run_config.options_of(flags.config, overrides)
  assert (options.seed, options.total_steps) == (5, 2)


def module_of(entry):
  module, _, function = entry.partition(':')
  return importlib.import_module(module), function


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


def help_of(program, entry, *words, monkeypatch, capsys):
  """The words of --help of a command, started as `program`."""
  module, function = module_of(entry)
  monkeypatch.setattr(sys, 'argv', [program, *words, '--help'])
  with pytest.raises(SystemExit) as exit_error:
    getattr(module, function)()
  assert not exit_error.value.code
  return capsys.readouterr().out


def test_help_shows_examples_as_the_user_types_them(
  packaging, monkeypatch, capsys
):
  fixtures = dict(monkeypatch=monkeypatch, capsys=capsys)
  for name, entry in packaging['COMMANDS'].items():
    text = help_of(f'/usr/bin/{name}', entry, **fixtures)
    examples = text.partition('examples:\n')[2]
    assert examples.startswith(f'    {name} '), name
    assert 'python -m' not in text and 'Not here' not in text, name
    module = entry.partition(':')[0].removesuffix('.__main__')
    text = help_of('/lib/moe_jax/file.py', entry, **fixtures)
    assert f'examples:\n    python -m {module} ' in text, name
  text = help_of(
    'moe-interop', packaging['COMMANDS']['moe-interop'], 'export', **fixtures
  )
  assert 'writes a run for transformers' in text and 'verify' not in text
  text = help_of(
    'moe-generate', packaging['COMMANDS']['moe-generate'], **fixtures
  )
  assert 'the likeliest token (default: 0.0)' in text
  assert 'default: None' not in text
  entry = packaging['COMMANDS']['moe-compress']
  for word in ('quantize', 'keep_logits', 'merge', 'prune', 'extract', 'rates'):
    text = help_of('moe-compress', entry, word, **fixtures)
    assert f'moe-compress {word} -' in text, word


def test_help_of_training_has_its_own_flags_alone(monkeypatch, capsys):
  text = help_of(
    'moe-train',
    'moe_jax.main:main',
    monkeypatch=monkeypatch,
    capsys=capsys,
  )
  for flag in ('--config', '--workdir', '--describe', '--process_id'):
    assert f'\n  {flag} ' in text
  assert 'logtostderr' not in text and 'grain' not in text
  assert max(map(len, text.splitlines())) <= 80
  assert moe_jax.main.__doc__.split('\n')[0] in text


def test_modules_of_the_working_folder_are_found_last(monkeypatch):
  monkeypatch.setattr(sys, 'path', ['/lib'])
  cli.find_own_modules()
  cli.find_own_modules()
  assert sys.path == ['/lib', '']


def test_every_folder_of_modules_is_packaged(packaging):
  folders = {path.parent for path in (ROOT / 'moe_jax').rglob('*.py')}
  packages = {'.'.join(path.relative_to(ROOT).parts) for path in folders}
  assert set(packaging['setup']['packages']) == packages


def test_only_extras_for_tpus_bring_their_compiler(packaging):
  extras = packaging['setup']['extras_require']
  assert {n for n, r in extras.items() if 'jax[tpu]' in str(r)} == {
    'tpu', 'tpu-compiler',
  }  # fmt: skip
  deps = ' '.join(packaging['setup']['install_requires'])
  # A jax that is there, whatever it runs on, satisfies what is needed.
  assert 'jax>=' in deps and 'jaxlib' not in deps and 'jax[' not in deps


def test_the_repository_has_one_address(packaging):
  address, count = packaging['REPOSITORY'], 0
  assert packaging['setup']['url'] == address
  for pattern in ('*.md', 'colab/*', '*/*.md', 'moe_jax/**/*.md'):
    for path in ROOT.glob(pattern):
      if path.suffix in ('.md', '.ipynb', '.py'):
        text = path.read_text(encoding='utf-8')
        addresses = re.findall(r'https://github\.com/[\w.-]+/moe_jax\b', text)
        assert set(addresses) <= {address}, path
        count += len(addresses)
  assert count


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

  def run(*words):
    subprocess.run(
      [sys.executable, *words], cwd=source, check=True, capture_output=True
    )

  run('setup.py', '-q', 'sdist', '--dist-dir', '../dist')
  run(
    *('-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation'),
    *('--no-index', '-w', '../dist', '.'),
  )
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
  subprocess.run(
    [
      *(sys.executable, '-m', 'pip', 'install', '--no-deps', '--no-index'),
      *(
        '--no-build-isolation',
        '--target',
        str(tmp_path / 'target'),
        '-e',
        '.',
      ),
    ],
    cwd=source,
    check=True,
    capture_output=True,
  )
  assert not (source / 'moe_jax' / 'configs' / 'base.py').exists()
