"""DeepSeek's checkpoints: the bias, left-out layers and published config."""

import dataclasses

import jax
import numpy as np
import pytest

from moe_jax import cli, interop, run_config
from moe_jax.config import merge
from moe_jax.interop import import_run
from moe_jax.interop.export_run import export_run
from moe_jax.run_config import RunConfig
from moe_jax.runs.checkpointer import Checkpointer
from moe_jax.runs.workdir import checkpoints_of
from moe_jax.training import setup, trained
from tests.interop import folders, oracle

torch = pytest.importorskip('torch')
files = pytest.importorskip('safetensors.torch')


def biases(variables):
  return [np.asarray(x) for x in jax.tree.leaves(variables['router_state'])]


def test_the_published_config_is_read():
  checkpoint = folders.published('deepseek_v3')
  (note,) = checkpoint.notes
  assert note.startswith('num_nextn_predict_layers=1 is not carried over')
  model = checkpoint.options
  router = model.moe.router
  assert (router.expert_groups, router.chosen_expert_groups) == (8, 4)
  assert (router.gate_scale, router.balance_bias_rate) == (2.5, 0.001)
  assert (router.balance_weight, router.z_weight) == (0.0, 0.0)
  assert model.sparse == (False,) * 3 + (True,) * 58
  assert model.attention.cached_width == 576


def test_layers_for_further_tokens_are_left_out(tmp_path):
  oracle.make('deepseek_v3').save_pretrained(tmp_path)
  path = tmp_path / 'model.safetensors'
  tensors = files.load_file(path)
  # One such layer is behind the last one, and one is where DeepSeek-V3 has it.
  # If there are others, the config has fewer layers than the model.
  for layer in (3, 61, 4):
    tensors[f'model.layers.{layer}.eh_proj.weight'] = torch.zeros(24, 48)
  files.save_file(tensors, path)
  with pytest.raises(ValueError, match='not hold the deepseek_v3') as caught:
    interop.load(tmp_path)
  _, line = str(caught.value).splitlines()
  assert line.strip() == 'unknown: model.layers.4.eh_proj.weight [24, 48]'


def test_what_is_saved(tmp_path):
  oracle.make('deepseek_v3').save_pretrained(tmp_path / 'theirs')
  options, _, variables = interop.load(tmp_path / 'theirs')
  params = {'params': variables['params']}
  with pytest.raises(ValueError, match=r"\['params'\] have no 'router_state'"):
    interop.save(options, params, tmp_path / 'ours')
  # The rate of the bias acts only in training; without one there is no bias.
  changed_options = with_rate(options, 0.02)
  interop.save(changed_options, variables, tmp_path / 'ours')
  reloaded = interop.load(tmp_path / 'ours')
  assert reloaded.options == options
  assert all(bias.any() for bias in biases(variables))
  folders.assert_equal(reloaded.variables, variables)
  unbiased_options = with_rate(options, 0.0)
  with pytest.raises(ValueError, match=r'balance_bias_rate: 0\.0, not 0\.001'):
    interop.save(unbiased_options, params, tmp_path / 'other')


def with_rate(options, rate):
  router = dataclasses.replace(options.moe.router, balance_bias_rate=rate)
  moe = dataclasses.replace(options.moe, router=router)
  return dataclasses.replace(options, moe=moe)


@pytest.mark.slow
def test_a_run_begins_with_the_bias_or_with_zeros(tmp_path):
  source, workdir = tmp_path / 'theirs', tmp_path / 'run'
  folders.write(source, 'deepseek_v3')
  one_device = dict(devices=jax.devices()[:1])
  import_run.import_run(source, workdir, RunConfig(), **one_device)
  imported = interop.load(source).variables

  def initial_variables():
    # A reader of the run and the run itself begin with the same.
    run = trained.read(workdir)
    model = run.model.build(run.sharding.rules)
    stored = trained.restore_variables(workdir, model, run.sharding.rules).state
    _, state, _ = setup.begin(
      setup.set_up(run_options(workdir), workdir, resume=True, **one_device)
    )
    folders.assert_equal(stored['params'], state.params)
    variables = {'router_state': state.router_state}
    np.testing.assert_array_equal(biases(stored), biases(variables))
    return variables

  np.testing.assert_array_equal(biases(initial_variables()), biases(imported))
  export_run(workdir, tmp_path / 'out')
  exported = interop.load(tmp_path / 'out').variables
  folders.assert_equal(exported, imported)
  # A checkpoint of step 0 without a bias, which other commands may write.
  with Checkpointer(checkpoints_of(workdir)) as checkpoints:
    checkpoints.save(0, {'params': imported['params']})
  assert not any(bias.any() for bias in biases(initial_variables()))


def run_options(workdir):
  source = dict(python_stdlib=dict(modules='email'))
  config = cli.config_of(str(workdir / 'this_config.py'))
  return run_config.read(merge(config, dict(data=dict(source=source))))
