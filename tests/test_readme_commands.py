"""Commands in the READMEs run, in small sizes and in the order they are read.

Each README begins in a folder with the runs of the first page, as its reader
does. A run that no other command reads is only described, which reads the flags
and the config, and a study only asked for help, as tests of its own run it
small. `NOT_RUN` says what is left out, and why.
"""

import gzip
import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from moe_jax.command_line import CONSOLE
from tests import test_readme
from tests.data.tokenizers import models

ROOT = test_readme.ROOT
FIRST, *ROOMS = test_readme.READMES
# Parts of commands that no test runs.
NOT_RUN = {
  'pip install': '.ci/run installs in fresh environments',
  '-m pytest': 'this is a part of it',
  'ruff ': '.ci/run checks the style',
  'pyright ': '.ci/run checks types',
  'jupyter lab': 'serves until it is stopped',
  'srun ': 'needs a SLURM cluster',
  '--coordinator=': 'needs several hosts',
  'google/switch-base-8': 'needs the network',
  'runs/switch': 'is made of what comes over the network',
}
MODULES = {name: ['python', '-m', module] for module, name in CONSOLE.items()}
# Sizes of a run that has no config of ours, which shrinks by its argument.
SMALL = 'total_steps=2', 'batch_size=2', 'optimizer.schedule.warmup_steps=1'
SHRUNK = r'--config=(configs/\w+\.py|moe_jax:\w+)'


def commands(readme):
  """The commands of a README, each as its words."""
  for block in test_readme.blocks(readme, 'bash'):
    for line in re.split(r'\n|&&', block.replace('\\\n', ' ')):
      if words := shlex.split(line, comments=True):
        yield MODULES.get(words[0], words[:1]) + words[1:]


def every_command():
  """All commands, each once."""
  found = [
    shlex.join(words) for path in (FIRST, *ROOMS) for words in commands(path)
  ]
  return list(dict.fromkeys(found))


def is_run(words):
  return not any(part in ' '.join(words) for part in NOT_RUN)


def folder_of(words):
  """The folder that a training command trains in, or ''."""
  trains = {'moe_jax.main', 'distill'} & {*words}
  if {'--dry_run', '--describe'} & {*words}:
    return ''
  folders = [word for word in words if word.startswith('--workdir=')]
  return folders[0].partition('=')[2] if trains and folders else ''


def readers(folder):
  """Commands that read a run, beside those that train it."""
  pattern = rf'{re.escape(folder)}(?![\w-])'
  return [
    command
    for command in every_command()
    if re.search(pattern, command) and folder_of(shlex.split(command)) != folder
  ]


def smaller(words):
  """A command that does the same in seconds."""
  words = [
    f'{word}:runlocal' if re.fullmatch(SHRUNK, word) else word for word in words
  ]
  folder = folder_of(words)
  if words[0].startswith('experiments.'):
    return [*words, '--help']
  if 'moe_jax.main' in words and folder and not readers(folder):
    return [*words, '--describe']
  if folder and not any(word.endswith(':runlocal') for word in words):
    return [*words, *(f'--config.{change}' for change in SMALL)]
  return words


def job(words, folder):
  """What `readme_commands` reads: `VARIABLE=value python -m module ...`."""
  at = words.index('python')
  assert words[at + 1] == '-m', words
  variables = (word.split('=') for word in words[:at])
  settings = {name.lower(): int(value) for name, value in variables}
  argv = smaller(words[at + 2 :])
  return {'argv': argv, 'folder': str(folder), 'settings': settings}


def run(server, words, folder):
  """Runs one command; it must end well."""
  trained = folder / folder_of(words)
  if trained != folder and '--resume' not in words:
    shutil.rmtree(trained, ignore_errors=True)
  server.stdin.write(json.dumps(job(words, folder)) + '\n')
  server.stdin.flush()
  code, output = json.loads(server.stdout.readline())
  assert code == 0, f'{shlex.join(words)}\nin {folder.name}\n{output[-3000:]}'


def write_files(folder):
  """The checkpoints, texts and the tokenizer that commands name."""
  test_readme.checkpoint(folder / 'folder_of_mixtral', vocab_size=257)
  test_readme.checkpoint(folder / 'bare_checkpoint', vocab_size=400)
  (folder / 'tokenizer.model').write_bytes(models.bpe())
  for room in ('books', 'code'):
    (folder / room).mkdir()
    for name in 'abc':
      text = f'Once upon a time there was {name}. ' * 40
      numbered = [f'{room} {name} {i}: {text}' for i in range(60)]
      lines = ''.join(
        json.dumps({'body': own, 'text': own}) + '\n' for own in numbered
      )
      (folder / room / f'{name}.txt').write_text(text)
      (folder / room / f'{name}.jsonl').write_text(lines)
      packed = folder / room / f'{name}.jsonl.gz'
      packed.write_bytes(gzip.compress(lines.encode()))


@pytest.fixture
def server():
  pipe = subprocess.PIPE
  command = [sys.executable, '-m', 'tests.readme_commands']
  with subprocess.Popen(
    command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True
  ) as process:
    yield process
    process.stdin.close()


@pytest.mark.slow
def test_commands_run(server, tmp_path):
  first, seen = tmp_path / 'first', set()
  first.mkdir()
  (first / 'configs').symlink_to(ROOT / 'configs')
  write_files(first)
  for readme in (FIRST, *ROOMS):
    mine = [words for words in commands(readme) if is_run(words)]
    mine = [words for words in mine if shlex.join(words) not in seen]
    folder = first
    if readme != FIRST and mine:
      folder = tmp_path / str(readme.parent).replace('/', '_')
      shutil.copytree(first, folder, symlinks=True)
    for words in mine:
      run(server, words, folder)
      seen.add(shlex.join(words))


def test_what_is_not_run_is_named_with_a_reason():
  """Each reason still has a command."""
  left_out = [command for command in every_command() if not is_run([command])]
  assert left_out
  assert all(any(part in c for c in left_out) for part in NOT_RUN)
