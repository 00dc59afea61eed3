"""Logits, greedy tokens and weights equal transformers', both ways."""

import json

import jax
import numpy as np
import pytest

from moe_jax import interop
from moe_jax.data.plain_files import read_json
from moe_jax.interop import loading, tensor_files, verifying
from tests.interop import oracle

torch = pytest.importorskip('torch')
from safetensors.torch import load_file, save_file  # noqa: E402

YARN = dict(
  rope_type='yarn',
  rope_theta=100.0,
  factor=4.0,
  original_max_position_embeddings=8,
)
LONGROPE = dict(
  rope_type='longrope',
  rope_theta=100.0,
  short_factor=[1.0, 1.2, 1.5],
  long_factor=[2.0, 3.0, 4.0],
  short_mscale=1.1,
  long_mscale=1.3,
  # All rows are longer. In transformers the longest of a batch decides for all,
  # with us each document for itself.
  original_max_position_embeddings=4,
)
# Each option that shapes a model is set in a model where it matters. Rows are
# padded on the right, or on the left, where padding takes slots before the
# text.
CASES = {
  'deepseek2': ('deepseek_v2', 'right', dict()),
  'deepseek2 groups, short queries, biased, all sparse, one shared, YaRN': (
    'deepseek_v2',
    'left',
    dict(
      topk_method='group_limited_greedy',
      n_group=3,
      topk_group=2,
      q_lora_rank=14,
      attention_bias=True,
      routed_scaling_factor=2.5,
      num_hidden_layers=2,
      first_k_dense_replace=0,
      tie_word_embeddings=True,
      n_shared_experts=1,
      rms_norm_eps=1e-2,
      rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=1.2),
    ),
  ),
  'deepseek3 as Moonlight: one group, two dense layers': (
    'deepseek_v3',
    'left',
    dict(
      n_routed_experts=64,
      num_experts_per_tok=6,
      n_group=1,
      topk_group=1,
      q_lora_rank=None,
      n_shared_experts=2,
      routed_scaling_factor=2.446,
      rms_norm_eps=1e-5,
      first_k_dense_replace=2,
    ),
  ),
  'deepseek3 not renormalised, halves rotate, biased, tied, YaRN': (
    'deepseek_v3',
    'right',
    dict(
      num_hidden_layers=2,
      first_k_dense_replace=0,
      n_group=2,
      topk_group=1,
      norm_topk_prob=False,
      rope_interleave=False,
      attention_bias=True,
      tie_word_embeddings=True,
      rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=1.0),
    ),
  ),
  'mixtral window, wide heads, one key head, tied, gelu, three experts': (
    'mixtral',
    'left',
    dict(
      head_dim=10,
      num_key_value_heads=1,
      sliding_window=4,
      tie_word_embeddings=True,
      num_experts_per_tok=3,
      hidden_act='gelu_pytorch_tanh',
      rms_norm_eps=1e-2,
      rope_parameters=dict(rope_type='default', rope_theta=50.0),
    ),
  ),
  'gpt-oss': ('gpt_oss', 'right', dict()),
  'gpt-oss a window in the first layer, one narrow key head, tied': (
    'gpt_oss',
    'left',
    dict(
      num_hidden_layers=2,
      layer_types=['sliding_attention', 'full_attention'],
      num_key_value_heads=1,
      sliding_window=3,
      rope_parameters=dict(rope_type='default', rope_theta=50.0),
      head_dim=4,
      num_experts_per_tok=2,
      attention_bias=False,
      tie_word_embeddings=True,
    ),
  ),
  'granite': ('granitemoe', 'right', dict()),
  'granite tied, biased, gelu, all key heads, all experts chosen, YaRN': (
    'granitemoe',
    'left',
    dict(
      tie_word_embeddings=True,
      attention_bias=True,
      embedding_multiplier=1.0,
      attention_multiplier=1.0,
      residual_multiplier=1.0,
      logits_scaling=1.0,
      hidden_act='gelu_pytorch_tanh',
      num_key_value_heads=4,
      num_experts_per_tok=6,
      rope_parameters=YARN,
    ),
  ),
  'olmoe renormalised, clipped, biased, tied, one key head, YaRN': (
    'olmoe',
    'left',
    dict(
      norm_topk_prob=True,
      clip_qkv=0.4,
      attention_bias=True,
      tie_word_embeddings=True,
      num_key_value_heads=1,
      rms_norm_eps=1e-2,
      rope_parameters=YARN,
    ),
  ),
  'phimoe biases, window, many experts near the best, LongRoPE': (
    'phimoe',
    'left',
    dict(
      lm_head_bias=True,
      attention_bias=True,
      sliding_window=4,
      router_jitter_noise=0.3,
      rope_parameters=LONGROPE,
      num_key_value_heads=4,
      rms_norm_eps=1e-2,
    ),
  ),
  'qwen2 every second layer, a window, no biases, tied, gelu, YaRN': (
    'qwen2_moe',
    'right',
    dict(
      decoder_sparse_step=2,
      num_hidden_layers=2,
      norm_topk_prob=True,
      qkv_bias=False,
      tie_word_embeddings=True,
      hidden_act='gelu_pytorch_tanh',
      num_key_value_heads=1,
      use_sliding_window=True,
      sliding_window=4,
      rope_parameters=YARN | dict(beta_fast=4.0, attention_factor=1.3),
    ),
  ),
  'qwen3 renormalised, the second layer dense, windows, tied, biased, YaRN': (
    'qwen3_moe',
    'left',
    dict(
      norm_topk_prob=True,
      num_hidden_layers=2,
      mlp_only_layers=[1],
      tie_word_embeddings=True,
      attention_bias=True,
      head_dim=6,
      use_sliding_window=True,
      sliding_window=4,
      rope_parameters=YARN | dict(truncate=False),
    ),
  ),
  'switch': ('switch_transformers', 'right', dict()),
  'switch router bias, one slot, none sparse, so one, few buckets': (
    'switch_transformers',
    'left',
    dict(
      router_bias=True,
      expert_capacity=1,
      dense_act_fn='gelu_new',
      num_layers=2,
      num_sparse_encoder_layers=0,
      num_sparse_decoder_layers=2,
      d_kv=8,
      layer_norm_epsilon=1e-2,
      relative_attention_num_buckets=8,
      relative_attention_max_distance=9,
    ),
  ),
  'nllb overflow': (
    'nllb-moe',
    'right',
    dict(moe_eval_capacity_token_fraction=0.2, router_bias=True),
  ),
  'nllb overflow, best first, renormalised before': (
    'nllb-moe',
    'left',
    dict(
      encoder_layers=2,
      moe_eval_capacity_token_fraction=0.2,
      normalize_router_prob_before_dropping=True,
      batch_prioritized_routing=True,
    ),
  ),
  'nllb fixed capacity, padding routed, all else, nothing tied': (
    'nllb-moe',
    'right',
    dict(
      encoder_layers=2,
      moe_eval_capacity_token_fraction=-1.0,
      expert_capacity=5,
      router_ignore_padding_tokens=True,
      scale_embedding=False,
      tie_word_embeddings=False,
      moe_token_dropout=0.0,
      activation_function='gelu',
      pad_token_id=0,
      encoder_sparse_step=1,
      decoder_sparse_step=0,
    ),
  ),
}


def model_and_side(name):
  kind, side, options = CASES[name]
  return oracle.make(kind, seed=len(name), **options), side == 'left'


def test_every_family_of_transformers_has_a_case():
  # A family whose code is in its checkpoints has a test file of its own.
  assert {kind for kind, *_ in CASES.values()} == {
    model_type
    for model_type, architecture in interop.ARCHITECTURES.items()
    if not architecture.needs_code
  }


# Models with the usual options, which other cases leave as they are in part.
LOGITS_ALONE = ('deepseek2', 'gpt-oss', 'granite')


@pytest.mark.slow
@pytest.mark.parametrize(
  'name',
  [
    name
    for name in CASES
    if name not in (*LOGITS_ALONE, 'switch', 'nllb overflow')
  ],
)
def test_logits_tokens_and_weights(name, tmp_path):
  model, pad_left = model_and_side(name)
  source, exported = tmp_path / 'theirs', tmp_path / 'ours'
  expected = oracle.write(model, source, seed=len(name), pad_left=pad_left)
  verdict = verifying.verify(source, source / 'expected.npz')
  assert verdict.largest_difference < 5e-5  # half of the allowed difference
  assert verdict.first_difference is None, verdict.describe()
  assert verdict.num_equal_tokens >= 8
  # Outputs must vary, or any model would agree.
  assert len(np.unique(expected['greedy'])) >= 4
  assert expected['logits'].std() > 0.1
  # Exported again, the model has the same weights and options.
  options, _, variables = interop.load(source)
  interop.save(options, variables, exported)
  reloaded, info = type(model).from_pretrained(
    exported, output_loading_info=True
  )
  assert not any(info.values())
  old, new = model.state_dict(), reloaded.state_dict()
  assert old.keys() == new.keys()
  if not model.config.tie_word_embeddings and model.config.is_encoder_decoder:
    # This weight is not used: with zero the logits are the same, see below.
    for weights in (old, new):
      weights.pop(next(key for key in weights if 'shared' in key)).zero_()
  assert all(torch.equal(old[key], new[key]) for key in old)
  batch = {key: expected[key] for key in oracle.inputs(model)}
  np.testing.assert_allclose(
    oracle.logits(reloaded.eval(), batch), expected['logits'], rtol=0, atol=1e-5
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  'kind',
  # The others have the names and forms of one of these.
  ['deepseek_v2', 'granitemoe', 'mixtral'],
)
def test_experts_that_are_stacked_in_files(kind, tmp_path):
  """Both kinds of files give one model; other tests compare it with theirs."""
  model = oracle.make(kind)
  plain, stacked = tmp_path / 'plain', tmp_path / 'stacked'
  model.save_pretrained(plain)
  model.save_pretrained(stacked, save_original_format=False)
  config = read_json(stacked / 'config.json')
  # Older files have the other spelling of the number of experts.
  for name, other_name in (
    ('num_experts', 'num_local_experts'),
    ('num_local_experts', 'num_experts'),
    ('n_routed_experts', 'num_experts'),
  ):
    if name in config:
      config[other_name] = config.pop(name)
      break
  (stacked / 'config.json').write_text(json.dumps(config))
  assert [
    any(
      name.endswith('experts.gate_up_proj')
      for name in tensor_files.TensorFiles(folder).specs
    )
    for folder in (plain, stacked)
  ] == [False, True]
  from_stacked, from_plain = interop.load(stacked), interop.load(plain)
  assert from_stacked.options == from_plain.options
  jax.tree.map(
    np.testing.assert_array_equal, from_stacked.variables, from_plain.variables
  )


@pytest.mark.slow
def test_experts_in_mxfp4_are_those_in_bfloat16(tmp_path):
  """The same blocks, as they are and decoded by transformers."""
  mxfp4 = pytest.importorskip('transformers.integrations.mxfp4')
  sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2)
  model = oracle.make('gpt_oss', **sizes).to(torch.bfloat16)
  rng, packed = np.random.default_rng(0), {}
  with torch.no_grad():
    for name, value in model.named_parameters():
      if name.endswith(('gate_up_proj', 'down_proj')):
        E, inputs, outputs = value.shape
        shape = E, outputs, inputs // 32
        blocks = torch.tensor(rng.integers(0, 256, (*shape, 16), np.uint8))
        scales = torch.tensor(rng.integers(121, 126, shape, np.uint8))
        value.copy_(mxfp4.convert_moe_packed_tensors(blocks, scales))
        packed[name] = dict(blocks=blocks, scales=scales)
  plain, quantized, exported = (tmp_path / name for name in 'abc')
  model.save_pretrained(plain)
  tensors = load_file(plain / 'model.safetensors')
  for name, arrays in packed.items():
    del tensors[name]
    tensors |= {f'{name}_{suffix}': value for suffix, value in arrays.items()}
  quantized.mkdir()
  save_file(tensors, quantized / 'model.safetensors')
  config = read_json(plain / 'config.json')
  config['quantization_config'] = {'quant_method': 'mxfp4'}
  (quantized / 'config.json').write_text(json.dumps(config))
  from_quantized, from_plain = interop.load(quantized), interop.load(plain)
  jax.tree.map(
    np.testing.assert_array_equal,
    from_quantized.variables,
    from_plain.variables,
  )
  # The exported tensors are in bfloat16, as transformers would write them.
  interop.save(
    from_quantized.options, from_quantized.variables, exported, config=config
  )
  assert 'quantization_config' not in read_json(exported / 'config.json')
  reloaded, info = type(model).from_pretrained(
    exported, output_loading_info=True
  )
  assert not any(info.values())
  old, new = model.state_dict(), reloaded.state_dict()
  assert all(torch.equal(old[key], new[key].to(old[key])) for key in old)


@pytest.mark.parametrize('name', [*LOGITS_ALONE, 'nllb overflow'])
def test_logits(name, tmp_path):
  kind, side, options = CASES[name]
  few_layers = {
    'nllb-moe': dict(
      encoder_layers=1,
      decoder_layers=1,
      encoder_sparse_step=1,
      decoder_sparse_step=1,
    ),
    'granitemoe': dict(num_hidden_layers=1),
  }.get(kind, dict(num_hidden_layers=2))
  model = oracle.make(kind, seed=len(name), **options, **few_layers)
  batch = oracle.inputs(model, seed=len(name), pad_left=side == 'left')
  expected = oracle.logits(model, batch)
  model.save_pretrained(tmp_path)
  checkpoint = loading.fetch(tmp_path, dtype='float32')
  logits, is_real = verifying.logits(
    checkpoint.options.build(),
    loading.load_variables(checkpoint),
    batch,
    checkpoint.architecture.unnumbered_id(checkpoint.options),
  )
  assert expected[is_real].std() > 0.1
  np.testing.assert_allclose(
    logits[is_real], expected[is_real], rtol=0, atol=5e-5
  )


def drops(model, batch) -> float:
  """Share of tokens, padding included, that get no slot at all."""
  num_dropped, num_routed = 0, 0

  def count(module, inputs, output):
    nonlocal num_dropped, num_routed
    slots_per_token = output[0].reshape(-1, output[0].shape[-1]).sum(-1)
    num_dropped += int((slots_per_token == 0).sum())
    num_routed += len(slots_per_token)

  hooks = [
    module.register_forward_hook(count)
    for name, module in model.named_modules()
    if name.endswith('.router')
  ]
  oracle.logits(model, batch)
  for hook in hooks:
    hook.remove()
  return num_dropped / num_routed


@pytest.mark.parametrize(
  ('name', 'min_share'),
  [
    ('switch', 0.1),
    ('switch router bias, one slot, none sparse, so one, few buckets', 0.2),
    ('nllb overflow', 0.1),
    ('nllb fixed capacity, padding routed, all else, nothing tied', 0.05),
  ],
)
def test_where_slots_run_out_tokens_are_dropped(name, min_share):
  model, pad_left = model_and_side(name)
  batch = oracle.inputs(model, seed=len(name), pad_left=pad_left)
  assert drops(model, batch) > min_share
