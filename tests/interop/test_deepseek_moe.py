"""DeepSeekMoE-16B's checkpoints equal plain loops of the published model."""

import dataclasses
import functools

import numpy as np
import pytest

from moe_jax import cli, interop, run_config
from moe_jax.finetuning.meaning import difference
from moe_jax.interop import checkpoint_folder, saving
from tests.interop import folders
from tests.interop import plain_decoder as plain

V = 41
BASE = dict(
  model_type='deepseek', architectures=['DeepseekForCausalLM'], vocab_size=V,
  hidden_size=12, intermediate_size=10, moe_intermediate_size=7,
  num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
  n_routed_experts=5, n_shared_experts=2, num_experts_per_tok=3,
  first_k_dense_replace=1, norm_topk_prob=False, rms_norm_eps=1e-6,
  tie_word_embeddings=False,
)  # fmt: skip
FAST = 'a dense layer, two shared experts'
CASES = {
  FAST: dict(),
  'renormalised, tied, biased, two dense layers, every second one': dict(
    norm_topk_prob=True, num_attention_heads=6, rms_norm_eps=1e-2,
    first_k_dense_replace=1, moe_layer_freq=2, num_hidden_layers=3,
    tie_word_embeddings=True, attention_bias=True, n_shared_experts=3,
  ),
  'one expert a token, its gate as it is, short turns, none shared': dict(
    num_experts_per_tok=1, norm_topk_prob=True, first_k_dense_replace=0,
    num_hidden_layers=1, n_shared_experts=None, rope_theta=50.0,
  ),
}  # fmt: skip


def is_sparse(c, i):
  return i >= c['first_k_dense_replace'] and i % c.get('moe_layer_freq', 1) == 0


def shapes_of(c):
  M = c['hidden_size']
  shapes = plain.common_shapes(c, M // c['num_attention_heads'])

  def ffn(path, F):
    shapes[f'{path}.gate_proj.weight'] = (F, M)
    shapes[f'{path}.up_proj.weight'] = (F, M)
    shapes[f'{path}.down_proj.weight'] = (M, F)

  for i in range(c['num_hidden_layers']):
    mlp, F = f'model.layers.{i}.mlp', c['moe_intermediate_size']
    if not is_sparse(c, i):
      ffn(mlp, c['intermediate_size'])
      continue
    shapes[f'{mlp}.gate.weight'] = (c['n_routed_experts'], M)
    for e in range(c['n_routed_experts']):
      ffn(f'{mlp}.experts.{e}', F)
    if c['n_shared_experts']:
      ffn(f'{mlp}.shared_experts', c['n_shared_experts'] * F)
  return shapes


def compute(c, w, batch, num_read):
  """The logits of the published model, however many tokens are read at once."""
  del num_read

  def ffn(path, h):
    gate, up, down = (
      w[f'{path}.{name}_proj.weight'] for name in ('gate', 'up', 'down')
    )
    return down @ (plain.silu(gate @ h) * (up @ h))

  def feed_forward(rows, i):
    layer, K = f'model.layers.{i}', c['num_experts_per_tok']
    mlp, added = f'{layer}.mlp', []
    for row in rows:
      scale = w[f'{layer}.post_attention_layernorm.weight']
      h = plain.normed(row, scale, c['rms_norm_eps'])
      if not is_sparse(c, i):
        added.append(ffn(mlp, h))
        continue
      probs = plain.softmax(w[f'{mlp}.gate.weight'] @ h)
      chosen = np.argsort(-probs)[:K]
      total = probs[chosen].sum() if c['norm_topk_prob'] and K > 1 else 1
      y = sum(probs[e] / total * ffn(f'{mlp}.experts.{e}', h) for e in chosen)
      if c['n_shared_experts']:
        y = y + ffn(f'{mlp}.shared_experts', h)
      added.append(y)
    return np.array(added)

  D = c['hidden_size'] // c['num_attention_heads']
  theta = c.get('rope_theta', 10_000.0)
  return plain.logits(c, w, batch, feed_forward, theta=theta, scale=D**-0.5)


@plain.each_name(CASES, FAST)
def test_logits_tokens_and_weights(name, tmp_path):
  config = BASE | CASES[name]
  tensors = plain.draw(shapes_of(config), seed=len(name))
  loops = functools.partial(compute, config)
  plain.check(tmp_path, config, tensors, loops, fast=name == FAST)


def test_the_published_config_is_that_of_our_config():
  checkpoint = folders.published('deepseek')
  our_options = run_config.read(cli.load_config('moe_jax:deepseek_moe_16b'))
  imported, router = checkpoint.options, checkpoint.options.moe.router
  assert difference(imported, our_options.model) == {}
  assert router == our_options.model.moe.router
  # A batch has one balance loss if sequences have none.
  config = checkpoint.config | dict(seq_aux=False)
  router = checkpoint_folder.from_config(config).moe.router
  assert (router.balance_weight, router.sequence_balance_weight) == (0.001, 0)


def test_sparse_layers_that_no_number_divides_are_not_written(tmp_path):
  options = checkpoint_folder.from_config(BASE | dict(num_hidden_layers=6))
  moe = dataclasses.replace(options.moe, layers='1,2,4')
  odd = dataclasses.replace(options, moe=moe)
  with pytest.raises(ValueError, match=r"'1,2,4' are not those that one"):
    saving.describe(odd, interop.ARCHITECTURES['deepseek'], {})
