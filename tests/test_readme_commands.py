"""Commands in the READMEs run, in small sizes and in the order they are read.

Each README begins in a folder with the runs of the first page, as its reader
does. A run that no other command reads is only described, which reads the flags
and the config. Of commands in `TESTED_APART`, only the words and the config are
read. `NOT_RUN` says what is left out, and why.
"""

import gzip
import json
import re
import shlex
import shutil
import subprocess

import pytest

from moe_jax import cli, run_config
from tests import programs, test_readme
from tests.data.tokenizers import models

ROOT = test_readme.ROOT
FIRST, *ROOMS = test_readme.READMES
# Parts of commands that no test runs.
NOT_RUN = {
  'git clone': 'needs the network',
  'pip install': '.ci/run installs in fresh environments',
  '-m pytest': 'this is a part of it',
  'ruff ': '.ci/run checks the style',
  'lint-imports': '.ci/run checks imports',
  'pyright ': '.ci/run checks types',
  'jupyter lab': 'serves until it is stopped',
  'srun ': 'needs a SLURM cluster',
  '--coordinator=': 'needs several hosts',
  'gs://': 'needs a bucket, and a service that runs Beam',
}
# Parts of commands, as patterns, that tests of their own run in small sizes.
TESTED_APART = (
  r'experiments\.',
  r'moe_jax\.(compression|finetuning|sweep) ',
  r'moe_jax\.main .*--workdir=runs/tiny_mixtral',
  r'moe_jax\.interop export --workdir=runs/tiny_mixtral ',
  r'moe_jax\.generate .*(--best|--trace|runs/instruct|runs/lora)',
  r'moe_jax\.main .*--config\.trace\.',
  r'moe_jax\.analysis\.record_evaluation .*=traces',
)
MODULES = {
  name: ['python', '-m', module] for module, name in cli.CONSOLE.items()
}
SHRUNK = r'--config=(configs/\w+\.py|moe_jax:\w+)'
# The flags that make a command quick, by its module.
QUICKER = {
  'moe_jax.generate': ['--num_tokens=2'],
  'moe_jax.analysis.record_evaluation': ['--num_batches=1'],
}


# The flags that make the training of a run quick, by its folder.
QUICKER_RUNS = {
  'runs/tiny': (
    '--config.sample.num_tokens=0',
    '--config.evals.all_tokens.every_steps=0',
  )
}
# The first run leaves these files, and prints these words.
FIRST_FILES = (
  *('config.json', 'metrics.jsonl', 'curves.png', 'index.html', 'load.png'),
  *('routing_report.md', 'tokenizer.json'),
  *('checkpoints/2', 'tensorboard'),
)
FIRST_WORDS = ('parameters:', 'FLOPs per token', 'sha256', 'evaluation')


def commands(readme):
  """The commands of a README, each as its words."""
  for block in test_readme.blocks(readme, 'bash'):
    for line in re.split(r'\n|&&', block.replace('\\\n', ' ')):
      if words := shlex.split(line, comments=True):
        yield MODULES.get(words[0], words[:1]) + words[1:]


def every_command():
  """All commands, each once."""
  lines = [
    shlex.join(words) for path in (FIRST, *ROOMS) for words in commands(path)
  ]
  return list(dict.fromkeys(lines))


def is_run(words):
  return not any(part in ' '.join(words) for part in NOT_RUN)


def is_tested_apart(command):
  return any(re.search(part, command) for part in TESTED_APART)


def folder_of(words):
  """The folder that a training command trains in, or ''."""
  folders = [word for word in words if word.startswith('--workdir=')]
  if 'moe_jax.main' not in words or not folders:
    return ''
  is_trained = not {'--dry_run', '--describe'} & {*words}
  return folders[0].partition('=')[2] if is_trained else ''


def readers(folder):
  """Commands that run and read a run, beside those that train it."""
  pattern = rf'{re.escape(folder)}(?![\w-])'
  return [
    command
    for command in every_command()
    if re.search(pattern, command)
    and not folder_of(shlex.split(command))
    and not is_tested_apart(command)
  ]


def smaller(words):
  """A command that does the same in seconds."""
  words = [
    f'{word}:runlocal' if re.fullmatch(SHRUNK, word) else word for word in words
  ]
  if folder_of(words) and is_described(words):
    return [*words, '--describe']
  if words[0] != 'moe_jax.main':
    return [*words, *QUICKER.get(words[0], ())]
  for folder, flags in QUICKER_RUNS.items():
    if f'--workdir={folder}' in words:
      words = [*words, *flags]
  return words


def is_described(words):
  """Whether a command that trains only describes the run here."""
  return is_tested_apart(shlex.join(words)) or not readers(folder_of(words))


def job(words, folder):
  """The job of `VARIABLE=value python -m module ...` for `readme_commands`.

  A file that a page has its reader save stands in place of `-m module`.
  """
  index = words.index('python')
  is_file = words[index + 1].endswith('.py')
  assert is_file or words[index + 1] == '-m', words
  variables = (word.split('=') for word in words[:index])
  settings = {name.lower(): int(value) for name, value in variables}
  is_read = not folder_of(words) and is_tested_apart(shlex.join(words))
  return {
    'argv': smaller(words[index + 2 - is_file :]),
    'folder': str(folder),
    'settings': settings,
    'is_read': is_read,
  }


def run(server, words, folder):
  """Runs one command, which must end well; returns what it printed."""
  server.stdin.write(json.dumps(job(words, folder)) + '\n')
  server.stdin.flush()
  code, output = json.loads(server.stdout.readline())
  assert code == 0, f'{shlex.join(words)}\nin {folder.name}\n{output[-3000:]}'
  return output


def write_files(folder):
  """The programs, checkpoints, texts and the tokenizer that commands name."""
  for readme in test_readme.READMES:
    for block in test_readme.blocks(readme):
      if saved := re.match(test_readme.SAVED, block):
        (folder / saved[1]).write_text(block)
  test_readme.checkpoint(folder / 'folder_of_mixtral', test_readme.mixtral(257))
  test_readme.checkpoint(folder / 'bare_checkpoint', test_readme.mixtral(400))
  (folder / 'tokenizer.model').write_bytes(models.bpe())
  for room in ('books', 'code'):
    (folder / room).mkdir()
    for name in 'abc':
      text = f'Once upon a time there was {name}. ' * 40
      texts = [f'{room} {name} {i}: {text}' for i in range(60)]
      lines = ''.join(
        json.dumps({'body': body, 'text': body}) + '\n' for body in texts
      )
      (folder / room / f'{name}.txt').write_text(text)
      (folder / room / f'{name}.jsonl').write_text(lines)
      packed = folder / room / f'{name}.jsonl.gz'
      packed.write_bytes(gzip.compress(lines.encode()))


def assert_first(folder, output):
  """The first run has left its files and printed its facts."""
  for name in FIRST_FILES:
    assert (folder / name).exists(), name
  for words in FIRST_WORDS:
    assert words in output, words


@pytest.fixture
def server():
  with programs.started(
    '-m', 'tests.readme_commands', stdin=subprocess.PIPE, stderr=None
  ) as process:
    yield process
    process.stdin.close()


@pytest.mark.slow
def test_commands_run(server, tmp_path):
  pytest.importorskip('torch')  # a page makes a checkpoint with transformers
  first, finished = tmp_path / 'first', set()
  first.mkdir()
  (first / 'configs').symlink_to(ROOT / 'configs')
  write_files(first)
  for readme in (FIRST, *ROOMS):
    pending = [words for words in commands(readme) if is_run(words)]
    pending = [words for words in pending if shlex.join(words) not in finished]
    folder = first
    if readme != FIRST and pending:
      folder = tmp_path / str(readme.parent).replace('/', '_')
      shutil.copytree(first, folder, symlinks=True)
    for words in pending:
      output = run(server, words, folder)
      if not finished:
        assert_first(folder / 'runs' / 'tiny', output)
      finished.add(shlex.join(words))


@pytest.mark.slow
def test_the_flags_of_a_mixtral_make_one(tmp_path):
  (words,) = (
    words
    for words in commands(ROOT / 'moe_jax' / 'interop' / 'README.md')
    if folder_of(words) == 'runs/tiny_mixtral'
  )
  flags = [word for word in words if word.startswith('--config.')]
  config = cli.config_of('moe_jax:tiny_switch:runlocal', flags)
  options = run_config.read(config).filled(257)
  test_readme.checkpoint(tmp_path, options)
  hf_config = json.loads((tmp_path / 'config.json').read_text())
  assert hf_config['model_type'] == 'mixtral'
