"""Inputs made to run code, or to read or write where they should not.

Canary files prove it: a secret beside the folder that is read never turns up
in what is written, and a file that hostile code would make is never there.
"""

import importlib.util
import io
import json
import os
import pathlib
import pickle
import shlex
import shutil

import numpy as np
import pytest

from moe_jax import interop
from moe_jax.config import section_of
from moe_jax.data import tokenizers
from moe_jax.interop import checkpoint_folder, export_run, import_run
from moe_jax.interop.checkpoint_folder import open_checkpoint
from moe_jax.interop.verifying import read_npz
from moe_jax.run_config import RunConfig
from moe_jax.training import trained
from tests.bad_inputs import checkpoints
from tests.bad_inputs.cases import Case, check, frozen
from tests.interop.folders import Runs

SECRET = 'a secret of this machine'
READERS = {
  'config.json': open_checkpoint,
  'generation_config.json': tokenizers.Json.from_folder,
  'tokenizer.json': tokenizers.Json.from_folder,
  'tokenizer_config.json': tokenizers.Json.from_folder,
  'special_tokens_map.json': tokenizers.Json.from_folder,
  'chat_template.jinja': tokenizers.Json.from_folder,
  'model.safetensors': interop.load,
  'model.safetensors.index.json': interop.load,
  'other.json': checkpoint_folder.small_files,
  'notes.txt': checkpoint_folder.small_files,
  'spiece.model': checkpoint_folder.small_files,
}


def checkpoint(folder: pathlib.Path) -> pathlib.Path:
  """Writes a checkpoint with a tokenizer, and a secret beside its folder."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  (folder.parent / 'secret').write_text(json.dumps({'key': SECRET}))
  checkpoints.write(folder)
  (folder / 'tokenizer.json').write_text(checkpoints.tokenizer_text())
  return folder


def replaced_entry(name, create):
  """A call that reads a checkpoint in which `create` makes one of the paths."""

  def call(folder):
    source = checkpoint(folder / 'hf')
    if name.endswith('.index.json'):
      (source / 'model.safetensors').unlink()
    (source / name).unlink(missing_ok=True)
    create(source / name)
    frozen(folder)
    READERS[name](source)

  return call


LINKS = {
  'relative': '../secret',
  'absolute': '/etc/passwd',
  'device': '/dev/zero',
  'process': '/proc/self/environ',
}
CASES = [
  Case(
    f'{name} -> {kind}',
    replaced_entry(name, lambda path, target=target: path.symlink_to(target)),
    (f'{name} is a link to {target!r}', 'not followed'),
  )
  for name in READERS
  for kind, target in LINKS.items()
]
CASES += [
  Case(
    f'{name} is a {kind}',
    replaced_entry(name, create),
    (name, 'is no regular file'),
  )
  for name in READERS
  for kind, create in (
    ('pipe', os.mkfifo),
    ('folder', pathlib.Path.mkdir),
    ('loop', lambda path: path.symlink_to(path.name)),
    ('link to nothing', lambda path: path.symlink_to('nowhere')),
  )
  if not (kind == 'folder' and READERS[name] is checkpoint_folder.small_files)
]


def in_hub(target):
  """A case of the layout of the hub's cache, with a link to `target`."""

  def call(folder):
    repository = folder / 'models--who--what'
    source = repository / 'snapshots' / 'c0ffee'
    checkpoint(repository / 'blobs')
    (folder / 'secret').write_text(SECRET)
    (folder / 'models--who--other').mkdir()
    (folder / 'models--who--other' / 'config.json').write_text('{}')
    source.mkdir(parents=True)
    (source / 'config.json').symlink_to(target)
    open_checkpoint(frozen(folder) / source.relative_to(folder))

  return Case(f'hub: {target}', call, ('config.json is a link to', target))


CASES += [
  in_hub(target)
  for target in (
    '/etc/passwd',
    '../../../secret',
    '../../../models--who--other/config.json',
    '../../blobs/../../secret',
  )
]


def pickled(name, content):
  """A case of weights that would make a file when they are unpickled."""

  def call(folder):
    source = checkpoints.write(folder / 'hf')
    (source / checkpoints.WEIGHTS).unlink()
    (source / 'pytorch_model.bin').write_bytes(content(folder / 'ran'))
    frozen(folder)
    interop.load(source)

  return Case(f'pickle: {name}', call, ('pytorch_model.bin', 'never unpickled'))


def torch_bytes(zipped):
  def content(path):
    torch = pytest.importorskip('torch')
    file = io.BytesIO()
    value = {'a': torch.zeros(2), 'b': Runs(path)}
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()

  return content


def npz_of(path):
  file = io.BytesIO()
  np.savez(file, train_features=np.array([Runs(path)], object))
  return file.getvalue()


def objects(name, content):
  def call(folder):
    (folder / 'a.npz').write_bytes(content(folder / 'ran'))
    frozen(folder)
    read_npz(folder / 'a.npz')

  return Case(f'npz: {name}', call, ('a.npz', 'never unpickled'))


CASES += [
  pickled('bare', lambda path: pickle.dumps(Runs(path))),
  pickled('protocol 0', lambda path: pickle.dumps(Runs(path), 0)),
  pickled('zip', torch_bytes(True)),
  pickled('before zip', torch_bytes(False)),
  objects('array of objects', npz_of),
  objects('bare', lambda path: pickle.dumps(Runs(path))),
]

MODULE = "open({!r}, 'w').close()\nfrom tests.data.own_kinds import *\n"


def foreign(keys, value, canary_module=True):
  """A case of somebody else's workdir whose config names a class."""

  def call(folder):
    if canary_module:
      module = folder / 'moe_jax_canary.py'
      module.write_text(MODULE.format(str(folder / 'ran')))
    config = section_of(RunConfig()).to_dict()
    section = config
    for key in keys:
      section = section.setdefault(key, {})
    section['kind'] = value
    workdir = folder / 'run'
    (workdir / 'checkpoints').mkdir(parents=True)
    (workdir / 'config.json').write_text(json.dumps(config))
    (workdir / 'tokenizer.json').write_text('{"kind": "bytes"}')
    frozen(folder)
    trained.read(workdir)

  return Case(
    f'foreign: {".".join(keys)}={value}', call, (f'{value!r}', 'not allowed')
  )


SECTION_KEYS = (
  ('model',), ('model', 'decoder', 'moe', 'router'), ('data', 'source'),
  ('data', 'task'), ('data', 'tokenizer'),
)  # fmt: skip
CASES += [
  foreign(keys, value)
  for keys in SECTION_KEYS
  for value in ('os:system', 'moe_jax_canary:Counting')
]


@pytest.mark.parametrize('case', CASES, ids=Case.id)
def test_refused(case, tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(str(tmp_path))
  check(case, tmp_path)
  assert not (tmp_path / 'ran').exists()


def test_the_hub_may_link_to_its_blobs(tmp_path):
  repository = tmp_path / 'models--who--what'
  blobs = checkpoint(repository / 'blobs')
  source = repository / 'snapshots' / 'c0ffee'
  source.mkdir(parents=True)
  for path in blobs.iterdir():
    (source / path.name).symlink_to(f'../../blobs/{path.name}')
  assert interop.load(source).options.vocab_size == 11
  assert tokenizers.Json.from_folder(source).vocab_size == 11
  names = [path.name for path in checkpoint_folder.small_files(source)]
  assert names == ['config.json', 'tokenizer.json']
  # A link to the folder itself is the user's own.
  (tmp_path / 'latest').symlink_to(source)
  assert open_checkpoint(tmp_path / 'latest').options.vocab_size == 11


HOSTILE = (
  '";__import__("os").system("touch ran");"',
  "'; open('ran', 'w'); '",
  '$(touch ran)`touch ran`;touch ran #',
  'a\nopen("ran", "w")\n',
  '{{ 7 * 7 }}<script>',
)


@pytest.mark.slow
def test_names_of_folders_are_never_run(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for number, name in enumerate(HOSTILE):
    folder = tmp_path / name.replace('/', '')
    source, workdir = checkpoint(folder / 'hf'), folder / 'run'
    lines = import_run.import_run(source, workdir, RunConfig())
    spec = importlib.util.spec_from_file_location(
      'own', workdir / 'this_config.py'
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    assert config.data.tokenizer.json.path == str(workdir / 'huggingface')
    # The command that is printed for a shell has the folder in quotes.
    command = lines[-1].removeprefix('go on: ').rpartition('; with')[0]
    words = [f'--config={workdir}/this_config.py', f'--workdir={workdir}']
    assert shlex.split(command)[3:] == words
    export_run.export_run(workdir, tmp_path / f'out{number}')
  assert not list(tmp_path.rglob('ran'))


@pytest.mark.slow
def test_an_export_of_a_foreign_run_copies_only_its_own(tmp_path):
  source, workdir = checkpoint(tmp_path / 'hf'), tmp_path / 'run'
  import_run.import_run(source, workdir, RunConfig())
  files = workdir / 'huggingface'
  # No code, pickle, weights or other config is copied.
  for name in ('modeling.py', 'pytorch_model.bin', 'x.safetensors', 'run.sh'):
    (files / name).write_text(SECRET)
  (files / 'Config.json').write_text(json.dumps({'auto_map': {'a': 'b.C'}}))
  export_run.export_run(workdir, tmp_path / 'out')
  names = {path.name for path in (tmp_path / 'out').iterdir()}
  assert names == {'config.json', 'model.safetensors', 'tokenizer.json'}
  (files / 'leak.json').symlink_to(tmp_path / 'secret')
  shutil.rmtree(tmp_path / 'out')
  with pytest.raises(ValueError, match=r'leak\.json is a link to'):
    export_run.export_run(workdir, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_an_import_copies_no_link(tmp_path):
  source = checkpoint(tmp_path / 'hf')
  (source / 'leak.json').symlink_to('/etc/passwd')
  with pytest.raises(ValueError, match=r"leak\.json is a link to '/etc/pass"):
    import_run.import_run(source, tmp_path / 'run', RunConfig())
  assert not (tmp_path / 'run').exists()
