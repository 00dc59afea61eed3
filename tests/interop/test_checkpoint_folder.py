"""Every key of config.json is honoured or refused, and all are reported."""

import json

import pytest

from moe_jax.interop import checkpoint_folder
from moe_jax.interop.quirks import ServedByRank, TransformersEncoderDecoder
from moe_jax.models import DecoderOptions
from moe_jax.routing.capacity import All, Fixed
from tests.interop import oracle

KINDS = sorted(oracle.CLASSES)


def open_config(folder, **config):
  (folder / 'config.json').write_text(json.dumps(config))
  return checkpoint_folder.open_checkpoint(folder)


@pytest.mark.parametrize('kind', KINDS)
def test_every_key_of_transformers_is_sorted(kind):
  keys = checkpoint_folder.ARCHITECTURES[kind].keys
  sorted_keys = {*keys.honoured, *keys.training, *keys.fixed, *keys.ignored}
  sorted_keys |= {*keys.spellings}
  config = oracle.CLASSES[kind].config_class()
  assert not set(config.to_dict()) - sorted_keys


@pytest.mark.parametrize('kind', KINDS)
def test_defaults_are_those_of_transformers(kind):
  # A key that a config.json lacks has the default of transformers' class.
  keys = checkpoint_folder.ARCHITECTURES[kind].keys
  config = oracle.CLASSES[kind].config_class().to_dict()
  # transformers computes these from other keys, or has renamed them.
  derived = {
    'rope_parameters',
    'mlp_only_layers',
    'layer_types',
    *(('sliding_window',) if 'qwen' in kind else ()),
    *(
      ('num_key_value_heads',)
      if kind in ('olmoe', 'deepseek_v2', 'granitemoe')
      else ()
    ),
    *(
      ('encoder_sparse_step', 'decoder_sparse_step') if 'switch' in kind else ()
    ),
  }
  for name, (_, default, *_) in {**keys.honoured, **keys.training}.items():
    if name in config and name not in derived:
      assert config[name] == default, name
  for name, supported in keys.fixed.items():
    if name in config:
      assert config[name] in supported, name


# An older release wrote this config, with keys that have lost their meaning.
OLD_SWITCH = dict(
  architectures=['SwitchTransformersForConditionalGeneration'],
  add_router_probs=False,
  d_ff=3072,
  d_kv=64,
  d_model=768,
  decoder_sparse_step=2,
  decoder_start_token_id=0,
  dense_act_fn='relu',
  dropout_rate=0.1,
  encoder_sparse_step=2,
  eos_token_id=1,
  expert_capacity=64,
  feed_forward_proj='relu',
  initializer_factor=1.0,
  is_encoder_decoder=True,
  is_gated_act=False,
  layer_norm_epsilon=1e-06,
  model_type='switch_transformers',
  n_positions=512,
  num_decoder_layers=12,
  num_experts=8,
  num_heads=12,
  num_layers=12,
  num_sparse_decoder_layers=6,
  num_sparse_encoder_layers=6,
  output_past=True,
  pad_token_id=0,
  relative_attention_max_distance=128,
  relative_attention_num_buckets=32,
  router_aux_loss_coef=0.001,
  router_bias=False,
  router_dtype='float32',
  router_ignore_padding_tokens=False,
  router_jitter_noise=0.01,
  router_type='tokens_masked',
  router_z_loss_coef=0.001,
  task_specific_params={'summarization': {'num_beams': 4}},
  torch_dtype='float32',
  transformers_version='4.25.0.dev0',
  use_cache=True,
  vocab_size=32128,
)
OLD_MIXTRAL = dict(
  architectures=['MixtralForCausalLM'],
  attention_dropout=0.0,
  bos_token_id=1,
  eos_token_id=2,
  hidden_act='silu',
  hidden_size=4096,
  initializer_range=0.02,
  intermediate_size=14336,
  max_position_embeddings=32768,
  model_type='mixtral',
  num_attention_heads=32,
  num_experts_per_tok=2,
  num_hidden_layers=32,
  num_key_value_heads=8,
  num_local_experts=8,
  output_router_logits=False,
  rms_norm_eps=1e-05,
  rope_theta=1000000.0,
  router_aux_loss_coef=0.02,
  sliding_window=None,
  tie_word_embeddings=False,
  torch_dtype='bfloat16',
  transformers_version='4.36.0.dev0',
  use_cache=True,
  vocab_size=32000,
)
OLD_NLLB = dict(
  architectures=['NllbMoeForConditionalGeneration'],
  d_model=2048,
  encoder_layers=24,
  decoder_layers=24,
  encoder_ffn_dim=8192,
  decoder_ffn_dim=8192,
  max_length=200,
  model_type='nllb-moe',
  normalize_router_prob_before_dropping=True,
  num_hidden_layers=24,
  router_type='top_2',
  tokenizer_class='NllbTokenizer',
  torch_dtype='float32',
  vocab_size=256206,
)


def test_a_switch_of_2022(tmp_path):
  m = open_config(tmp_path, **OLD_SWITCH).options
  assert type(m) is TransformersEncoderDecoder and m.route_padding
  assert (m.num_layers, m.encoder.num_layers, m.width) == (12, 12, 768)
  assert m.moe.layers == m.encoder_half.moe.layers == '1,3,5,7,9,11'
  assert m.moe.capacity == Fixed(64)
  assert m.attention.scale == 'none'
  assert m.embedding.logits_scale == 'inverse_sqrt_width'
  router = m.moe.router
  assert (router.balance_weight, router.jitter, m.dropout) == (0.001, 0.01, 0.1)


def test_a_mixtral_of_2023(tmp_path):
  checkpoint = open_config(tmp_path, **OLD_MIXTRAL)
  m = checkpoint.options
  assert type(m) is DecoderOptions
  attention = m.attention
  assert (attention.head_width, attention.num_kv_heads) == (128, 8)
  assert m.positions.theta == 1e6
  assert (m.numerics.dtype, m.numerics.param_dtype) == ('bfloat16', 'bfloat16')
  router = m.moe.router
  assert (router.balance_weight, router.z_weight) == (0.02, 0.0)
  assert checkpoint.notes == ()
  other_base = open_config(tmp_path, **OLD_MIXTRAL | dict(rope_theta=5e5))
  assert other_base.options.positions.theta == 5e5


def test_an_nllb_of_2023(tmp_path):
  checkpoint = open_config(tmp_path, **OLD_NLLB)
  m = checkpoint.options
  assert not m.route_padding
  assert m.moe.layers == '3,7,11,15,19,23'
  assert type(m.moe.router) is ServedByRank and m.moe.capacity == All()
  assert m.moe.router.gates == 'renormalized'
  # Notes name the options of training that transformers has and we lack, and
  # nothing else.
  assert [note.split('=')[0] for note in checkpoint.notes] == [
    'activation_dropout',
    'encoder_layerdrop',
    'decoder_layerdrop',
  ]


@pytest.mark.parametrize(
  ('kind', 'options', 'messages'),
  [
    (
      'mixtral',
      dict(
        head_dimm=4,
        hidden_act='relu',
        num_experts_per_tok=1,
        sliding_window=0,
        vocab_size='many',
        rms_norm_eps=True,
        quantization_config={'bits': 4},
        rope_parameters={'rope_type': 'linear', 'factor': 2.0},
      ),
      (
        "unknown key 'head_dimm'; did you mean 'head_dim'?",
        "hidden_act='relu' is not supported, only ['gelu_new', ",
        'num_experts_per_tok=1 is not supported',
        'sliding_window=0 is no length of at least 1 in int32, or null',
        "vocab_size='many' is no int",
        'rms_norm_eps=True is no finite number above 0',
        "quantization_config={'bits': 4} is not supported, only None",
        "rope type 'linear' is not supported",
      ),
    ),
    (
      'switch_transformers',
      dict(
        router_dtype='bfloat16',
        is_gated_act=True,
        feed_forward_proj='gated-gelu',
        dense_act_fn='silu',
        expert_capacity=0,
        is_decoder=True,
      ),
      (
        "router_dtype='bfloat16' is not supported, only 'float32'",
        'is_gated_act=True is not supported, only False',
        "feed_forward_proj='gated-gelu' is not dense_act_fn",
        "dense_act_fn='silu' is not supported",
        'expert_capacity=0 must be at least 1',
        'is_decoder=True is not supported',
      ),
    ),
    (
      'olmoe',
      dict(
        num_experts_per_tok=1,
        norm_topk_prob=True,
        clip_qkv=-1.0,
        partial_rotary_factor=0.5,
      ),
      (
        'num_experts_per_tok=1 with norm_topk_prob=True is not supported',
        'clip_qkv=-1.0 is no finite number above 0',
        'partial_rotary_factor=0.5 is not supported, only 1',
      ),
    ),
    (
      'qwen2_moe',
      dict(
        use_sliding_window=True,
        sliding_window=0,
        mlp_only_layers=[0, 1, 2, 'x'],
        layer_types=['sliding_attention', 'chunked'],
        rope_scaling={'type': 'yarn', 'beta_slow': 0, 'mscale': 0},
      ),
      (
        'sliding_window=0 must be at least 1 with use_sliding_window=True',
        "mlp_only_layers has 'x', which is no layer",
        'leave no layer sparse of 3',
        "layer_types has 'chunked', neither sliding_attention nor full_att",
        'layer_types has 2 layers, num_hidden_layers=3',
        "beta_slow=0 of rope type 'yarn' is no finite number above 0",
        "rope type 'yarn' lacks ['factor']",
      ),
    ),
    (
      'deepseek_v2',
      dict(
        norm_topk_prob=True,
        n_shared_experts=None,
        num_key_value_heads=1,
        num_attention_heads=5,
        topk_method='best',
        n_group=1,
        topk_group=2,
        first_k_dense_replace=3,
      ),
      (
        'norm_topk_prob=True is not supported, only False or None',
        'n_shared_experts=None is no integer of at least 0',
        'num_key_value_heads=1 is not num_attention_heads=5',
        'num_attention_heads=5 does not divide hidden_size=24',
        "topk_method='best' is not supported",
        'topk_group=2 is more than n_group=1',
        'first_k_dense_replace=3 leaves no layer sparse of 3',
      ),
    ),
    (
      'phimoe',
      dict(
        num_experts_per_tok=3,
        sliding_window=0,
        rope_scaling={'type': 'longrope', 'short_factor': [1, 0, 1]},
      ),
      (
        'num_experts_per_tok=3 is not supported, only 2',
        'sliding_window=0 is no length of at least 1 in int32, or null',
        'short_factor=[1, 0, 1] is no list of numbers above 0',
        "'longrope' lacks ['long_factor', 'long_mscale', 'short_mscale']",
      ),
    ),
    (
      'gpt_oss',
      dict(
        hidden_act='gelu_new',
        swiglu_limit=5.0,
        layer_types=['full_attention', 'linear'],
        quantization_config={'quant_method': 'fp8'},
      ),
      (
        "hidden_act='gelu_new' is not supported, only 'silu'",
        'swiglu_limit=5.0 is not supported, only 7.0',
        "layer_types has 'linear'",
        'layer_types has 2 layers, num_hidden_layers=3',
        "quant_method='fp8' is not supported, only 'mxfp4'",
      ),
    ),
    (
      'nllb-moe',
      dict(
        second_expert_policy='sampling',
        router_dtype='float16',
        d_model=25,
        num_experts=1,
        expert_capacity=0,
        moe_eval_capacity_token_fraction=-1.0,
        pad_token_id=None,
      ),
      (
        "second_expert_policy='sampling' is not supported, only 'all'",
        "router_dtype='float16' is not supported",
        'encoder_attention_heads=3 does not divide d_model=25',
        'decoder_attention_heads=2 does not divide d_model=25',
        'num_experts=1 must be at least 2',
        'expert_capacity=0 must be at least 1',
        'pad_token_id=None is no int',
      ),
    ),
  ],
)
def test_all_that_is_wrong_is_listed(kind, options, messages, tmp_path):
  config = {**oracle.BASE[kind], **options, 'model_type': kind}
  with pytest.raises(ValueError, match='checkpoint is not supported') as caught:
    open_config(tmp_path, **config)
  lines = str(caught.value).splitlines()
  assert len(lines) == 1 + len(messages)
  for message in messages:
    assert message in str(caught.value)


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    ({'model_type': 'mixtrall'}, "'mixtrall'; did you mean 'mixtral'"),
    ({}, r'unknown model_type in .*None; .*nllb-moe'),
    (
      {
        'model_type': 'mixtral',
        'architectures': ['MixtralForSequenceClassification'],
      },
      "unknown architecture in .*have .'MixtralForCausalLM', 'MixtralModel'",
    ),
    ({'model_type': 'mixtral', 'dtype': 'int8'}, "unknown dtype in .*'int8'"),
    (
      {'model_type': 'mixtral', 'num_attention_heads': 5},
      r'config\.json: num_kv_heads=8 does not divide num_heads=5',
    ),
  ],
)
def test_refused(config, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    open_config(tmp_path, **config)


def test_no_config(tmp_path):
  with pytest.raises(ValueError, match=r'has no config\.json'):
    checkpoint_folder.open_checkpoint(tmp_path)


def test_half_precision_is_read_into_single(tmp_path):
  config = {**oracle.BASE['mixtral'], 'model_type': 'mixtral'}
  checkpoint = open_config(tmp_path, **config, dtype='float16')
  assert checkpoint.options.numerics.param_dtype == 'float32'
  numerics = checkpoint_folder.open_checkpoint(
    tmp_path, 'bfloat16'
  ).options.numerics
  assert (numerics.dtype, numerics.param_dtype) == ('bfloat16', 'bfloat16')


def test_no_key_is_sorted_twice():
  for architecture in checkpoint_folder.ARCHITECTURES.values():
    groups = vars(architecture.keys).values()
    names = [name for group in groups for name in group]
    assert sorted({*names}) == sorted(names), architecture.model_type


# Layer i is sparse if i % step == 1, or if step == 1. Where no layer is to be
# sparse, the step is the number of layers, and layer 1 is sparse nevertheless.
@pytest.mark.parametrize(
  ('options', 'layers'),
  [
    (dict(num_layers=6, num_sparse_encoder_layers=3), '1,3,5'),
    (dict(num_layers=6, num_sparse_encoder_layers=2), '1,4'),
    (dict(num_layers=6, num_sparse_encoder_layers=4), 'all'),
    (dict(num_layers=6, num_sparse_encoder_layers=0), '1'),
    (dict(num_layers=6, num_sparse_encoder_layers=7), 'none'),
    (dict(num_layers=1, num_sparse_encoder_layers=0), 'all'),
    (dict(num_layers=6, encoder_sparse_step=5), '1'),
    (dict(num_layers=6, encoder_sparse_step=0), 'none'),
  ],
)
def test_which_layers_of_switch_are_sparse(options, layers, tmp_path):
  config = {**oracle.BASE['switch_transformers'], **options}
  checkpoint = open_config(tmp_path, **config, model_type='switch_transformers')
  assert checkpoint.options.encoder_half.moe.layers == layers
