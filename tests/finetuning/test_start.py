"""Runs that start from another run's parameters, from config to step."""

import shutil

import jax
import numpy as np
import pytest

from moe_jax import finetuning, run_config
from moe_jax.config import merge
from moe_jax.training import loop, setup
from tests import golden
from tests.models.tiny import assert_trees_close
from tests.training import tiny
from tests.training.conftest import _equal_runs_share_programs  # noqa: F401

DENSE = {'moe': {'layers': 'none', 'num_experts': 0}}
SPARSE = {
  'moe': {
    'num_experts': 4,
    'num_selected': 2,
    'router': {'token_choice': {'gates': 'renormalized'}},
    'capacity': {'kind': 'all'},
  }
}
SHORT = {'total_steps': 2, 'sample': {'num_tokens': 0}}


def train(config, workdir, devices=1):
  return loop.train_and_evaluate(
    run_config.read(config),
    workdir,
    devices=jax.devices()[:devices],
    initial=finetuning.initial,
  )


def config_from(workdir, model=SPARSE, **overrides):
  config = tiny.config(**{**SHORT, 'model': model, **overrides})
  return merge(config, {'init_from': {'workdir': str(workdir)}})


@pytest.fixture(scope='module')
def dense(tmp_path_factory):
  """The folder of a dense run, with checkpoints at steps 1 and 2."""
  workdir = tmp_path_factory.mktemp('dense')
  config = tiny.config(**SHORT, model=DENSE)
  train(merge(config, {'checkpoint': {'every_steps': 1}}), workdir)
  return workdir


def set_up(config, workdir, devices=1, **kwargs):
  devices = jax.devices()[:devices]
  return setup.set_up(
    run_config.read(config), workdir, devices=devices, **kwargs
  )


def initial_state(config, workdir, devices=1):
  """The initial state of a run of the config, before any step."""
  run = set_up(config, workdir, devices)
  with run.checkpoints:
    return setup.begin(run, finetuning.initial)[1]


def test_a_restart_goes_on_from_its_own_checkpoint(dense, tmp_path, capsys):
  source = tmp_path / 'source'
  shutil.copytree(dense, source)
  train(config_from(source, DENSE), tmp_path / 'run')
  shutil.rmtree(source)  # a run that continues does not read its source
  capsys.readouterr()
  state = train(config_from(source, DENSE), tmp_path / 'run')
  assert int(state.step) == 2
  output = capsys.readouterr().out
  assert 'going on from the checkpoint of step 2' in output
  assert 'beginning' not in output


@pytest.mark.slow
def test_arrays_are_converted_in_their_shards(dense, tmp_path):
  num_experts = 8
  # No mesh axis divides the vocabulary of 257 tokens: the embedding is whole on
  # every device.
  moe = {'moe': {**SPARSE['moe'], 'num_experts': num_experts}}
  mesh = {'data': 1, 'fsdp': 2, 'expert': num_experts // 2, 'tensor': 1}
  config = merge(config_from(dense, moe, batch_size=8), {'mesh': mesh})
  state = initial_state(config, tmp_path / 'mesh', num_experts)
  one_device = merge(config, {'mesh': {'data': 1, 'fsdp': 1, 'expert': 1}})
  expected = initial_state(one_device, tmp_path / 'one')
  assert_trees_close(state.params, expected.params, rtol=1e-6, atol=1e-7)
  kernel = state.params['layers']['layer_1']['moe']['experts']['w_in']
  assert kernel.addressable_shards[0].data.shape == (1, 2, 8, 20)
  assert int(state.step) == 0


@pytest.mark.slow
def test_from_a_sparse_run_the_same_and_more_experts_on_a_mesh(
  dense, tmp_path, capsys
):
  router = {
    'gates': 'sigmoid', 'balance_bias_rate': 0.01, 'balance_weight': 0.0,
  }  # fmt: skip
  biased = {'moe': {**SPARSE['moe'], 'router': {'token_choice': router}}}
  config = config_from(
    dense, biased, evals={}, checkpoint={'keep_best': False}, total_steps=1
  )
  source_state = train(config, tmp_path / 'four')
  # The source has the same model, so that the state of its routers is kept.
  config = config_from(tmp_path / 'four', biased)
  router_state = initial_state(config, tmp_path / 'same').router_state
  jax.tree.map(
    np.testing.assert_array_equal, router_state, source_state.router_state
  )
  assert any(x.any() for x in jax.tree.leaves(router_state))
  capsys.readouterr()
  moe = {'moe': {**SPARSE['moe'], 'num_experts': 8}}
  config = config_from(tmp_path / 'four', moe, batch_size=8)
  # The source's four experts are not divisible by 8.
  mesh = {'data': 1, 'expert': 8}
  state = initial_state(merge(config, {'mesh': mesh}), tmp_path / 'eight', 8)
  output = capsys.readouterr().out
  assert '4 experts made 8, copies of [0, 1, 2, 3, 0, 1, 2, 3]' in output
  w = state.params['layers']['layer_1']['moe']['experts']['w_in']
  np.testing.assert_array_equal(w[:, :4], w[:, 4:])


def test_what_is_refused_leaves_no_workdir(dense, tmp_path):
  for message, config in {
    r'embedding: \[257, 16\] there': config_from(dense, {'width': 32}),
    "is as small as ':runlocal' behind": merge(
      golden.config('tiny_switch', 'runlocal'),
      {
        'init_from': {'workdir': str(dense)},
        'data': {'source': {'python_stdlib': {'modules': tiny.MODULES}}},
      },
    ),
    'trained on tokens of bytes': merge(
      config_from(dense, data={'tokenizer': {'kind': 'chars'}}),
      {'init_from': {'keep_tokenizer': False}},
    ),
    'no checkpoint 7': merge(config_from(dense), {'init_from': {'step': 7}}),
  }.items():
    with pytest.raises(ValueError, match=message):
      train(config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()
  with pytest.raises(ValueError, match='nobody to read it'):
    loop.train_and_evaluate(
      run_config.read(config_from(dense)),
      tmp_path / 'run',
      devices=jax.devices()[:1],
    )


def test_a_language_model_is_tuned_on_pairs(dense, tmp_path):
  # The ids of both tasks are bytes; only the inputs of pairs end in a token.
  config = config_from(
    dense,
    DENSE,
    data={'task': {'kind': 'seq2seq'}, 'source': {'kind': 'instructions'}},
  )
  run = set_up(config, tmp_path)
  assert 'all copied' in finetuning.initial(run)[1]


def test_options_without_a_source_are_refused():
  for name, value in (('step', 3), ('experts', '0'), ('router_std', 0.1)):
    with pytest.raises(ValueError, match=f'{name}=.* has no effect unless wor'):
      finetuning.InitFrom(**{name: value})
