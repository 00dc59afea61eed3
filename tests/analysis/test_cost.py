"""Counts of parameters and FLOPs: published, by hand, and as the twin's."""

import jax
import pytest

from configs import glam_64b64e, mixtral_8x7b, openmoe_8b
from moe_jax import models
from moe_jax.analysis import cost
from moe_jax.config import merge
from tests.models import tiny
from tests.models.tiny import T


def counted(config):
  return cost.count(models.build(config), config.data.seq_len)


def test_mixtral_has_the_published_counts():
  mixtral = counted(mixtral_8x7b.get_config())
  assert cost.short(mixtral.total_params) == '46.7B'
  assert cost.short(mixtral.active_params) == '12.9B'


def test_glam_has_the_published_counts():
  glam = counted(glam_64b64e.get_config())
  assert cost.short(glam.total_params) == '1.16T'
  assert cost.short(glam.active_params) == '96.6B'


def test_openmoe_is_the_sum_of_its_parts():
  M, F, HD, V = 2048, 8192, 24 * 128, 256_384
  ffn = 3 * M * F
  outside = 24 * 4 * M * HD + V * M
  # 20 dense layers, 4 sparse ones, each with an extra dense feed-forward.
  outside += (20 + 4) * ffn + 4 * M * 32 + (2 * 24 + 4 + 1) * M
  openmoe = counted(openmoe_8b.get_config())
  assert openmoe.expert_params == 4 * 32 * ffn
  assert openmoe.total_params == outside + 4 * 32 * ffn
  assert openmoe.active_params == outside + 4 * 2 * ffn
  assert cost.short(openmoe.total_params) == '8.78B'


def test_counts_of_a_tiny_model_by_hand():
  model = tiny.build(
    num_kv_heads=2,
    activation='swiglu',
    tie_embeddings=False,
    moe=dict(layers='every 2', extra_ffn=True),
  )
  found = cost.count(model, T)
  attention = 12 * 24 + 2 * 12 * 12 + 24 * 12  # queries, keys and values, out
  ffn = 3 * 12 * 20
  router, logits = 12 * 5, 12 * 23
  norms = (2 + 3 + 1) * 12
  assert found.expert_params == 5 * ffn
  assert found.embedding_params == logits
  assert found.total_params == (
    2 * attention + 7 * ffn + router + 2 * logits + norms
  )
  assert found.active_params == found.total_params - 3 * ffn
  # A dense layer, two experts and the extra one; scores and their sums.
  products = 2 * attention + 4 * ffn + router + logits
  assert found.forward_flops == 2 * products + 2 * 2 * 2 * T * 24
  assert found.training_flops == 3 * found.forward_flops
  assert found.router_flops == 2 * router
  # ceil(1.25 * 10 / 5) = 3 slots in 5 experts, for 10 tokens of two choices.
  assert found.capacity_slack == 15 / 20


@pytest.mark.parametrize('positions', ['learned', 'relative'])
def test_what_is_looked_up_or_added_is_not_multiplied(positions):
  plain = cost.count(tiny.build(positions='none'), T)
  found = cost.count(tiny.build(positions=positions, use_bias=True), T)
  assert found.total_params > plain.total_params
  assert found.forward_flops == plain.forward_flops


@pytest.mark.parametrize('num_layers', [2, 3])
def test_total_is_the_size_of_parameters_that_the_model_takes(num_layers):
  model = tiny.build(positions='learned', use_bias=True, num_layers=num_layers)
  params = tiny.params_of(model)
  logits, _ = jax.eval_shape(tiny.apply(model), params, tiny.tokens())
  assert logits.shape == (tiny.B, T, tiny.V)
  total = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert cost.count(model, T).total_params == total


@pytest.mark.parametrize(
  'options',
  [dict(tie_embeddings=True), dict(tie_embeddings=False, use_bias=True)],
)
@pytest.mark.parametrize(
  'moe',
  [
    dict(num_selected=1, gates='raw', layers='all'),
    dict(num_selected=2, layers='every 2', hidden=7),
    dict(num_selected=3, layers='last 1', extra_ffn=True, activation='geglu'),
  ],
)
def test_the_dense_twin_costs_what_the_sparse_model_does_but_its_router(
  moe, options
):
  options = dict(num_layers=4, **options)
  sparse = cost.count(tiny.build(moe, **options), T)
  twin = cost.count(tiny.build({**moe, 'num_experts': 0}, **options), T)
  assert sparse.router_flops > 0
  assert twin.router_flops == twin.expert_params == 0
  assert twin.forward_flops == sparse.forward_flops - sparse.router_flops
  assert twin.active_params == twin.total_params < sparse.total_params
  assert twin.capacity_slack == 1


@pytest.mark.parametrize(
  ('n', 'expected'),
  [
    (7, '7'),
    (1536, '1.54k'),
    (46_702_792_704, '46.7B'),
    (2.5e6, '2.5M'),
    (1.16e12, '1.16T'),
  ],
)
def test_short(n, expected):
  assert cost.short(n) == expected


def test_describe_names_totals_and_the_routers_share():
  text = cost.Cost(4000, 1000, 3500, 100, 2000, 250, 1.25).describe()
  for part in ('4k total', '1k active', '3.5k in experts', '6k training'):
    assert part in text
  assert 'router 12.5%' in text
  assert '1.25 rows per assignment' in text


def test_bytes_need_no_vocabulary_and_others_are_asked_for():
  config = tiny.config(vocab_size=0)
  assert cost.with_own_vocabulary(config).model.vocab_size == 257
  given = tiny.config()
  assert cost.with_own_vocabulary(given) is given
  chars = merge(config, {'data': {'tokenizer': 'chars'}})
  with pytest.raises(ValueError, match=r"'chars'.*--config.model.vocab_size"):
    cost.with_own_vocabulary(chars)
