"""Routers and sparse blocks with random weights equal those of transformers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import (
  All,
  Dropless,
  FeedForwardExpert,
  MoE,
  MoeOptions,
  SharedExpertOptions,
  TokenChoice,
)
from moe_jax.routing.sparse_mixer_rule import sparse_mixer
from tests.layers.routers.run import G, M, S, draw, route
from tests.models import tiny

pytestmark = pytest.mark.slow
torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

E, K = 12, 3
GROUPS = dict(n_group=4, topk_group=2, routed_scaling_factor=2.5)
IN_GROUPS = TokenChoice(gate_scale=2.5, expert_groups=4, chosen_expert_groups=2)
V2 = dataclasses.replace(IN_GROUPS, outside_expert_groups='zero')
V3 = dataclasses.replace(
  IN_GROUPS,
  gates='sigmoid_renormalized',
  balance_bias_rate=0.001,
  expert_group_score='two_best',
)


def deepseek_v3(**options):
  from transformers.models.deepseek_v3 import modeling_deepseek_v3 as library

  config = library.DeepseekV3Config(
    hidden_size=M,
    num_attention_heads=2,
    n_routed_experts=E,
    num_experts_per_tok=K,
    **options,
  )
  return library.DeepseekV3TopkRouter(config)


def deepseek_v2(**options):
  from transformers.models.deepseek_v2 import modeling_deepseek_v2 as library

  config = library.DeepseekV2Config(
    hidden_size=M,
    num_attention_heads=2,
    n_routed_experts=E,
    num_experts_per_tok=K,
    **options,
  )
  return library.DeepseekV2TopkRouter(config)


def olmoe(**options):
  from transformers.models.olmoe import modeling_olmoe as library

  config = library.OlmoeConfig(
    hidden_size=M,
    num_attention_heads=2,
    num_experts=E,
    num_experts_per_tok=K,
    **options,
  )
  return library.OlmoeTopKRouter(config)


def gpt_oss():
  from transformers.models.gpt_oss import modeling_gpt_oss as library

  config = library.GptOssConfig(
    hidden_size=M,
    num_attention_heads=2,
    num_local_experts=E,
    num_experts_per_tok=K,
  )
  return library.GptOssTopKRouter(config)


RENORMALIZED = TokenChoice(gates='renormalized')
ROUTERS = {
  'deepseek_v3': (lambda: deepseek_v3(**GROUPS), V3),
  'deepseek_v3 not renormalized': (
    lambda: deepseek_v3(**GROUPS, norm_topk_prob=False),
    dataclasses.replace(V3, gates='sigmoid'),
  ),
  'deepseek_v3 one group': (
    lambda: deepseek_v3(n_group=1, topk_group=1, routed_scaling_factor=1.0),
    TokenChoice(gates='sigmoid_renormalized', balance_bias_rate=0.001),
  ),
  'deepseek_v2 groups': (
    lambda: deepseek_v2(**GROUPS, topk_method='group_limited_greedy'),
    V2,
  ),
  'deepseek_v2 greedy': (
    lambda: deepseek_v2(routed_scaling_factor=16.0, topk_method='greedy'),
    TokenChoice(gate_scale=16.0),
  ),
  'olmoe': (lambda: olmoe(norm_topk_prob=False), TokenChoice()),
  'olmoe renormalized': (
    lambda: olmoe(norm_topk_prob=True),
    TokenChoice(gates='renormalized'),
  ),
  'gpt_oss': (gpt_oss, TokenChoice(gates='renormalized', use_bias=True)),
}


@pytest.mark.parametrize('name', ROUTERS)
def test_a_router_of_transformers_has_the_same_choices_and_gates(name):
  make, options = ROUTERS[name]
  module, x = make().eval(), draw(G, S, M)
  params, state = {'w': draw(M, E, seed=1)}, None
  module.weight.data = torch.tensor(params['w'].T.copy())
  bias = draw(E, seed=2)
  if options.use_bias:
    params['b'] = bias
    module.bias.data = torch.tensor(bias)
  if options.keeps_state:
    state = {'balance_bias': jnp.asarray(bias)}
    module.e_score_correction_bias[:] = torch.tensor(bias)
  with torch.no_grad():
    _, weights, index = module(torch.tensor(x.reshape(-1, M)))
  chosen, _ = route(
    options, params, x, num_experts=E, num_selected=K, state=state
  )
  expected = np.zeros((G * S, E))
  np.put_along_axis(expected, index.numpy(), weights.numpy(), 1)
  gates = np.asarray(chosen.token_gates()).reshape(-1, E)
  assert (expected > 0).sum() == G * S * K
  np.testing.assert_allclose(gates, expected, rtol=1e-5, atol=1e-6)


def swiglu(prefix, state, *names):
  """Kernels of a feed-forward of transformers, by our names."""
  return {
    ours: state[f'{prefix}{theirs}.weight'].numpy().T
    for ours, theirs in zip(('w_gate', 'w_in', 'w_out'), names, strict=True)
  }


def experts_of(state):
  gate_up = state['experts.gate_up_proj'].numpy().swapaxes(1, 2)
  gate, up = np.split(gate_up, 2, -1)
  down = state['experts.down_proj'].numpy().swapaxes(1, 2)
  return {'w_gate': gate, 'w_in': up, 'w_out': down}


def qwen2_block():
  from transformers.models.qwen2_moe import modeling_qwen2_moe as library

  config = library.Qwen2MoeConfig(
    hidden_size=M,
    num_attention_heads=2,
    num_experts=E,
    num_experts_per_tok=K,
    moe_intermediate_size=4,
    shared_expert_intermediate_size=9,
    norm_topk_prob=True,
    experts_implementation='eager',
  )
  options = SharedExpertOptions(9, gated=True)
  return library.Qwen2MoeSparseMoeBlock(config), RENORMALIZED, options


def deepseek_v3_block():
  from transformers.models.deepseek_v3 import modeling_deepseek_v3 as library

  config = library.DeepseekV3Config(
    hidden_size=M,
    num_attention_heads=2,
    n_routed_experts=E,
    num_experts_per_tok=K,
    moe_intermediate_size=4,
    n_shared_experts=2,
    experts_implementation='eager',
    **GROUPS,
  )
  return library.DeepseekV3MoE(config), V3, SharedExpertOptions(2 * 4)


@pytest.mark.parametrize('make', [qwen2_block, deepseek_v3_block])
def test_a_sparse_block_of_transformers_has_the_same_outputs(make):
  block, router, shared_expert = make()
  torch.manual_seed(0)
  with torch.no_grad():
    for value in [*block.parameters(), *block.buffers()]:
      value.copy_(torch.randn_like(value))
  x, state = draw(G, S, M), block.state_dict()
  with torch.no_grad():
    expected = block.eval()(torch.tensor(x))
  expected = (expected[0] if isinstance(expected, tuple) else expected).numpy()
  name = 'shared_expert' if shared_expert.gated else 'shared_experts'
  mlp = swiglu(f'{name}.', state, 'gate_proj', 'up_proj', 'down_proj')
  params = {
    'router': {'w': state['gate.weight'].numpy().T},
    'experts': experts_of(state),
    'shared_expert': {'ffn': mlp},
  }
  variables = {'params': params}
  if shared_expert.gated:
    gate = state['shared_expert_gate.weight'].numpy().T
    params['shared_expert']['w_gate'] = gate
  if router.keeps_state:
    bias = state['gate.e_score_correction_bias'].numpy()
    variables['router_state'] = {'router': {'balance_bias': bias}}
  layer = MoE(
    MoeOptions(
      num_experts=E,
      num_selected=K,
      router=router,
      capacity=All(),
      expert=FeedForwardExpert(4, 'swiglu'),
      shared_expert=shared_expert,
    )
  )
  y, _ = layer.apply(jax.tree.map(jnp.asarray, variables), jnp.asarray(x))
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('training', [False, True])
def test_sparse_mixer_of_transformers_has_the_same_gates_and_gradient(training):
  from transformers.models.phimoe.modeling_phimoe import sparsemixer

  logits, weights = draw(G * S, E) + 1, draw(G * S, 2, seed=1)
  torch_logits = torch.tensor(logits, requires_grad=True)
  torch.manual_seed(0)
  gates, index = sparsemixer(torch_logits, jitter_eps=0.2, training=training)
  (gates * torch.tensor(weights)).sum().backward()

  def total(logits):
    chosen, gate = sparse_mixer(
      logits.reshape(G, S, E),
      num_selected=2,
      threshold=0.4,
      key=tiny.key(0) if training else None,
      imposed=jnp.asarray(index.numpy().reshape(G, S, 2), jnp.int32)
      if training
      else None,
    )
    return (gate.reshape(-1, 2) * weights).sum(), (chosen, gate)

  gradient, (chosen, gate) = jax.grad(total, has_aux=True)(jnp.asarray(logits))
  assert (index[:, 0] != torch_logits.argmax(-1)).any() == training
  np.testing.assert_array_equal(chosen.reshape(-1, 2), index)
  if not training:
    gates = gates.detach().numpy()
    np.testing.assert_allclose(gate.reshape(-1, 2), gates, rtol=1e-5)
  np.testing.assert_allclose(gradient, torch_logits.grad, rtol=1e-4, atol=1e-6)


def test_experts_of_gpt_oss_have_biases_and_limits():
  from transformers.models.gpt_oss import modeling_gpt_oss as library

  config = library.GptOssConfig(
    hidden_size=M,
    intermediate_size=4,
    num_local_experts=E,
    num_experts_per_tok=K,
    experts_implementation='eager',
  )
  block = library.GptOssMLP(config).eval()
  torch.manual_seed(0)
  with torch.no_grad():
    for value in block.parameters():
      value.copy_(2 * torch.randn_like(value))
  x, state = draw(G, S, M), block.state_dict()
  with torch.no_grad():
    expected = block(torch.tensor(x))[0].numpy()
  state = {name: value.numpy() for name, value in state.items()}
  gate_up, bias = (state[f'experts.gate_up_proj{s}'] for s in ('', '_bias'))
  params = {
    'router': {'w': state['router.weight'].T, 'b': state['router.bias']},
    'experts': {
      'w_gate': gate_up[..., 0::2],
      'w_in': gate_up[..., 1::2],
      'b_gate': bias[..., 0::2],
      'b_in': bias[..., 1::2],
      'w_out': state['experts.down_proj'],
      'b_out': state['experts.down_proj_bias'],
    },
  }
  layer = MoE(
    MoeOptions(
      num_experts=E,
      num_selected=K,
      router=TokenChoice(gates='renormalized', use_bias=True),
      capacity=All(),
      expert=FeedForwardExpert(4, 'clamped_swiglu', bias='all'),
    )
  )
  for dispatch in (layer.options.dispatch, Dropless()):
    options = dataclasses.replace(layer.options, dispatch=dispatch)
    y, _ = MoE(options).apply(
      jax.tree.map(jnp.asarray, {'params': params}), jnp.asarray(x)
    )
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-3)
