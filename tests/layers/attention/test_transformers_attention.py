"""Attention equals that of transformers' modules, with their weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers import (
  Attention,
  AttentionOptions,
  LatentAttention,
  LatentOptions,
  Rotary,
  Yarn,
)

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')
pytestmark = pytest.mark.slow

B, T, M, H, N, D = 2, 9, 24, 4, 2, 6
SIZES = dict(
  hidden_size=M,
  num_attention_heads=H,
  num_key_value_heads=N,
  attn_implementation='eager',
)


def random(module, seed=0):
  """The module with random weights, each of another mean."""
  torch.manual_seed(seed)
  with torch.no_grad():
    for value in module.parameters():
      value.copy_(0.1 + 0.5 * torch.randn_like(value))
  return module.eval()


def inputs():
  x = np.random.default_rng(0).normal(size=(B, T, M)).astype(np.float32)
  positions = np.tile(np.arange(T), (B, 1))
  return x, positions


def library_output(module, rotary, x, positions, window=0):
  """The output of the library's module for causal rows, and its weights."""
  index = np.arange(T)
  hidden = index[None] > index[:, None]
  if window:
    hidden |= index[:, None] - index[None] >= window
  mask = torch.zeros(1, 1, T, T)
  mask[0, 0, torch.tensor(hidden)] = torch.finfo(torch.float32).min
  with torch.no_grad():
    tensor = torch.tensor(x)
    angles = rotary(tensor, torch.tensor(positions))
    y, _ = module(tensor, position_embeddings=angles, attention_mask=mask)
  return y.numpy(), {k: v.numpy() for k, v in module.state_dict().items()}


def our_output(weights, x, ids, options, positions):
  """The output of our layer with these weights."""
  p = {}
  names = {'q': ('query', H), 'k': ('key', N), 'v': ('value', N)}
  for name, (our_name, heads) in names.items():
    p[f'w_{our_name}'] = weights[f'{name}_proj.weight'].T.reshape(M, heads, -1)
    if f'{name}_proj.bias' in weights:
      p[f'b_{our_name}'] = weights[f'{name}_proj.bias'].reshape(heads, -1)
    if f'{name}_norm.weight' in weights:
      scale = weights[f'{name}_norm.weight']
      width = p[f'w_{our_name}'].shape[2]
      p[f'{our_name}_norm'] = (
        scale if len(scale) == width else scale.reshape(heads, width)
      )
  p['w_out'] = weights['o_proj.weight'].T.reshape(H, -1, M)
  if 'sinks' in weights:
    p['sinks'] = weights['sinks']
  if 'o_proj.bias' in weights:
    p['b_out'] = weights['o_proj.bias']
  layer = Attention(options, positions=positions)
  p, x, ids = jax.tree.map(jnp.asarray, (p, x, ids))
  return layer.apply({'params': p}, x, None, ids)


def assert_equal(module, rotary, options, positions=Rotary(), window=0):
  x, ids = inputs()
  expected, weights = library_output(random(module), rotary, x, ids, window)
  y = our_output(weights, x, ids, options, positions)
  assert np.std(expected) > 0.1
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('clip', [None, 0.4])
@pytest.mark.parametrize('biased', [False, True])
def test_olmoe(clip, biased):
  from transformers.models.olmoe import modeling_olmoe as m

  config = transformers.OlmoeConfig(
    **SIZES, clip_qkv=clip, attention_bias=biased, rms_norm_eps=1e-3
  )
  options = AttentionOptions(
    H,
    N,
    qk_norm='all',
    qk_norm_epsilon=1e-3,
    clip=clip or 0.0,
    biases='all' if biased else 'none',
  )
  assert_equal(
    m.OlmoeAttention(config, 0), m.OlmoeRotaryEmbedding(config), options
  )


def test_qwen3_with_heads_that_are_not_as_wide_as_the_model():
  from transformers.models.qwen3_moe import modeling_qwen3_moe as m

  config = transformers.Qwen3MoeConfig(**SIZES, head_dim=10, rms_norm_eps=1e-3)
  options = AttentionOptions(H, N, 10, qk_norm='head', qk_norm_epsilon=1e-3)
  module = m.Qwen3MoeAttention(config, 0)
  assert_equal(module, m.Qwen3MoeRotaryEmbedding(config), options)


def test_qwen2_with_its_three_biases():
  from transformers.models.qwen2_moe import modeling_qwen2_moe as m

  config = transformers.Qwen2MoeConfig(**SIZES)
  options = AttentionOptions(H, N, biases='query, key, value')
  module = m.Qwen2MoeAttention(config, 0)
  assert_equal(module, m.Qwen2MoeRotaryEmbedding(config), options)


@pytest.mark.parametrize('layer', [0, 1])
def test_gpt_oss_with_sinks_yarn_and_a_window(layer):
  from transformers.models.gpt_oss import modeling_gpt_oss as m

  config = transformers.GptOssConfig(
    **SIZES,
    head_dim=8,
    sliding_window=4,
    layer_types=['sliding_attention', 'full_attention'],
    num_hidden_layers=2,
    attention_bias=True,
    rope_parameters=dict(
      rope_type='yarn',
      rope_theta=100.0,
      factor=16.0,
      beta_fast=4.0,
      original_max_position_embeddings=8,
      truncate=False,
    ),
  )
  module, window = m.GptOssAttention(config, layer), 4 * (layer == 0)
  assert (module.sliding_window or 0) == window
  scaling = Yarn(16.0, 8, 4.0, truncate=False)
  assert_equal(
    module,
    m.GptOssRotaryEmbedding(config),
    AttentionOptions(H, N, 8, window=window, sinks=True, biases='all'),
    Rotary(100.0, scaling=scaling),
    window,
  )


LATENT = dict(
  kv_lora_rank=10, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6
)
YARN = dict(factor=5.0, beta_fast=3.0, mscale=1.0, mscale_all_dim=0.6)


@pytest.mark.parametrize(
  ('version', 'query_rank', 'biased', 'yarn'),
  [(2, None, False, True), (2, 7, True, False), (3, 7, True, True)],
)
def test_deepseek(version, query_rank, biased, yarn):
  if version == 2:
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as m
  else:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as m
  rope = dict(rope_type='default', rope_theta=100.0)
  if yarn:
    rope |= dict(YARN, rope_type='yarn', original_max_position_embeddings=8)
  config = getattr(transformers, f'DeepseekV{version}Config')(
    **{**SIZES, 'num_key_value_heads': H},
    **LATENT,
    q_lora_rank=query_rank,
    attention_bias=biased,
    rope_parameters=rope,
  )
  module = random(getattr(m, f'DeepseekV{version}Attention')(config, 0))
  rotary = getattr(m, f'DeepseekV{version}RotaryEmbedding')(config)
  x, ids = inputs()
  expected, weights = library_output(module, rotary, x, ids)
  options = LatentOptions(
    H,
    query_rank=query_rank or 0,
    kv_rank=10,
    plain_width=8,
    rotary_width=4,
    value_width=6,
    biases='query_down, kv_down, out' if biased else 'none',
  )
  positions = Rotary(100.0, interleaved=True)
  if yarn:
    scaling = Yarn(original_len=8, **YARN)
    positions = Rotary(100.0, interleaved=True, scaling=scaling)
  names = {
    'w_query': ('q_proj.weight', (M, H, -1)),
    'w_query_down': ('q_a_proj.weight', (M, -1)),
    'b_query_down': ('q_a_proj.bias', (-1,)),
    'query_norm': ('q_a_layernorm.weight', (-1,)),
    'w_query_up': ('q_b_proj.weight', (query_rank, H, -1)),
    'w_kv_down': ('kv_a_proj_with_mqa.weight', (M, -1)),
    'b_kv_down': ('kv_a_proj_with_mqa.bias', (-1,)),
    'kv_norm': ('kv_a_layernorm.weight', (-1,)),
    'w_kv_up': ('kv_b_proj.weight', (10, H, -1)),
    'w_out': ('o_proj.weight', (H, 6, M)),
    'b_out': ('o_proj.bias', (M,)),
  }
  p = {
    our_name: jnp.asarray(weights[name].T.reshape(shape))
    for our_name, (name, shape) in names.items()
    if name in weights
  }
  assert len(p) == len(weights)
  layer = LatentAttention(options, positions=positions)
  y = layer.apply({'params': p}, jnp.asarray(x), None, jnp.asarray(ids))
  assert np.std(expected) > 0.1
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
