"""Checkpoints that are damaged or not finite are passed over, never good."""

import functools
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_jax.runs import manifest
from moe_jax.runs.checkpointer import Checkpointer, CheckpointError
from moe_jax.runs.manifest import BadCheckpoint
from moe_jax.runs.retention import CheckpointOptions
from tests.bad_inputs.files import GOOD, UNREADABLE, sealed


def state(step, value=1.0):
  return {
    'params': {'w': jnp.full(3, value), 'b': jnp.full(2, step, jnp.bfloat16)},
    'router_state': {'bias': jnp.zeros(2)},
    'count': jnp.int32(step),
  }


ABSTRACT = jax.eval_shape(functools.partial(state, 0))


@pytest.fixture(scope='module')
def saved_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('saved')
  with Checkpointer(folder, CheckpointOptions(keep_newest=9)) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, state(step))
  return folder


@pytest.fixture
def folder(saved_folder, tmp_path):
  shutil.copytree(saved_folder, tmp_path / 'c')
  return tmp_path / 'c'


@pytest.mark.parametrize('name', [*UNREADABLE, 'negative'])
def test_a_damaged_newest_is_passed_over(folder, name):
  content = (UNREADABLE | {'negative': sealed({**GOOD, 'step': -2})})[name]
  raw = content if isinstance(content, bytes) else content.encode()
  (folder / '2' / manifest.NAME).write_bytes(raw)
  with Checkpointer(folder) as checkpoints:
    assert checkpoints.newest_good() == 1
    assert checkpoints.best_step() is None


@pytest.mark.parametrize(
  'name', ['9' * 200, '4294967296', '٣', '3 ', '+3', '03', '3.0', 'x']
)
def test_names_that_are_no_steps_are_ignored(folder, name):
  (folder / name).mkdir()
  with Checkpointer(folder) as checkpoints:
    assert checkpoints.steps() == [1, 2]
    assert checkpoints.newest_good() == 2


@pytest.mark.parametrize(
  ('path', 'name'),
  [
    (('params', 'w'), 'params/w'),
    (('params', 'b'), 'params/b'),
    (('router_state', 'bias'), 'router_state/bias'),
  ],
)
def test_a_state_that_is_not_finite_is_not_saved(folder, path, name):
  bad_state = state(3)
  leaf = bad_state[path[0]][path[1]]
  bad_state[path[0]][path[1]] = leaf.at[-1].set(-np.inf)
  with Checkpointer(folder) as checkpoints:
    with pytest.raises(CheckpointError) as error:
      checkpoints.save(3, bad_state)
    assert f'not saved to {folder}: not finite: {name}\n' in str(error.value)
    assert 'last good step: 2' in str(error.value)
    assert checkpoints.steps() == [1, 2]


def unchecked_save(folder, step, bad_state, monkeypatch):
  """Saves as versions did that did not check whether values are finite."""
  with (
    monkeypatch.context() as patched,
    Checkpointer(folder, CheckpointOptions(keep_newest=9)) as checkpoints,
  ):
    patched.setattr('moe_jax.runs.finite.not_finite', lambda state: [])
    checkpoints.save(step, bad_state)


def test_one_that_is_not_finite_is_passed_over(folder, monkeypatch):
  for step in (3, 4):
    unchecked_save(folder, step, state(step, np.nan), monkeypatch)
  with Checkpointer(folder) as checkpoints:
    restored = checkpoints.restore(ABSTRACT)
    assert restored.step == 2
    assert restored.skipped == [
      (step, 'not finite: params/w') for step in (4, 3)
    ]
    with pytest.raises(CheckpointError, match='4: not finite: params/w'):
      checkpoints.restore(ABSTRACT, step=4)
    # A reader of a part is not stopped by the rest.
    router_state = {'router_state': ABSTRACT['router_state']}
    assert checkpoints.restore(router_state, step=4, partial=True).step == 4


def test_all_not_finite_is_an_error_and_no_fresh_start(tmp_path, monkeypatch):
  unchecked_save(tmp_path, 3, state(3, np.inf), monkeypatch)
  with (
    Checkpointer(tmp_path) as checkpoints,
    pytest.raises(CheckpointError) as error,
  ):
    checkpoints.restore(ABSTRACT)
  message = str(error.value)
  assert f'no good checkpoint in {tmp_path}' in message
  assert '3: not finite: params/w' in message


@pytest.mark.slow
@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.data())
def test_any_change_of_a_manifest_is_found(tmp_path_factory, data):
  """Either the whole content is as it was, or it is refused."""
  folder = epath.Path(tmp_path_factory.mktemp('manifest'))
  text = sealed(GOOD).encode()
  position = data.draw(st.integers(0, len(text)))
  inserted = data.draw(st.binary(max_size=6))
  num_removed = data.draw(st.integers(0, 6))
  changed = text[:position] + inserted + text[position + num_removed :]
  (folder / manifest.NAME).write_bytes(changed)
  try:
    restored = manifest.read(folder)
  except BadCheckpoint:
    return
  assert (restored.step, restored.tree) == (7, GOOD['tree']), os.fspath(folder)
