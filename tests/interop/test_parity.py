"""The contract of a checkpoint family: every entry of `ARCHITECTURES` keeps it.

Each key of config.json is used or refused by its name; a checkpoint has the
logits, gradients and greedy tokens of transformers' model, which is the oracle;
and exported again it is the same. Families whose code is in their checkpoints
have loops for an oracle, in test files of their own.
"""

import copy
import json

import jax
import numpy as np
import pytest

from moe_jax import interop
from moe_jax.data.plain_files import read_json
from moe_jax.interop import checkpoint_folder, loading, tensor_files, verifying
from moe_jax.interop.quirks import ServedByRank, TransformersEncoderDecoder
from moe_jax.models import DecoderOptions
from moe_jax.routing.capacity import All, Fixed
from tests.interop import folders, oracle, test_deepseek_moe, test_openmoe

torch = pytest.importorskip('torch')

KINDS = sorted(oracle.CLASSES)
BASES = oracle.BASE | {'deepseek': test_deepseek_moe.BASE}
BASES['openmoe'] = test_openmoe.BASE

YARN = dict(
  rope_type='yarn', rope_theta=100.0, factor=4.0,
  original_max_position_embeddings=8,
)  # fmt: skip
# All rows are longer than these 4 tokens. In transformers the longest of a
# batch decides for all, with us each document for itself.
LONGROPE = dict(
  rope_type='longrope', rope_theta=100.0, short_factor=[1.0, 1.2, 1.5],
  long_factor=[2.0, 3.0, 4.0], short_mscale=1.1, long_mscale=1.3,
  original_max_position_embeddings=4,
)  # fmt: skip
# Each option that shapes a model is set in a model where it matters. Rows are
# padded on the right, or on the left, where padding takes slots before the
# text.
CASES = {
  'deepseek2': ('deepseek_v2', 'right', dict()),
  'deepseek2 groups, short queries, biased, all sparse, one shared, YaRN': (
    'deepseek_v2', 'left', dict(
      topk_method='group_limited_greedy', n_group=3, topk_group=2,
      q_lora_rank=14, attention_bias=True, routed_scaling_factor=2.5,
      num_hidden_layers=2, first_k_dense_replace=0, tie_word_embeddings=True,
      n_shared_experts=1, rms_norm_eps=1e-2,
      rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=1.2),
    ),
  ),
  'deepseek3 as Moonlight: one group, two dense layers': (
    'deepseek_v3', 'left', dict(
      n_routed_experts=64, num_experts_per_tok=6, n_group=1, topk_group=1,
      q_lora_rank=None, n_shared_experts=2, routed_scaling_factor=2.446,
      rms_norm_eps=1e-5, first_k_dense_replace=2,
    ),
  ),
  'deepseek3 not renormalised, halves rotate, biased, tied, YaRN': (
    'deepseek_v3', 'right', dict(
      num_hidden_layers=2, first_k_dense_replace=0, n_group=2, topk_group=1,
      norm_topk_prob=False, rope_interleave=False, attention_bias=True,
      tie_word_embeddings=True,
      rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=1.0),
    ),
  ),
  'mixtral window, wide heads, one key head, tied, gelu, three experts': (
    'mixtral', 'left', dict(
      head_dim=10, num_key_value_heads=1, sliding_window=4,
      tie_word_embeddings=True, num_experts_per_tok=3,
      hidden_act='gelu_pytorch_tanh', rms_norm_eps=1e-2,
      rope_parameters=dict(rope_type='default', rope_theta=50.0),
    ),
  ),
  'gpt-oss': ('gpt_oss', 'right', dict()),
  'gpt-oss a window in the first layer, one narrow key head, tied': (
    'gpt_oss', 'left', dict(
      num_hidden_layers=2, layer_types=['sliding_attention', 'full_attention'],
      num_key_value_heads=1, sliding_window=3,
      rope_parameters=dict(rope_type='default', rope_theta=50.0), head_dim=4,
      num_experts_per_tok=2, attention_bias=False, tie_word_embeddings=True,
    ),
  ),
  'granite': ('granitemoe', 'right', dict()),
  'granite tied, biased, gelu, all key heads, all experts chosen, YaRN': (
    'granitemoe', 'left', dict(
      tie_word_embeddings=True, attention_bias=True, embedding_multiplier=1.0,
      attention_multiplier=1.0, residual_multiplier=1.0, logits_scaling=1.0,
      hidden_act='gelu_pytorch_tanh', num_key_value_heads=4,
      num_experts_per_tok=6, rope_parameters=YARN,
    ),
  ),
  'olmoe renormalised, clipped, biased, tied, one key head, YaRN': (
    'olmoe', 'left', dict(
      norm_topk_prob=True, clip_qkv=0.4, attention_bias=True,
      tie_word_embeddings=True, num_key_value_heads=1, rms_norm_eps=1e-2,
      rope_parameters=YARN,
    ),
  ),
  'phimoe biases, window, many experts near the best, LongRoPE': (
    'phimoe', 'left', dict(
      lm_head_bias=True, attention_bias=True, sliding_window=4,
      router_jitter_noise=0.3, rope_parameters=LONGROPE, num_key_value_heads=4,
      rms_norm_eps=1e-2,
    ),
  ),
  'qwen2 every second layer, a window, no biases, tied, gelu, YaRN': (
    'qwen2_moe', 'right', dict(
      decoder_sparse_step=2, num_hidden_layers=2, norm_topk_prob=True,
      qkv_bias=False, tie_word_embeddings=True, hidden_act='gelu_pytorch_tanh',
      num_key_value_heads=1, use_sliding_window=True, sliding_window=4,
      rope_parameters=YARN | dict(beta_fast=4.0, attention_factor=1.3),
    ),
  ),
  'qwen3 renormalised, the second layer dense, windows, tied, biased, YaRN': (
    'qwen3_moe', 'left', dict(
      norm_topk_prob=True, num_hidden_layers=2, mlp_only_layers=[1],
      tie_word_embeddings=True, attention_bias=True, head_dim=6,
      use_sliding_window=True, sliding_window=4,
      rope_parameters=YARN | dict(truncate=False),
    ),
  ),
  'switch router bias, one slot, none sparse, so one, few buckets': (
    'switch_transformers', 'left', dict(
      router_bias=True, expert_capacity=1, dense_act_fn='gelu_new',
      num_layers=2, num_sparse_encoder_layers=0, num_sparse_decoder_layers=2,
      d_kv=8, layer_norm_epsilon=1e-2, relative_attention_num_buckets=8,
      relative_attention_max_distance=9,
    ),
  ),
  'nllb overflow': (
    'nllb-moe', 'right',
    dict(moe_eval_capacity_token_fraction=0.2, router_bias=True),
  ),
  'nllb overflow, best first, renormalised before': (
    'nllb-moe', 'left', dict(
      encoder_layers=2, moe_eval_capacity_token_fraction=0.2,
      normalize_router_prob_before_dropping=True,
      batch_prioritized_routing=True,
    ),
  ),
  'nllb fixed capacity, padding routed, all else, nothing tied': (
    'nllb-moe', 'right', dict(
      encoder_layers=2, moe_eval_capacity_token_fraction=-1.0,
      expert_capacity=5, router_ignore_padding_tokens=True,
      scale_embedding=False, tie_word_embeddings=False, moe_token_dropout=0.0,
      activation_function='gelu', pad_token_id=0, encoder_sparse_step=1,
      decoder_sparse_step=0,
    ),
  ),
}  # fmt: skip


def test_every_family_has_a_case():
  by_code = {k for k, a in interop.ARCHITECTURES.items() if a.needs_code}
  assert {kind for kind, *_ in CASES.values()} == {*KINDS}
  assert {*BASES} - {*KINDS} == by_code


def open_config(folder, kind, **changes):
  """A small checkpoint's config.json, opened with changes."""
  config = {'model_type': kind, **BASES[kind], **changes}
  (folder / 'config.json').write_text(json.dumps(config))
  return checkpoint_folder.open_checkpoint(folder)


@pytest.mark.parametrize('kind', KINDS)
def test_keys_and_defaults_are_those_of_transformers(kind):
  keys = interop.ARCHITECTURES[kind].keys
  names = [name for group in vars(keys).values() for name in group]
  assert sorted({*names}) == sorted(names)
  config = oracle.CLASSES[kind].config_class().to_dict()
  assert not set(config) - {*names}
  # transformers computes these from other keys, or has renamed them.
  derived = {'rope_parameters', 'mlp_only_layers', 'layer_types'}
  if 'qwen' in kind:
    derived.add('sliding_window')
  if kind in ('olmoe', 'deepseek_v2', 'granitemoe'):
    derived.add('num_key_value_heads')
  if 'switch' in kind:
    derived |= {'encoder_sparse_step', 'decoder_sparse_step'}
  for name, (_, default, *_) in {**keys.honoured, **keys.training}.items():
    if name in config and name not in derived:
      assert config[name] == default, name
  for name, supported in keys.fixed.items():
    if name in config:
      assert config[name] in supported, name


@pytest.mark.parametrize('kind', interop.ARCHITECTURES)
def test_a_key_with_a_value_of_no_kind_is_refused_by_its_name(kind):
  keys = interop.ARCHITECTURES[kind].keys
  names = {*keys.honoured, *keys.training, *keys.fixed}
  config = {**BASES[kind], **dict.fromkeys(names, ()), 'model_type': kind}
  with pytest.raises(tensor_files.ProblemsError) as caught:
    checkpoint_folder.from_config({**config, 'none_such': 1})
  refused = {text.split('=')[0] for text in caught.value.problems}
  assert names <= refused
  assert any('none_such' in text for text in refused)


# Values that a key may have alone, but not with the others, and values that no
# dimension of a tensor would refuse.
REFUSED = {
  'mixtral': (
    dict(
      hidden_act='relu', num_experts_per_tok=1, sliding_window=0,
      rms_norm_eps=True, rope_parameters={'rope_type': 'linear', 'factor': 2.0},
    ),
    "relu | num_experts_per_tok=1 | dow=0 | eps=True | rope type 'linear'",
  ),
  'switch_transformers': (
    dict(
      feed_forward_proj='gated-gelu', dense_act_fn='silu', expert_capacity=0,
    ),
    "gelu' is not dense_act_fn | dense_act_fn='silu' | capacity=0",
  ),
  'olmoe': (
    dict(num_experts_per_tok=1, norm_topk_prob=True, partial_rotary_factor=0.5),
    'tok=1 with norm_topk_prob=True | factor=0.5',
  ),
  'qwen2_moe': (
    dict(
      use_sliding_window=True, sliding_window=0, mlp_only_layers=[0, 1, 2, 'x'],
      layer_types=['sliding_attention', 'chunked'],
      rope_scaling={'type': 'yarn', 'beta_slow': 0, 'mscale': 0},
    ),
    "sliding_window=0 | has 'x', which is no layer | none of 3 layers | "
    "has 'chunked' | 2 layers, num_hidden_layers=3 | beta_slow=0 | 'factor'",
  ),
  'deepseek_v2': (
    dict(
      num_key_value_heads=1, num_attention_heads=5, topk_method='best',
      n_group=1, topk_group=2, first_k_dense_replace=3,
    ),
    'value_heads=1 is not | not divide hidden_size=24 | '
    "topk_method='best' | topk_group=2 is more | replace=3: none of 3 layers",
  ),
  'deepseek_v3': (
    dict(n_group=None, quantization_config={'quant_method': 'fp8'}),
    "quant_method='fp8' | n_group=None",
  ),
  'phimoe': (
    dict(
      num_experts_per_tok=3,
      rope_scaling={'type': 'longrope', 'short_factor': [1, 0, 1]},
    ),
    "num_experts_per_tok=3 | short_factor=[1, 0, 1] | 'long_factor', 'long_ms",
  ),
  'gpt_oss': (
    dict(
      hidden_act='gelu_new', layer_types=['full_attention', 'linear'],
      quantization_config={'quant_method': 'fp8'},
    ),
    "gelu_new | has 'linear' | layer_types has 2 layers | quant_method='fp8'",
  ),
  'nllb-moe': (
    dict(
      d_model=25, num_experts=1, expert_capacity=0,
      moe_eval_capacity_token_fraction=-1.0, pad_token_id=None,
    ),
    'encoder_attention_heads=3 | decoder_attention_heads=2 | num_experts=1 | '
    'expert_capacity=0 | pad_token_id=None',
  ),
  'deepseek': (
    dict(
      first_k_dense_replace=1, hidden_size=13, moe_layer_freq=28,
      n_shared_experts=0, rope_scaling=dict(type='linear', factor=2.0),
    ),
    'heads=2 does not divide hidden_size=13 | freq=28: none of | '
    "n_shared_experts=0 | rope type 'linear'",
  ),
  'openmoe': (
    dict(
      hidden_act='silu', moe_layer_interval=25, router_topk=3,
      rope_parameters={'rope_theta': 5e5},
    ),
    'silu | interval=25: none of 2 layers is sparse | router_topk=3 | '
    'rope_theta=500000',
  ),
}  # fmt: skip


@pytest.mark.parametrize('kind', REFUSED)
def test_all_values_that_do_not_fit_together_are_named(kind, tmp_path):
  options, parts = REFUSED[kind]
  with pytest.raises(tensor_files.ProblemsError) as caught:
    open_config(tmp_path, kind, **options)
  for part in parts.split(' | '):
    assert any(part in text for text in caught.value.problems), part
  assert len(caught.value.problems) == len(parts.split(' | '))


def test_the_class_and_the_dtype_are_checked(tmp_path):
  for changes, message in (
    ({'model_type': 'mixtrall'}, "did you mean 'mixtral'"),
    ({'architectures': ['MixtralForSequenceClassification']}, 'Sequence'),
    ({'dtype': 'int8'}, "'int8'"),
  ):
    with pytest.raises(ValueError, match=message):
      open_config(tmp_path, 'mixtral', **changes)
  # Half precision is read into single.
  checkpoint = open_config(tmp_path, 'mixtral', dtype='float16')
  assert checkpoint.options.numerics.param_dtype == 'float32'
  numerics = checkpoint_folder.open_checkpoint(tmp_path, 'bfloat16').options
  numerics = numerics.numerics
  assert (numerics.dtype, numerics.param_dtype) == ('bfloat16', 'bfloat16')


def test_a_switch_of_2022():
  m = folders.published('switch_transformers').options
  assert type(m) is TransformersEncoderDecoder and m.route_padding
  assert (m.num_layers, m.encoder.num_layers, m.width) == (12, 12, 768)
  assert m.moe.layers == m.encoder_half.moe.layers == '1,3,5,7,9,11'
  assert m.moe.capacity == Fixed(64)
  assert m.attention.scale == 'none'
  assert m.embedding.logits_scale == 'inverse_sqrt_width'
  router = m.moe.router
  assert (router.balance_weight, router.jitter, m.dropout) == (0.001, 0.01, 0.1)


def test_a_mixtral_of_2023():
  checkpoint = folders.published('mixtral')
  m = checkpoint.options
  assert type(m) is DecoderOptions
  assert (m.attention.head_width, m.attention.num_kv_heads) == (128, 8)
  assert m.positions.theta == 1e6
  other_base = checkpoint.config | dict(rope_theta=5e5)
  assert checkpoint_folder.from_config(other_base).positions.theta == 5e5
  router = m.moe.router
  assert (router.balance_weight, router.z_weight) == (0.02, 0.0)
  assert checkpoint.notes == ()


def test_an_nllb_of_2023():
  checkpoint = folders.published('nllb-moe')
  m = checkpoint.options
  assert not m.route_padding
  assert m.moe.layers == '3,7,11,15,19,23'
  assert type(m.moe.router) is ServedByRank and m.moe.capacity == All()
  assert m.moe.router.gates == 'renormalized'
  # Notes name the options of training that transformers has and we lack.
  assert [note.split('=')[0] for note in checkpoint.notes] == [
    'activation_dropout', 'encoder_layerdrop', 'decoder_layerdrop',
  ]  # fmt: skip


# Layer i is sparse if i % step == 1, or if step == 1. Where no layer is to be
# sparse, the step is the number of layers, and layer 1 is sparse nevertheless.
@pytest.mark.parametrize(
  ('options', 'layers'),
  [
    (dict(num_layers=6, num_sparse_encoder_layers=3), '1,3,5'),
    (dict(num_layers=6, num_sparse_encoder_layers=4), 'all'),
    (dict(num_layers=6, num_sparse_encoder_layers=0), '1'),
    (dict(num_layers=6, num_sparse_encoder_layers=7), 'none'),
    (dict(num_layers=1, num_sparse_encoder_layers=0), 'all'),
    (dict(num_layers=6, encoder_sparse_step=5), '1'),
    (dict(num_layers=6, encoder_sparse_step=0), 'none'),
  ],
)
def test_which_layers_of_switch_are_sparse(options, layers, tmp_path):
  checkpoint = open_config(tmp_path, 'switch_transformers', **options)
  assert checkpoint.options.encoder_half.moe.layers == layers


FULL, WINDOW = 'full_attention', 'sliding_attention'


@pytest.mark.parametrize(
  'layers',
  [
    dict(max_window_layers=3, use_sliding_window=True, sliding_window=4),
    dict(
      layer_types=[FULL, WINDOW, WINDOW, FULL, FULL],
      use_sliding_window=True,
      sliding_window=4,
    ),
    dict(max_window_layers=3),
  ],
)
def test_which_layers_of_qwen_have_a_window(layers):
  layers = dict(layers, num_hidden_layers=5)
  theirs = oracle.CLASSES['qwen2_moe'].config_class(**layers).layer_types
  options = checkpoint_folder.from_config(dict(layers, model_type='qwen2_moe'))
  kinds = [WINDOW if window else FULL for window in options.windows]
  assert kinds == theirs
  assert max(options.windows) == (4 if WINDOW in kinds else 0)


def test_a_window_without_a_width_is_refused():
  layers = dict(layer_types=[WINDOW, FULL], num_hidden_layers=2)
  with pytest.raises(ValueError, match='needs use_sliding_window'):
    checkpoint_folder.from_config(dict(layers, model_type='qwen2_moe'))


def check_outputs_vary(model, batch, expected):
  """Checks that logits vary, and depend on biases and on slots that run out."""
  assert expected.std() > 0.1
  other, changed = copy.deepcopy(model), False
  for module in other.modules():
    if hasattr(module, 'e_score_correction_bias'):
      module.e_score_correction_bias.zero_()
      changed = True
    if hasattr(module, 'expert_capacity'):
      module.expert_capacity = module.moe_eval_capacity_token_fraction = 99
      changed = True
  if changed:
    assert np.abs(oracle.logits(other, batch) - expected).max() > 0.1


def check_gradients(model, source, folder, batch):
  """Compares gradients of a weighted sum of logits, written as parameters."""
  checkpoint = loading.fetch(source, dtype='float32')
  options, ours = checkpoint.options, checkpoint.options.build()
  variables = loading.load_variables(checkpoint)
  unnumbered_id = checkpoint.architecture.unnumbered_id(options)
  inputs, is_real = oracle.our_inputs(batch, unnumbered_id)
  shape = (*is_real.shape, ours.vocab_size)
  weights = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  weights *= is_real[..., None]

  @jax.jit
  @jax.grad
  def gradients(params):
    logits, _ = ours.apply({**variables, 'params': params}, **inputs)
    return (weights * logits).sum()

  params = gradients(variables['params'])
  interop.save(options, {**variables, 'params': params}, folder)
  output = model(**{name: torch.tensor(value) for name, value in batch.items()})
  (torch.tensor(weights) * output.logits).sum().backward()
  written = dict(type(model).from_pretrained(folder).named_parameters())
  # PyTorch gives no gradient to the embedding of padding.
  Embedding = torch.nn.Embedding
  embeddings = [m for m in model.modules() if isinstance(m, Embedding)]
  pads = {id(m.weight): m.padding_idx for m in embeddings}
  for name, value in model.named_parameters():
    actual = written[name].detach()
    if (gradient := value.grad) is None:
      # The weight is not used. Where halves have embeddings of their own, the
      # file still has a shared one, which is the encoder's.
      assert name == 'model.shared.weight' or not actual.any(), name
      continue
    if pads.get(id(value)) is not None:
      actual[pads[id(value)]] = gradient[pads[id(value)]]
    bound = 1e-5 + 1e-4 * float(gradient.abs().max())
    np.testing.assert_allclose(
      actual, gradient, rtol=0, atol=bound, err_msg=name
    )


# Models with the usual options, which other cases leave as they are in part,
# and one whose slots run out.
QUICK = ('deepseek2', 'gpt-oss', 'granite', 'nllb overflow')
FEW_LAYERS = {
  'nllb-moe': dict.fromkeys(
    ('encoder_layers', 'decoder_layers', 'encoder_sparse_step',
     'decoder_sparse_step'), 1
  ),
  'granitemoe': dict(num_hidden_layers=1),
}  # fmt: skip


def make(name, **changes):
  """The model of a case, and inputs."""
  kind, side, options = CASES[name]
  model = oracle.make(kind, seed=len(name), **{**options, **changes})
  return model, oracle.inputs(model, len(name), side == 'left')


@pytest.mark.parametrize('name', QUICK)
def test_logits(name, tmp_path):
  few_layers = FEW_LAYERS.get(CASES[name][0], dict(num_hidden_layers=2))
  model, batch = make(name, **few_layers)
  expected = oracle.logits(model, batch)
  check_outputs_vary(model, batch, expected)
  model.save_pretrained(tmp_path)
  checkpoint = loading.fetch(tmp_path, dtype='float32')
  logits, is_real = verifying.logits(
    checkpoint.options.build(),
    loading.load_variables(checkpoint),
    batch,
    checkpoint.architecture.unnumbered_id(checkpoint.options),
  )
  np.testing.assert_allclose(logits[is_real], expected[is_real], atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in CASES if name not in QUICK])
def test_logits_tokens_and_weights(name, tmp_path):
  model, batch = make(name)
  source, exported = tmp_path / 'theirs', tmp_path / 'ours'
  expected = oracle.write(model, source, batch)
  check_outputs_vary(model, batch, expected['logits'])
  verdict = verifying.verify(source, source / 'expected.npz')
  assert verdict.largest_difference < 5e-5  # half of the allowed difference
  assert verdict.first_difference is None, verdict.describe()
  assert verdict.num_equal_tokens >= 8
  assert len(np.unique(expected['greedy'])) >= 4  # else any model would agree
  # Exported again, the model has the same weights and options.
  options, _, variables = interop.load(source)
  interop.save(options, variables, exported)
  reloaded = oracle.check_same_weights(model, exported)
  np.testing.assert_allclose(
    oracle.logits(reloaded, batch), expected['logits'], rtol=0, atol=1e-5
  )
  check_gradients(model, source, tmp_path / 'gradients', batch)


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
  specs = [tensor_files.TensorFiles(f).specs for f in (plain, stacked)]
  fused = [any(n.endswith('experts.gate_up_proj') for n in s) for s in specs]
  assert fused == [False, True]
  from_stacked, from_plain = interop.load(stacked), interop.load(plain)
  assert from_stacked.options == from_plain.options
  folders.assert_equal(from_stacked.variables, from_plain.variables)
