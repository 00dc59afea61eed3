"""The command that tokenizes in advance, and who makes the same bytes.

One process is the oracle of several, of Apache Beam, and of a command that was
killed and started again.
"""

import json
import os
import pathlib
import random
import re
import site
import subprocess
import sys
import time
import venv

import pytest

from moe_jax import data
from moe_jax.data import prepare, tokenizers
from moe_jax.data.sources import files
from tests.data.test_pieces import digests_of, folder_in

CONFIG = '--config=configs/tiny_switch.py'
KIND = '--config.data.source.kind=files'
PATTERN = '--config.data.source.files.pattern'


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
  """Runs the command with a new cache, beside two files in several pieces."""
  monkeypatch.setattr(files, 'PIECE_BYTES', 2**12)
  for name in 'ab':
    lines = [json.dumps({'text': f'{name}{i} ' * i}) for i in range(99)]
    (tmp_path / f'{name}.jsonl').write_text('\n'.join(lines))

  def run(*flags):
    cache = f'--config.data.cache_dir={tmp_path}/cache'
    prepare.main([CONFIG, cache, '--processes=1', *flags])
    return capsys.readouterr().out

  return run


def test_a_run_finds_what_was_prepared(run, tmp_path):
  flags = KIND, f'{PATTERN}={tmp_path}/*.jsonl'
  output = run(*flags)
  assert output.startswith('files:')  # the bar
  assert 'train: ' in output
  (folder,) = (tmp_path / 'cache' / 'tokens').iterdir()
  assert str(folder.parent) in output.replace('\n', '')
  mtime_ns = folder.stat().st_mtime_ns
  options = data.DataOptions(
    source=data.FilesSource(f'{tmp_path}/*.jsonl'),
    cache_dir=f'{tmp_path}/cache',
  )
  data.load(options)
  assert folder.stat().st_mtime_ns == mtime_ns
  assert run(*flags).lstrip().startswith('data: files:')


def test_a_run_that_begins_with_another_has_its_tokenizer(run, tmp_path):
  tokenizers.Chars('ab0123456789 ').save(tmp_path / 'tokenizer.json')
  init_flag = f'--config.init_from.workdir={tmp_path}'
  output = run(init_flag, KIND, f'{PATTERN}={tmp_path}/*.jsonl')
  assert 'tokenizer: chars' in output
  (folder,) = (tmp_path / 'cache' / 'tokens').iterdir()
  assert tokenizers.load(folder / 'tokenizer.json').vocab_size == 13


def test_mistakes_are_told_in_a_line(run, tmp_path, capsys):
  for flags, phrase in (
    (['--', '--region=x'], '--runner=pool has no flags'),
    (
      [KIND, f'{PATTERN}={tmp_path}/*.jsonl', '--runner=FnApiRunner'],
      'moe_jax[beam]',
    ),
    ([KIND, f'{PATTERN}={tmp_path}/no*'], 'no file matches'),
  ):
    with pytest.raises(SystemExit) as ended:
      run(*flags)
    errors = capsys.readouterr().err
    assert ended.value.code == 1 and phrase in errors, errors


SIZE = 50 * 10**6


@pytest.fixture(scope='module')
def large(tmp_path_factory):
  """A folder with 50 MB of text and of lines of JSON, drawn from a seed."""
  folder = tmp_path_factory.mktemp('large')
  draw = random.Random(0)
  words = re.findall(r'\w+|\W+', pathlib.Path(os.__file__).read_text('utf-8'))
  block = ''.join(draw.choices(words, k=400_000))
  with (
    (folder / 'a.jsonl').open('w') as lines,
    (folder / 'b.txt').open('w') as text_file,
  ):
    while lines.tell() + text_file.tell() < SIZE:
      for _ in range(200):
        begin = draw.randrange(len(block))
        text = block[begin : begin + draw.randrange(4000)]
        lines.write(json.dumps({'text': text}) + '\n')
        text_file.write(f'{text}\n\n{begin}')
  return folder


@pytest.fixture(scope='module')
def python_with_beam(tmp_path_factory):
  """The Python of an environment that has Beam, and all that is here.

  Beam's versions of other packages stay out of the environment of the tests.
  """
  folder = tmp_path_factory.mktemp('beam')
  venv.create(folder, with_pip=True)
  (packages,) = folder.glob('lib/python*/site-packages')
  (packages / 'here.pth').write_text('\n'.join(site.getsitepackages()))
  python = folder / 'bin' / 'python'
  install = [python, '-m', 'pip', 'install', '--quiet', 'apache-beam>=2.65']
  subprocess.run(install, check=True)
  return str(python)


# Runs a command, and prints the most memory that it or its workers held. A
# process counts the memory of the one that began it, which is small here.
MEASURED = (
  'import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); '
  "print('\\npeak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); "
  'sys.exit(code)'
)


def command(large, cache, *flags, python=sys.executable, before=()):
  """Starts a process of the command on the data in `large`."""
  flags = [
    CONFIG, KIND, f'{PATTERN}={large}/*', f'--config.data.cache_dir={cache}',
    *flags,
  ]  # fmt: skip
  return subprocess.Popen(
    [*before, python, '-m', 'moe_jax.data.prepare', *flags],
    env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)},
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    start_new_session=True,
  )  # fmt: skip


def peak_of(*args, **options):
  """The most memory of a process of `command`, or its workers, in bytes."""
  before = [sys.executable, '-c', MEASURED]
  process = command(*args, **options, before=before)
  text, _ = process.communicate()
  assert process.returncode == 0, text
  return int(text.split()[-1]) * 1024


@pytest.mark.slow
@pytest.mark.parametrize('engine', ['pool', 'beam'])
def test_50_mb_are_the_same_by_whomever_and_after_a_kill(
  engine, large, tmp_path, request
):
  one, two = tmp_path / 'one', tmp_path / 'two'
  flags, python = ['--processes=2'], sys.executable
  if engine == 'beam':
    flags = ['--runner=FnApiRunner', '--', '--direct_num_workers=1']
    python = request.getfixturevalue('python_with_beam')
  killed = command(large, two, *flags, python=python)
  while len([*two.glob('tokens/*.parts/0*/files.json')]) < 2:
    assert killed.poll() is None, killed.communicate()
    time.sleep(0.05)
  killed.kill()  # -9, and only the parent: its workers end by themselves
  killed.communicate()
  peaks = [peak_of(large, two, *flags, python=python)]
  peaks.append(peak_of(large, one, '--processes=1'))
  assert digests_of(folder_in(one)) == digests_of(folder_in(two))
  # Libraries have most of this memory: pieces of 32 MiB would be ten times as
  # many.
  assert engine == 'beam' or max(peaks) < 700 * 2**20
