"""The command that tokenizes the data of a config in advance."""

import json
import os
import pathlib
import random
import re
import subprocess
import sys
import time

import pytest

from moe_jax import data
from moe_jax.data import prepare, tokenizers
from moe_jax.data.cache_folders import sha256
from moe_jax.data.sources import files

CONFIG = '--config=configs/tiny_switch.py'
KIND = '--config.data.source.kind=files'
PATTERN = '--config.data.source.files.pattern'


@pytest.fixture
def pattern(tmp_path, monkeypatch):
  """A pattern that matches two small files, each of several pieces."""
  monkeypatch.setattr(files, 'PIECE_BYTES', 2**12)
  for name in 'ab':
    lines = [json.dumps({'text': f'{name}{i} ' * (i % 37)}) for i in range(120)]
    (tmp_path / f'{name}.jsonl').write_text('\n'.join(lines))
  return f'{tmp_path}/*.jsonl'


def run(capsys, tmp_path, *flags):
  prepare.main([CONFIG, f'--config.data.cache_dir={tmp_path}/cache', *flags])
  return capsys.readouterr().out


def test_a_run_finds_what_was_prepared(pattern, tmp_path, capsys):
  output = run(capsys, tmp_path, KIND, f'{PATTERN}={pattern}', '--processes=1')
  assert output.startswith('files:')  # the bar
  assert 'train: ' in output
  (folder,) = (tmp_path / 'cache' / 'tokens').iterdir()
  assert str(folder.parent) in output.replace('\n', '')
  mtime_ns = folder.stat().st_mtime_ns
  options = data.DataOptions(
    source=data.FilesSource(pattern), cache_dir=f'{tmp_path}/cache'
  )
  data.load(options)
  assert folder.stat().st_mtime_ns == mtime_ns
  second_output = run(capsys, tmp_path, KIND, f'{PATTERN}={pattern}')
  assert 'train: ' in second_output
  assert second_output.lstrip().startswith('data: files:')


def test_a_run_that_begins_with_another_has_its_tokenizer(
  pattern, tmp_path, capsys
):
  tokenizers.Chars('ab0123456789 ').save(tmp_path / 'tokenizer.json')
  flags = [KIND, f'{PATTERN}={pattern}', '--processes=1']
  init_flag = f'--config.init_from.workdir={tmp_path}'
  assert 'tokenizer: chars' in run(capsys, tmp_path, init_flag, *flags)
  (folder,) = (tmp_path / 'cache' / 'tokens').iterdir()
  assert tokenizers.load(folder / 'tokenizer.json').vocab_size == 13


def test_every_source_of_a_mixture_is_prepared(pattern, tmp_path, capsys):
  lines = f'both:files({pattern})*2, one:files({tmp_path}/a.jsonl)'
  flags = [
    f'--config.data.mixture.lines={lines}',
    '--config.data.tokenizer.kind=chars',
    '--config.data.seq_len=16',
    '--processes=1',
  ]
  output = run(capsys, tmp_path, *flags)
  assert 'mixture of 2 sources' in output and 'one' in output


def test_mistakes_are_told_in_a_line(pattern, tmp_path, capsys):
  for flags, phrase in (
    (['--', '--region=x'], '--runner=pool has no flags'),
    ([KIND, f'{PATTERN}={pattern}', '--runner=FnApiRunner'], 'moe_jax[beam]'),
    (['--processes=0'], 'must be at least 1'),
    (['--config.data.source.kind=file'], "unknown source 'file'"),
    (['--config.data.task.kind=classes'], 'data.'),
    ([KIND, f'{PATTERN}={tmp_path}/no*'], 'no file matches'),
  ):
    with pytest.raises(SystemExit) as ended:
      run(capsys, tmp_path, *flags)
    errors = capsys.readouterr().err
    assert ended.value.code == 1 and phrase in errors, errors


SIZE = 100 * 10**6


@pytest.fixture(scope='module')
def large(tmp_path_factory):
  """A folder with 100 MB of text and of lines of JSON, drawn from a seed."""
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


def command(large, cache, *flags, python=sys.executable):
  """Starts a process of the command on the data in `large`."""
  flags = [
    CONFIG, KIND, f'{PATTERN}={large}/*', f'--config.data.cache_dir={cache}',
    *flags,
  ]  # fmt: skip
  return subprocess.Popen(
    [python, '-m', 'moe_jax.data.prepare', *flags],
    env=os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)},
    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    start_new_session=True,
  )  # fmt: skip


def output_of(process):
  """Returns the output of a process, which has to end with status 0."""
  text, _ = process.communicate()
  assert process.returncode == 0, text
  return text


def peak_of(process):
  """Returns the most memory that the process or its workers held, in bytes.

  The process has to end with status 0.
  """
  text = process.stdout.read()
  _, process.returncode, usage = os.wait4(process.pid, 0)
  assert process.returncode == 0, text
  return usage.ru_maxrss * 1024


def digests_of(cache):
  (folder,) = (cache / 'tokens').iterdir()
  return {
    path.relative_to(folder): sha256(path)
    for path in folder.rglob('*')
    if path.is_file()
  }


def whole_pieces(cache):
  return list(cache.glob('tokens/*.parts/0*/files.json'))


@pytest.mark.slow
def test_100_mb_are_the_same_by_whomever_and_after_a_kill(large, tmp_path):
  one, two = tmp_path / 'one', tmp_path / 'two'
  killed = command(large, two, '--processes=2')
  while len(whole_pieces(two)) < 2:
    assert killed.poll() is None
    time.sleep(0.05)
  killed.kill()  # -9, and only the parent: its workers end by themselves
  killed.communicate()
  num_pieces = len(whole_pieces(two))
  resumed = command(large, two, '--processes=2')
  peaks = [peak_of(resumed)]
  assert num_pieces >= 2
  peaks.append(peak_of(command(large, one, '--processes=1')))
  assert digests_of(one) == digests_of(two)
  # Libraries have most of this memory: pieces of 32 MiB would be ten times as
  # many.
  assert max(peaks) < 700 * 2**20
