"""Bytes by formula equal those of the arrays that JAX would allocate."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.extend.core import Literal

from moe_jax import models
from moe_jax.analysis import memory
from moe_jax.analysis.counts import halves
from moe_jax.layers.attention import LatentOptions
from moe_jax.layers.experts import Dropless, Einsum, Gather
from moe_jax.layers.norms import LayerNorm
from moe_jax.layers.positions import Relative
from moe_jax.layers.routers import ExpertChoice
from moe_jax.parallel.exchange import AllGather
from moe_jax.routing import expert_choice, token_choice
from moe_jax.routing.capacity import All, PerToken
from moe_jax.routing.dispatch import einsum, gather, sorted_rows
from tests.models import tiny
from tests.models.tiny import T

B, S = 3, 7  # S: tokens of an encoder's row
ENCODER_DECODER = dict(kind='encoder_decoder', positions=Relative())
# These modules move tokens; beside each are the options that select it.
MOVERS = {gather: Gather(), einsum: Einsum(), sorted_rows: Dropless()}


def num_bytes(tree):
  return sum(
    math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
    for leaf in jax.tree.leaves(tree)
  )


@pytest.mark.parametrize(
  ('options', 'dtype'),
  [(dict(use_bias=True), 'bfloat16'), (ENCODER_DECODER, 'float32')],
)
def test_weights_are_as_large_as_the_parameters(options, dtype):
  stored = tiny.build(
    numerics=dict(param_dtype=dtype), norm=LayerNorm(), **options
  )
  params = nn.meta.unbox(models.abstract_params(stored))
  model = tiny.build(norm=LayerNorm(), **options)
  assert memory.weight_bytes(model, dtype) == num_bytes(params)


def test_int8_is_a_byte_a_weight_but_for_routers_and_norms():
  model = tiny.build(attention=dict(num_kv_heads=2))
  attention = 12 * 24 + 2 * 12 * 12 + 24 * 12
  kernels = 2 * (attention + 5 * 2 * 12 * 20) + 12 * 23
  routers_and_norms = 2 * 12 * 5 + 5 * 12
  assert memory.weight_bytes(model, 'int8') == (kernels + 4 * routers_and_norms)


LATENT = LatentOptions(
  4, kv_rank=7, plain_width=6, rotary_width=2, value_width=5
)
WINDOW = dict(num_kv_heads=2, window=3)


@pytest.mark.parametrize(
  ('attention', 'dtype', 'told'),
  [
    (dict(num_kv_heads=2), 'bfloat16', 2 * B * 4 * T * 2 * 6 * 2),
    # Latent attention keeps one short vector for a token, and no heads.
    (LATENT, 'float32', B * 4 * T * (7 + 2) * 4),
    # Layers with a window keep as many slots.
    (WINDOW, 'float32', 2 * B * 4 * 3 * 2 * 6 * 4),
    (
      dict(**WINDOW, full_layers='every 2'),
      'float32',
      2 * B * 2 * (3 + T) * 2 * 6 * 4,
    ),
  ],
)
def test_the_cache_is_as_large_as_the_models(attention, dtype, told):
  model = tiny.build(
    attention=attention, num_layers=4, numerics=dict(dtype=dtype)
  )
  prepared, _ = model.for_decoding({'params': tiny.params_of(model)})
  cache = jax.eval_shape(lambda: prepared.make_cache(B, T))
  assert num_bytes((cache.key, cache.value)) == told
  assert memory.cache_bytes(model, B, T) == num_bytes(cache)


def test_the_cache_of_an_encoder_decoder_has_the_encoders_too():
  model = tiny.build(**ENCODER_DECODER, num_layers=3, encoder={'num_layers': 2})
  params = models.abstract_params(model)
  encode = functools.partial(model.apply, max_len=T, method='encode')
  tokens, mask = (jax.ShapeDtypeStruct((B, S), t) for t in (jnp.int32, bool))
  cache = jax.eval_shape(encode, {'params': params}, tokens, mask)
  assert memory.cache_bytes(model, B, T, S) == num_bytes(cache)


@pytest.mark.parametrize(
  ('options', 'groups', 'tokens'),
  [
    (dict(group_size=20), 2, 20),  # the second group is half padding
    (dict(group_size=-1, capacity=PerToken(factor=3.0)), 1, B * T),
    (dict(router=ExpertChoice(), allow_future_leak=True), B, T),
  ],
)
@pytest.mark.parametrize('mover', MOVERS)
def test_rows_are_those_of_the_dispatch(options, groups, tokens, mover):
  by_expert = 'router' in options
  if mover is sorted_rows and not by_expert:
    options = {**options, 'capacity': All()}
  model = tiny.build(
    dict(dispatch=MOVERS[mover], **options), numerics=dict(dtype='bfloat16')
  )
  (half,) = halves(model, T)
  route = functools.partial(token_choice, num_selected=2, gates='renormalized')
  rule = expert_choice if by_expert else route
  rule = functools.partial(rule, capacity=half.moe.sizes.slots(tokens))
  logits = jax.ShapeDtypeStruct((groups, tokens, 5), jnp.float32)
  routing = jax.eval_shape(rule, logits)
  x = jax.ShapeDtypeStruct((groups, tokens, 12), jnp.bfloat16)
  expected = 2 * num_bytes(jax.eval_shape(mover.dispatch, x, routing))
  if mover is einsum:
    # The mask has a byte for each token, choice and slot.
    mask = jax.eval_shape(lambda routing: routing.slot_shares(), routing)
    expected += (1 if by_expert else 2) * math.prod(mask.shape)
  assert memory.dispatch_bytes(half, B) == expected


def test_what_a_device_sends_to_the_experts_of_others():
  # In each of 4 sequences 5 experts have ceil(1.25 * 10 / 5) = 3 slots, which
  # are 60 rows in all. Each of 5 devices has a fifth of the rows, 12, keeps a
  # fifth of these and sends the others, which have 12 numbers of 4 bytes.
  (half,) = halves(tiny.build(), T)
  assert memory.expert_rows(half.stack.block.moe, 4, T) == 60
  assert memory.exchange_bytes(half, 4, 5) == 12 * 4 // 5 * 48 + 28
  assert memory.exchange_bytes(half, 4, 1) == 0
  # With tokens gathered, a device sends its 8 tokens to each of the 4 others.
  (gathered,) = halves(tiny.build(dict(dispatch=Gather(AllGather()))), T)
  assert memory.exchange_bytes(gathered, 4, 5) == 4 * T // 5 * 48 * 4
  with pytest.raises(ValueError, match='of 2 does not divide num_experts=5'):
    memory.exchange_bytes(half, 4, 2)


def residual_bytes(model, lengths):
  """Bytes that the forward pass keeps for the backward pass."""
  params = nn.meta.unbox(models.abstract_params(model))
  tokens = [jax.ShapeDtypeStruct((B, n), jnp.int32) for n in lengths]

  def passes(params, *tokens):
    def forward(params):
      return model.apply({'params': params}, *tokens)[0]

    return jax.vjp(forward, params)[1]

  jaxpr = jax.make_jaxpr(passes)(params, *tokens).jaxpr
  input_ids = {id(v) for v in jaxpr.invars}
  kernels = {leaf.shape for leaf in jax.tree.leaves(params)}
  # An unrolled stack of kernels is read in slices of one layer.
  kernels |= {shape[1:] for shape in kernels}
  residuals = {
    id(v): v.aval
    for v in jaxpr.outvars
    if not isinstance(v, Literal) and id(v) not in input_ids
  }
  # Kernels cast to another type are not activations.
  return num_bytes([a for a in residuals.values() if a.shape not in kernels])


WIDE = dict(width=32, num_layers=4, embedding=dict(tie=False))
SPARSE = dict(layers='every 2', num_experts=4)
LENGTHS = 48, 40
DENSE = dict(moe=dict(layers='none'), ffn=dict(hidden=200, activation='relu'))
GATED = dict(moe=SPARSE, ffn=dict(hidden=200, activation='geglu'))
EXTRA = dict(
  moe=dict(**SPARSE, extra_ffn=True),
  ffn=dict(hidden=200, activation='doubly_gated_swiglu'),
)
DROPLESS = dict(
  moe=dict(**SPARSE, dispatch=Dropless(), capacity=All()),
  ffn=dict(hidden=200, activation='swiglu'),
)
BOTH = dict(**GATED, **ENCODER_DECODER)
slow = pytest.mark.slow


@pytest.mark.parametrize(
  ('options', 'dtype', 'remat'),
  [
    (DENSE, 'float32', 'none'),
    (GATED, 'bfloat16', 'dots'),
    (BOTH, 'bfloat16', 'full'),
    (GATED, 'bfloat16', 'save=hidden,attention'),
    pytest.param(EXTRA, 'float32', 'none', marks=slow),
    pytest.param(GATED, 'float32', 'save=rows', marks=slow),
    pytest.param(BOTH, 'float32', 'save=attention,products', marks=slow),
    pytest.param(DROPLESS, 'bfloat16', 'save=rows,hidden', marks=slow),
    pytest.param(DROPLESS, 'bfloat16', 'dots', marks=slow),
    pytest.param(BOTH, 'bfloat16', 'none', marks=slow),
  ],
)
def test_activations_are_what_reverse_mode_keeps(options, dtype, remat):
  model = tiny.build(
    **{**WIDE, **options},
    remat=remat,
    numerics=dict(dtype=dtype),
    attention=dict(implementation='einsum'),
  )
  lengths = LENGTHS[: len(model.stacks.blocks)]
  activations = memory.activations(model, B, *lengths)
  expected = pytest.approx(residual_bytes(model, lengths), rel=0.11)
  assert activations.layers + activations.scores == expected
  assert activations.logits == 4 * B * lengths[-1] * tiny.V
