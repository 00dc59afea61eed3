"""A run's folder, and checkpoints that are kept elsewhere."""

import jax
import numpy as np
import pytest

from moe_jax.config import merge
from moe_jax.runs import workdir
from moe_jax.training import loop
from tests.training import tiny


def test_a_bucket_is_no_workdir():
  config = tiny.config()
  with pytest.raises(ValueError, match=r'gs://b/run.*checkpoint\.directory'):
    workdir.check('gs://b/run', config)


def test_checkpoints_in_a_folder_of_their_own(tmp_path):
  folder, elsewhere = tmp_path / 'run', tmp_path / 'bucket' / 'run'
  config = tiny.config(
    total_steps=2,
    evals={},
    model={'moe': {'num_experts': 0}},
    checkpoint={'keep_best': False, 'directory': str(elsewhere)},
  )
  one = jax.devices()[:1]
  state = loop.train_and_evaluate(config, folder, devices=one)
  assert not (folder / workdir.CHECKPOINTS).exists()
  assert (elsewhere / '2').is_dir()
  # Who reads a run finds them by its folder alone.
  read, _ = workdir.read(folder)
  found = workdir.restore_variables(folder, tiny.model_of(read), read)
  assert found.step == 2
  for a, b in zip(
    jax.tree.leaves(found.state['params']),
    jax.tree.leaves(state.params),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  # Another run does not, unasked; nor is a folder made for it.
  with pytest.raises(ValueError, match=r'(?s)other is .*bucket/run.*--resume'):
    workdir.check(tmp_path / 'other', config)
  workdir.check(tmp_path / 'other', config, resume=True)
  assert not (tmp_path / 'other').exists()
  # It goes on from there, and nowhere else.
  longer = merge(config, {'total_steps': 3})
  state = loop.train_and_evaluate(longer, folder, devices=one, resume=True)
  assert int(state.step) == 3
  moved = merge(longer, {'checkpoint': {'directory': ''}})
  with pytest.raises(ValueError, match=r'bucket/run; checkpoint\.directory='):
    workdir.check(folder, moved, resume=True)


def test_a_run_with_checkpoints_of_its_own_keeps_them(tmp_path):
  (tmp_path / workdir.CHECKPOINTS).mkdir()  # as an imported model's
  config = tiny.config(checkpoint={'directory': 'gs://b/run'})
  with pytest.raises(ValueError, match='has its checkpoints in'):
    workdir.check(tmp_path, config)
