"""Folders of runs that are no folders, are damaged, or belong to others."""

import contextlib
import json
import os
import resource
import signal

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax import data, generate
from moe_jax.compression import __main__ as compression
from moe_jax.config import section_of
from moe_jax.data import prepare
from moe_jax.interop import __main__ as interop
from moe_jax.runs import metrics, workdir
from moe_jax.runs.ownership import OWNER
from moe_jax.training import trained
from tests.bad_inputs.cases import REPORTED, check_command
from tests.bad_inputs.files import config, of_a_run, start
from tests.bad_inputs.test_fuzz_files import JSON, damaged
from tests.generation import folders
from tests.training import tiny


@contextlib.contextmanager
def full_disk():
  """A limit on the size of files stands for a disk without room.

  Compiled programs are not kept meanwhile: they would be cut off, too.
  """
  old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  old_limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  name = 'jax_persistent_cache_min_compile_time_secs'
  old_seconds = getattr(jax.config, name)
  jax.config.update(name, 1e9)
  resource.setrlimit(resource.RLIMIT_FSIZE, (9, old_limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, old_limits)
    jax.config.update(name, old_seconds)
    signal.signal(signal.SIGXFSZ, old_handler)


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


def test_owners_that_are_dead_do_not_make_a_directory_anothers(tmp_path):
  directory = tmp_path / 'elsewhere'
  directory.mkdir()
  (directory / OWNER).touch()
  options = tiny.options(checkpoint={'directory': os.fspath(directory)})
  workdir.check(tmp_path / 'run', section_of(options))


def paths_in(values, at=()):
  """Yields the path of every value in nested objects."""
  for key, value in values.items():
    yield (*at, key)
    if isinstance(value, dict):
      yield from paths_in(value, (*at, key))


def read_or_refused(read, folder):
  """A refusal names the folder."""
  try:
    read(folder)
  except REPORTED as error:
    assert os.fspath(folder) in str(error), error


ROWS = b'{"step": 1, "a": [1, 2]}\n{"step": 2, "a": "NaN"}\n'


@pytest.mark.slow
@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.data())
def test_any_value_of_a_config_is_read_or_refused(tmp_path_factory, data):
  folder = tmp_path_factory.mktemp('run')
  values = config().to_dict()
  path = data.draw(st.sampled_from(list(paths_in(values))))
  section = values
  for key in path[:-1]:
    section = section[key]
  section[path[-1]] = data.draw(JSON)
  of_a_run(folder)
  (folder / workdir.CONFIG).write_text(json.dumps(values))
  for read in (start, trained.read):
    read_or_refused(read, folder)


@pytest.mark.slow
@settings(derandomize=True, max_examples=100, deadline=None)
@given(damaged(json.dumps(config().to_dict()).encode()), damaged(ROWS))
def test_any_damage_of_files_is_read_or_refused(tmp_path_factory, values, rows):
  folder = tmp_path_factory.mktemp('run')
  (folder / workdir.CONFIG).write_bytes(values)
  read_or_refused(start, folder)
  (folder / metrics.FILE_NAME).write_bytes(rows)
  read_or_refused(_rows, folder)


def _rows(folder):
  metrics.read_metrics(folder / metrics.FILE_NAME)
