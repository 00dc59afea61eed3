"""Folders of runs that are no folders, are damaged, or belong to others."""

import contextlib
import functools
import json
import os
import pathlib
import resource
import signal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_jax import data, generate
from moe_jax.compression import __main__ as compression
from moe_jax.config import section_of
from moe_jax.data import prepare
from moe_jax.interop import __main__ as interop
from moe_jax.runs import metrics, workdir
from moe_jax.runs.ownership import OWNER, owned
from moe_jax.runs.storage_errors import storage_path
from moe_jax.training import trained
from tests.bad_inputs.cases import (
  REPORTED,
  Case,
  check,
  check_command,
  frozen,
)
from tests.generation import folders
from tests.training import tiny

DAMAGES = {
  'empty': '',
  'cut': '{"model": {"wid',
  'binary': b'\x00\xff\xfe\x80' * 9,
  'nested': '[' * 100_000,
  'nested_objects': '{"a":' * 100_000,
  'a_list': '[1, 2]',
  'a_number': '3',
  'null': 'null',
  'a_text': '"model"',
  'a_huge_number': '9' * 10_000,
  'two_values': '{} {}',
  'utf16': '{}'.encode('utf-16'),
}
WRONG_SECTIONS = {
  'model': (None, [], 'decoder', 3),
  'data': (None, [], 'python', 3),
  'checkpoint': (None, [], 'gs://b', 3, {'directory': 3}, {'directory': []}),
}


@functools.cache
def config():
  return section_of(tiny.options())


@functools.cache
def config_text() -> str:
  return json.dumps(config().to_dict())


def write(path: pathlib.Path, content: str | bytes) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  raw = content if isinstance(content, bytes) else content.encode()
  path.write_bytes(raw)


def reading(content: str | bytes, read):
  """Returns a call that reads a run with this `config.json`."""

  def call(folder):
    write(folder / workdir.CONFIG, content)
    write(folder / workdir.TOKENIZER, '{}')
    (folder / workdir.CHECKPOINTS).mkdir()
    read(frozen(folder))

  return call


def start(folder):
  workdir.check(folder, config())


def edited(**changes) -> str:
  return json.dumps(json.loads(config_text()) | changes)


def config_cases():
  for name, content in DAMAGES.items():
    for read in (start, trained.read):
      yield Case(
        f'config_{name}_{read.__name__}',
        reading(content, read),
        ('config.json', 'damaged'),
      )
  for section, values in WRONG_SECTIONS.items():
    for value in values:
      for read in (start, trained.read):
        yield Case(
          f'config_{section}_{value}_{read.__name__}',
          reading(edited(**{section: value}), read),
          ('config.json', 'damaged', section),
        )
  for value in (None, 0, -1, 1.5, 'x', [], {}, True):
    yield Case(
      f'config_batch_size_{value}',
      reading(edited(batch_size=value), trained.read),
      ('config.json', f'batch_size={value!r}'),
    )
  yield Case(
    'config_of_another_run',
    reading(edited(seed=7), start),
    ('config differs', 'seed: 7 -> 0', '--resume'),
  )
  yield Case(
    'config_of_an_earlier_version',
    reading(edited(data={'source': 'files'}), start),
    ('earlier version',),
  )


def owning(name):
  """Returns a call that owns a folder, or a URL, of this name."""

  def call(folder):
    write(folder / 'file', '')
    frozen(folder)
    with owned([name.format(folder)]):
      pass

  return call


def name_cases():
  for name, phrases in {
    '': ("--workdir=''", 'empty'),
    'gs://bucket/run': ('--workdir=gs://bucket/run', 'checkpoint.directory'),
    'none://x': ('--workdir=none://x',),
    '~nobody_has_this_name/run': ('--workdir=~nobody_has', 'home directory'),
  }.items():
    for use in (workdir.folder_of, start, trained.read):
      yield Case(
        f'workdir_{name}_{use.__name__}',
        lambda folder, use=use, name=name: use(name),
        phrases,
      )
  for use in (workdir.folder_of, start, trained.read):

    def of_a_file(folder, use=use):
      write(folder / 'run', 'a file')
      use(frozen(folder) / 'run')

    yield Case(f'a_file_{use.__name__}', of_a_file, ('run is a file',))
  yield Case(
    'full_disk',
    on_a_full_disk,
    ('new/run cannot be made or written', 'File too large'),
  )
  for name, phrases in {
    '{}/file': ('/file cannot be made or written', 'File exists'),
    '{}/file/run': ('/file/run cannot be made', 'Not a directory'),
    '/proc/no/run': ('/proc/no/run cannot be made', 'No such file'),
    '/dev/null/run': ('/dev/null/run cannot be made', 'Not a directory'),
    '{}/' + 300 * 'x': (300 * 'x', 'too long'),
    # Pythons differ in the words: null byte, or null character.
    '{}/zero\0zero': ('cannot be made', 'embedded null'),
    'gs://bucket/run': ('gs://bucket/run cannot be made', 'gcsfs'),
    's3://bucket/run': ('s3://bucket/run cannot be made', 's3fs'),
    'none://bucket/run': ('none://bucket/run', 'no file system'),
  }.items():
    yield Case(f'owned_{name[:40]!a}', owning(name), phrases)


@contextlib.contextmanager
def full_disk():
  """A limit on the size of files stands for a disk without room."""
  old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  old_limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (9, old_limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, old_limits)
    signal.signal(signal.SIGXFSZ, old_handler)


def on_a_full_disk(folder):
  with full_disk(), owned([folder / 'new' / 'run']):
    pass


@pytest.fixture(scope='module')
def trained_folder(tmp_path_factory):
  """The folder of a run that transformers can read."""
  folder = tmp_path_factory.mktemp('trained')
  mixtral = dict(
    num_layers=1,
    ffn=dict(activation='swiglu'),
    norm=dict(epsilon=1e-5),
    embedding=dict(tie=False),
    moe=dict(
      layers='all',
      num_selected=2,
      router=dict(token_choice=dict(gates='renormalized')),
      capacity=dict(kind='all'),
      dispatch=dict(kind='dropless'),
    ),
  )
  folders.write(folder, model=mixtral)
  (folder / 'own.py').write_text(
    'import pathlib\n'
    'from moe_jax import run_config\n'
    'def get_config():\n'
    "  path = pathlib.Path(__file__).with_name('config.json')\n"
    '  return run_config.from_file(path)\n'
  )
  data.load(trained.read(folder).data)
  return folder


@pytest.mark.parametrize(
  ('main', 'argv'),
  [
    (interop.main, 'export --workdir={run} --output={output}'),
    (
      compression.main,
      'quantize --run={run} --output={output} --format=int4 --method=rtn',
    ),
    (
      compression.main,
      'keep_logits --teacher={run} --output={output} --config={config} '
      '--batches=1 --top=2',
    ),
    (
      generate.main,
      '--workdir={run} --prompt=a --num_tokens=1 --trace={output}',
    ),
    (
      prepare.main,
      '--config={config} --processes=1 --config.data.cache_dir={output}',
    ),
  ],
)
def test_a_full_disk_is_a_line_with_the_path(
  main, argv, trained_folder, tmp_path, capsys
):
  output = tmp_path / 'output'
  words = argv.format(
    run=trained_folder, output=output, config=trained_folder / 'own.py'
  )
  with full_disk():
    phrases = (f'{output}', 'cannot be written, as the disk is full')
    check_command(main, words.split(), phrases, capsys)
  # What is there does not look complete.
  names = {path.name for path in tmp_path.rglob('*') if path.is_file()}
  assert not names & {'config.json', 'manifest.json', 'files.json'}, names


def owner_cases():
  def twice(folder):
    with owned([folder]), owned([folder]):
      pass

  def checkpoints_too(folder):
    with owned([folder / 'bucket']), owned([folder / 'run', folder / 'bucket']):
      pass

  def replaced_by(text):
    def call(folder):
      try:
        with owned([folder]) as confirm:
          write(folder / OWNER, text)
          confirm()
      finally:
        (folder / OWNER).unlink(missing_ok=True)

    return call

  def removed(folder):
    with owned([folder]) as confirm:
      (folder / OWNER).unlink()
      confirm()

  this_owner = f'process {os.getpid()} on {os.uname().nodename} since '
  other = json.dumps(dict(id='other', host='elsewhere', pid=7, since='Monday'))
  yield Case('in_use', twice, ('is in use by', this_owner))
  yield Case(
    'checkpoints_in_use', checkpoints_too, ('bucket is in use', this_owner)
  )
  yield Case(
    'replaced',
    replaced_by(other),
    ('now belongs to process 7 on elsewhere since Monday',),
  )
  yield Case('removed', removed, ('nobody: its owner.json is gone',))
  yield Case('damaged', replaced_by('[' * 9999), ('owner.json is gone',))


def read_metrics_of(content):
  def call(folder):
    write(folder / metrics.FILE_NAME, content)
    metrics.read_metrics(frozen(folder) / metrics.FILE_NAME)

  return call


def metrics_cases():
  for name, line in {
    'text': 'hello',
    'empty_line': '',
    'a_list': '[1]',
    'no_step': '{"loss": 1}',
    'a_step_of_text': '{"step": "1"}',
    'a_step_of_bool': '{"step": true}',
    'a_step_of_half': '{"step": 1.5}',
    'nested': '{"step": 1, "a": ' + '[' * 99_999,
    'binary': b'\xff\x00\x80',
    'huge': '{"step": ' + '9' * 9999 + '}',
  }.items():
    raw = line if isinstance(line, bytes) else line.encode()
    yield Case(
      f'metrics_{name}',
      read_metrics_of(b'{"step": 1, "a": 0.5}\n' + raw + b'\n{"step": 2}\n'),
      ('metrics.jsonl', 'line 2 is not a row of metrics'),
    )


CASES = [
  *config_cases(),
  *name_cases(),
  *owner_cases(),
  *metrics_cases(),
]


@pytest.mark.parametrize('case', CASES, ids=Case.id)
def test_refused(case, tmp_path):
  check(case, tmp_path)


def test_owners_that_are_dead_do_not_make_a_directory_anothers(tmp_path):
  directory = tmp_path / 'elsewhere'
  write(directory / OWNER, '')
  options = tiny.options(checkpoint={'directory': os.fspath(directory)})
  workdir.check(tmp_path / 'run', section_of(options))


def test_metrics_cut_anywhere_are_read_up_to_there(tmp_path):
  lines = ['{"step": 1, "a": [1, "NaN"]}', '{"step": 2, "b": -0.5}']
  whole = '\n'.join(lines).encode() + b'\n'
  path = tmp_path / metrics.FILE_NAME
  for size in range(len(whole) + 1):
    path.write_bytes(whole[:size])
    steps = [row['step'] for row in metrics.read_metrics(path)]
    line_ends = [len(lines[0]), len(whole) - 1]
    assert steps == [i + 1 for i, end in enumerate(line_ends) if size >= end]


def test_a_url_stays_a_url():
  # A bucket's directory must not become a local folder named 'gs:'.
  assert os.fspath(storage_path('gs://bucket/run')) == 'gs://bucket/run'
  assert storage_path('a/../b').is_absolute()


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
  lambda values: (
    st.lists(values, max_size=3)
    | st.dictionaries(st.text(max_size=5), values, max_size=3)
  ),
  max_leaves=5,
)


def paths_in(values, at=()):
  """Yields the path of every value in nested objects."""
  for key, value in values.items():
    yield (*at, key)
    if isinstance(value, dict):
      yield from paths_in(value, (*at, key))


@pytest.mark.slow
@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.data())
def test_any_value_of_a_config_is_read_or_refused(tmp_path_factory, data):
  folder = tmp_path_factory.mktemp('run')
  values = json.loads(config_text())
  path = data.draw(st.sampled_from(list(paths_in(values))))
  section = values
  for key in path[:-1]:
    section = section[key]
  section[path[-1]] = data.draw(JSON)
  for read in (start, trained.read):
    try:
      reading(json.dumps(values), read)(folder)
    except REPORTED as error:
      assert os.fspath(folder) in str(error), error
    (folder / workdir.CHECKPOINTS).rmdir()


@pytest.mark.slow
@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.integers(0), st.binary(max_size=3))
@example(0, b'')
def test_any_cut_or_flip_of_files_is_read_or_refused(
  tmp_path_factory, position, replacement
):
  folder = tmp_path_factory.mktemp('run')
  rows = b'{"step": 1, "a": [1, 2]}\n{"step": 2, "a": "NaN"}\n'
  for content in (config_text().encode(), rows):
    index = position % len(content)
    changed = (
      content[:index] + replacement + content[index + len(replacement) :]
      if replacement
      else content[:index]
    )
    for read, name in ((start, workdir.CONFIG), (_rows, metrics.FILE_NAME)):
      write(folder / name, changed)
      try:
        read(folder)
      except REPORTED as error:
        assert os.fspath(folder) in str(error), error


def _rows(folder):
  metrics.read_metrics(folder / metrics.FILE_NAME)
