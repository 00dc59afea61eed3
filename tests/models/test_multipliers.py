"""Granite's four multipliers, by hand and as transformers has them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers.attention import AttentionOptions
from moe_jax.layers.experts import Dropless, FeedForwardExpert
from moe_jax.layers.ffn import FfnOptions
from moe_jax.layers.routers import TokenChoice
from moe_jax.models import DecoderOptions
from moe_jax.models.embeddings import EmbeddingOptions
from moe_jax.routing.capacity import All
from tests.models import tiny

DENSE = dict(layers='none')


def test_multipliers_are_those_of_kernels():
  # A number before a product is one in its kernel; tied logits also have that
  # of the embeddings, so that embeddings are not tied here.
  given = dict(
    embedding=dict(tie=False, multiplier=3.0, logits_divisor=0.5),
    residual_multiplier=0.25,
    attention=dict(scale='fixed', fixed_scale=0.2),
  )
  scaled = tiny.build(DENSE, **given)
  plain = tiny.build(
    DENSE, embedding=dict(tie=False), attention=dict(scale='none')
  )
  params = tiny.params_of(scaled)
  factors = {'w_query': 0.2, 'w_out': 0.25, 'w_logits': 2.0, 'embedding': 3.0}

  def multiplied(path, leaf):
    return factors.get(path[-1].key, 1.0) * leaf

  same = jax.tree_util.tree_map_with_path(multiplied, params)
  tokens = jnp.asarray(tiny.tokens())
  logits = tiny.apply(scaled)(params, tokens)[0]
  assert np.std(logits) > 0.1
  np.testing.assert_allclose(
    logits, tiny.apply(plain)(same, tokens)[0], rtol=1e-4, atol=1e-4
  )


def test_logits_have_a_bias_before_they_are_divided():
  given = dict(logits_divisor=4.0)
  biased = tiny.build(DENSE, embedding=dict(logits_bias=True, **given))
  plain = tiny.build(DENSE, embedding=given)
  params = tiny.params_of(biased)
  bias = params['b_logits']
  assert bias.shape == (tiny.V,)
  rest = {name: leaf for name, leaf in params.items() if name != 'b_logits'}
  tokens = jnp.asarray(tiny.tokens())
  difference = (
    tiny.apply(biased)(params, tokens)[0] - tiny.apply(plain)(rest, tokens)[0]
  )
  expected = np.broadcast_to(bias / 4, difference.shape)
  np.testing.assert_allclose(difference, expected, rtol=1e-3, atol=1e-5)


def test_a_fixed_scale_without_effect_is_refused():
  with pytest.raises(ValueError, match=r'fixed_scale=0\.5 has no effect'):
    AttentionOptions(fixed_scale=0.5)


@pytest.mark.slow
def test_granite():
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  V, M, F, E, K, H, N, L = 31, 24, 10, 5, 2, 4, 2, 2
  torch.manual_seed(0)
  theirs = transformers.GraniteMoeForCausalLM(
    transformers.GraniteMoeConfig(
      vocab_size=V,
      hidden_size=M,
      intermediate_size=F,
      num_hidden_layers=L,
      num_attention_heads=H,
      num_key_value_heads=N,
      num_local_experts=E,
      num_experts_per_tok=K,
      embedding_multiplier=6.0,
      attention_multiplier=0.3,
      residual_multiplier=0.22,
      logits_scaling=3.0,
      rms_norm_eps=1e-6,
      tie_word_embeddings=True,
      attn_implementation='eager',
      experts_implementation='eager',
      initializer_range=0.3,
    )
  ).eval()
  weights = {k: v.numpy() for k, v in theirs.state_dict().items()}
  model = DecoderOptions(
    vocab_size=V,
    num_layers=L,
    width=M,
    attention=AttentionOptions(H, N, scale='fixed', fixed_scale=0.3),
    embedding=EmbeddingOptions(multiplier=6.0, logits_divisor=3.0),
    residual_multiplier=0.22,
    ffn=FfnOptions(F, 'swiglu'),
    moe=tiny.moe_options(
      num_experts=E,
      num_selected=K,
      router=TokenChoice(gates='renormalized'),
      capacity=All(),
      dispatch=Dropless(),
      expert=FeedForwardExpert(F, 'swiglu'),
    ),
  ).build()

  def layer(i):
    own = {
      k.removeprefix(f'model.layers.{i}.'): v
      for k, v in weights.items()
      if k.startswith(f'model.layers.{i}.')
    }
    both = own['block_sparse_moe.experts.gate_up_proj'].swapaxes(1, 2)
    attention = {
      f'w_{name}': own[f'self_attn.{name[0]}_proj.weight'].T.reshape(M, n, -1)
      for name, n in (('query', H), ('key', N), ('value', N))
    }
    out = own['self_attn.o_proj.weight'].T.reshape(H, -1, M)
    return {
      'attention_norm': {'scale': own['input_layernorm.weight']},
      'ffn_norm': {'scale': own['post_attention_layernorm.weight']},
      'attention': {**attention, 'w_out': out},
      'moe': {
        'router': {'w': own['block_sparse_moe.router.weight'].T},
        'experts': {
          'w_gate': both[..., :F],
          'w_in': both[..., F:],
          'w_out': own['block_sparse_moe.experts.down_proj'].swapaxes(1, 2),
        },
      },
    }

  stacked = jax.tree.map(lambda *x: np.stack(x), *map(layer, range(L)))
  params = {
    'embedding': weights['model.embed_tokens.weight'],
    'final_norm': {'scale': weights['model.norm.weight']},
    'layers': {'layer_0': stacked},
  }
  tokens = np.random.default_rng(0).integers(0, V, (2, 9))
  with torch.no_grad():
    expected = theirs(torch.tensor(tokens)).logits.numpy()
  params = jax.tree.map(jnp.asarray, params)
  logits = jax.jit(model.apply)({'params': params}, jnp.asarray(tokens))[0]
  assert np.std(expected) > 0.1
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
