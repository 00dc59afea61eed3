"""DeepSeek's checkpoints: the bias, left-out layers and published config."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from moe_jax import cli, interop, run_config
from moe_jax.config import merge
from moe_jax.interop import checkpoint_folder, import_run
from moe_jax.interop.export_run import export_run
from moe_jax.run_config import RunConfig
from moe_jax.runs.checkpointer import Checkpointer
from moe_jax.runs.workdir import checkpoints_of
from moe_jax.training import setup, trained
from tests.interop import folders, oracle, test_parity

torch = pytest.importorskip('torch')
files = pytest.importorskip('safetensors.torch')

# The config.json of the published DeepSeek-V3, but for its bytes in 8 bits.
PUBLISHED = dict(
  architectures=['DeepseekV3ForCausalLM'],
  attention_bias=False,
  attention_dropout=0.0,
  auto_map={'AutoConfig': 'configuration_deepseek.DeepseekV3Config'},
  bos_token_id=0,
  eos_token_id=1,
  ep_size=1,
  first_k_dense_replace=3,
  hidden_act='silu',
  hidden_size=7168,
  initializer_range=0.02,
  intermediate_size=18432,
  kv_lora_rank=512,
  max_position_embeddings=163840,
  model_type='deepseek_v3',
  moe_intermediate_size=2048,
  moe_layer_freq=1,
  n_group=8,
  n_routed_experts=256,
  n_shared_experts=1,
  norm_topk_prob=True,
  num_attention_heads=128,
  num_experts_per_tok=8,
  num_hidden_layers=61,
  num_key_value_heads=128,
  num_nextn_predict_layers=1,
  q_lora_rank=1536,
  qk_nope_head_dim=128,
  qk_rope_head_dim=64,
  rms_norm_eps=1e-06,
  rope_scaling=dict(
    beta_fast=32,
    beta_slow=1,
    factor=40,
    mscale=1.0,
    mscale_all_dim=1.0,
    original_max_position_embeddings=4096,
    type='yarn',
  ),
  rope_theta=10000,
  routed_scaling_factor=2.5,
  scoring_func='sigmoid',
  tie_word_embeddings=False,
  topk_group=4,
  topk_method='noaux_tc',
  torch_dtype='bfloat16',
  transformers_version='4.33.1',
  use_cache=True,
  v_head_dim=128,
  vocab_size=129280,
)
EIGHT_BITS = dict(fmt='e4m3', quant_method='fp8', weight_block_size=[128, 128])


def open_config(folder, config):
  (folder / 'config.json').write_text(json.dumps(config))
  return checkpoint_folder.open_checkpoint(folder)


def biases(variables):
  return [np.asarray(x) for x in jax.tree.leaves(variables['router_state'])]


def test_the_published_config_is_read(tmp_path):
  checkpoint = open_config(tmp_path, PUBLISHED)
  (note,) = checkpoint.notes
  assert note.startswith('num_nextn_predict_layers=1 is not carried over')
  model = checkpoint.options
  router = model.moe.router
  assert (router.expert_groups, router.chosen_expert_groups) == (8, 4)
  assert (router.gate_scale, router.balance_bias_rate) == (2.5, 0.001)
  assert (router.balance_weight, router.z_weight) == (0.0, 0.0)
  assert model.sparse == (False,) * 3 + (True,) * 58
  assert model.attention.cached_width == 576


def test_what_is_refused(tmp_path):
  config = PUBLISHED | dict(
    quantization_config=EIGHT_BITS,
    scoring_func='softmax',
    topk_method='greedy',
    n_group=None,
  )
  with pytest.raises(ValueError, match='is not supported') as caught:
    open_config(tmp_path, config)
  _, *lines = str(caught.value).splitlines()
  assert len(lines) == 4
  for message in (
    "quant_method='fp8': tensors that are quantized are not read; convert them",
    "scoring_func='softmax' is not supported, only 'sigmoid'",
    "topk_method='greedy' is not supported, only 'noaux_tc'",
    'n_group=None is not supported; all experts are one group with 1',
  ):
    assert message in str(caught.value)


def test_layers_for_further_tokens_are_left_out(tmp_path):
  oracle.make('deepseek_v3').save_pretrained(tmp_path)
  path = tmp_path / 'model.safetensors'
  tensors = files.load_file(path)
  # One such layer is behind the last one, and one is where DeepSeek-V3 has it.
  # If there are others, the config has fewer layers than the model.
  for layer in (3, 61, 4):
    tensors[f'model.layers.{layer}.eh_proj.weight'] = torch.zeros(24, 48)
  files.save_file(tensors, path)
  with pytest.raises(
    ValueError, match='does not hold the deepseek_v3'
  ) as caught:
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
  jax.tree.map(np.testing.assert_array_equal, reloaded.variables, variables)
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
    jax.tree.map(np.testing.assert_array_equal, stored['params'], state.params)
    variables = {'router_state': state.router_state}
    np.testing.assert_array_equal(biases(stored), biases(variables))
    return variables

  np.testing.assert_array_equal(biases(initial_variables()), biases(imported))
  export_run(workdir, tmp_path / 'out')
  exported = interop.load(tmp_path / 'out').variables
  jax.tree.map(np.testing.assert_array_equal, exported, imported)
  # A checkpoint of step 0 without a bias, which other commands may write.
  with Checkpointer(checkpoints_of(workdir)) as checkpoints:
    checkpoints.save(0, {'params': imported['params']})
  assert not any(bias.any() for bias in biases(initial_variables()))


def run_options(workdir):
  source = dict(python_stdlib=dict(modules='email'))
  config = cli.config_of(str(workdir / 'this_config.py'))
  return run_config.read(merge(config, dict(data=dict(source=source))))


def test_biases_of_the_parity_case_change_choices():
  name = 'deepseek3 as Moonlight: one group, two dense layers'
  model, pad_left = test_parity.model_and_side(name)
  batch = oracle.inputs(model, seed=len(name), pad_left=pad_left)
  changed = []

  def compare(router, inputs, output):
    bias = router.e_score_correction_bias.clone()
    router.e_score_correction_bias.zero_()
    unbiased = router.forward(*inputs)[2]
    router.e_score_correction_bias.copy_(bias)
    pairs = output[2].sort(-1)[0] != unbiased.sort(-1)[0]
    changed.append(float(pairs.any(-1).float().mean()))

  for module in model.modules():
    if hasattr(module, 'e_score_correction_bias'):
      module.register_forward_hook(compare)
  oracle.logits(model, batch)
  assert changed and min(changed) > 0.2
