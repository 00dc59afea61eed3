"""Runs that go on with the state of another run's optimizer."""

import jax
import numpy as np
import pytest

from moe_jax.config import merge
from tests.finetuning import test_start
from tests.finetuning.test_start import DENSE, config_from, initial_state, train
from tests.models.tiny import leaves
from tests.training import tiny

KEEP_OPTIMIZER = {'init_from': {'keep_optimizer': True}}


def config_with_state_of(workdir, model=DENSE, **overrides):
  return merge(config_from(workdir, model, **overrides), KEEP_OPTIMIZER)


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """The folder and the last state of a dense run of two steps."""
  workdir = tmp_path_factory.mktemp('source')
  config = tiny.config(
    total_steps=2, model=DENSE, evals={}, sample={'num_tokens': 0}
  )
  return workdir, train(
    merge(config, {'checkpoint': {'keep_best': False}}), workdir
  )


def adam_of(state):
  """Adam's link of an optimizer: the first with arrays."""
  return next(link for link in state.opt_state if jax.tree.leaves(link))


def test_moments_and_their_count_are_kept_and_the_schedule_is_new(
  source, tmp_path
):
  workdir, source_state = source
  # Without clipping Adam is another link of the chain.
  config = config_with_state_of(workdir, optimizer={'clip_norm': 0.0})
  state = initial_state(config, tmp_path / 'kept', 1)
  jax.tree.map(
    np.testing.assert_array_equal, adam_of(state), adam_of(source_state)
  )
  assert int(adam_of(state).count) == 2
  assert int(state.opt_state[-1].count) == 0 == int(state.step)
  assert any(leaf.any() for leaf in jax.tree.leaves(adam_of(state).mu))
  fresh_state = initial_state(config_from(workdir, DENSE), tmp_path / 'new', 1)
  assert not any(leaf.any() for leaf in jax.tree.leaves(adam_of(fresh_state)))


def test_a_part_and_a_mesh_take_their_share(source, tmp_path):
  workdir, source_state = source
  mesh = {'data': 2, 'fsdp': 2}
  config = config_with_state_of(workdir, trainable='attention', mesh=mesh)
  state = initial_state(config, tmp_path, 4)
  moments, source_moments = (
    leaves(adam_of(s).mu['layers']) for s in (state, source_state)
  )
  assert 0 < len(moments) < len(source_moments)
  for name, leaf in moments.items():
    np.testing.assert_array_equal(leaf, source_moments[name])


def test_what_does_not_fit_is_refused_by_its_name(source, tmp_path):
  workdir, _ = source
  cases = {
    r"'adamw' there, Adafactor here(.|\n)*missing: opt_state/1/": (
      config_with_state_of(workdir, optimizer={'kind': 'adafactor'})
    ),
    'factors of adapters are new': config_with_state_of(
      workdir, lora={'rank': 2}
    ),
    'converted.*made sparse': config_with_state_of(workdir, test_start.SPARSE),
  }
  for message, config in cases.items():
    with pytest.raises(ValueError, match=message):
      initial_state(config, tmp_path / 'run', 1)
    assert not (tmp_path / 'run').exists()
