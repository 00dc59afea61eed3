"""Routers and sparse blocks with random weights equal those of transformers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import TokenChoice
from tests.layers.routers.run import G, M, S, draw, route

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
  theirs, x = make().eval(), draw(G, S, M)
  params, state = {'w': draw(M, E, seed=1)}, None
  theirs.weight.data = torch.tensor(params['w'].T.copy())
  bias = draw(E, seed=2)
  if options.use_bias:
    params['b'] = bias
    theirs.bias.data = torch.tensor(bias)
  if options.keeps_state:
    state = {'balance_bias': jnp.asarray(bias)}
    theirs.e_score_correction_bias[:] = torch.tensor(bias)
  with torch.no_grad():
    _, weights, index = theirs(torch.tensor(x.reshape(-1, M)))
  chosen, _ = route(
    options, params, x, num_experts=E, num_selected=K, state=state
  )
  want = np.zeros((G * S, E))
  np.put_along_axis(want, index.numpy(), weights.numpy(), 1)
  gates = np.asarray(chosen.token_gates()).reshape(-1, E)
  assert (want > 0).sum() == G * S * K
  np.testing.assert_allclose(gates, want, rtol=1e-5, atol=1e-6)
