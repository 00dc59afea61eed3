"""The whole decoder against numpy, with every option, and on packed rows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.layers.experts import Einsum, FeedForwardExpert
from moe_jax.layers.norms import LayerNorm, RmsNorm
from moe_jax.layers.positions import Learned, NoPositions, Relative
from moe_jax.layers.routers import TokenChoice
from moe_jax.models import RunShape
from moe_jax.routing.capacity import All
from tests.models import oracle, tiny
from tests.models.tiny import B, T, V

MIXTRAL = dict(
  ffn=dict(activation='swiglu'),
  embedding=dict(tie=False),
  attention=dict(num_kv_heads=2),
  norm=RmsNorm(epsilon=1e-2),
  moe=dict(capacity=All()),
)


def test_logits_equal_numpy():
  options = tiny.options(**MIXTRAL)
  model = options.build()
  params = tiny.params_of(model)
  tokens = tiny.tokens()
  logits, _ = tiny.apply(model)(params, tokens)
  expected = [oracle.decode(options, params, row)[0] for row in tokens]
  np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)
  assert np.std(expected) > 0.3


CASES = {
  'glam': dict(
    positions=Relative(),
    norm=LayerNorm(),
    ffn=dict(activation='geglu'),
    attention=dict(num_kv_heads=2),
    moe=dict(
      layers='every 2',
      expert=FeedForwardExpert(activation='gelu_tanh'),
      router=TokenChoice(
        gates='renormalized',
        second_policy='sampled',
        slot_priority='choice_major',
      ),
      allow_future_leak=True,
      dispatch=Einsum(),
    ),
  ),
  'openmoe': dict(
    ffn=dict(activation='swiglu'),
    use_bias=True,
    embedding=dict(tie=False),
    dropout=0.1,
    moe=dict(
      router=TokenChoice(
        gates='renormalized_after_drop', second_policy='threshold', jitter=0.1
      ),
      extra_ffn=True,
    ),
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES)
def test_every_option_gives_logits_and_a_gradient_for_every_parameter(name):
  model = tiny.build(**CASES[name])
  params = tiny.params_of(model)
  tokens = tiny.tokens()
  rngs = {'router': tiny.key(0), 'dropout': tiny.key(1)}

  def loss(params):
    logits, aux = model.apply(
      {'params': params}, jnp.asarray(tokens), train=True, rngs=rngs
    )
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    balance = [
      aux.losses.get(f'{name}_loss', 0) for name in ('importance', 'load')
    ]
    return nats.sum() + sum(map(jnp.sum, balance)), logits

  grads, logits = jax.jit(jax.grad(loss, has_aux=True))(params)
  assert logits.shape == (B, T, V)
  assert np.isfinite(logits).all()
  for path, leaf in tiny.leaves(grads).items():
    size = np.abs(np.asarray(leaf))
    assert np.isfinite(size).all(), path
    if path.startswith('layers/'):
      assert (size.reshape(len(size), -1).max(1) > 1e-5).all(), path
    else:
      assert size.max() > 1e-5, path


def test_logits_aux_and_parameters_are_float32_in_a_bfloat16_model():
  model = tiny.build(dict(capacity=All()), numerics=dict(dtype='bfloat16'))
  params = tiny.params_of(model)
  outputs = jax.eval_shape(tiny.apply(model), params, tiny.tokens())
  dtypes = {leaf.dtype for leaf in jax.tree.leaves((outputs, params))}
  assert dtypes == {jnp.dtype('float32')}


def test_param_dtype_spares_the_router():
  model = tiny.build(numerics=dict(param_dtype='bfloat16'))
  shapes = tiny.leaves(jax.eval_shape(lambda: tiny.params_of(model)))
  dtypes = {name: leaf.dtype.name for name, leaf in shapes.items()}
  routers = {name for name in dtypes if 'router' in name}
  norms = {name for name in dtypes if 'norm' in name}
  assert routers
  for name, dtype in dtypes.items():
    is_float32 = name in routers | norms
    assert dtype == ('float32' if is_float32 else 'bfloat16'), name


PACKED = {
  'dense_relative': dict(positions=Relative(), moe=dict(num_experts=0)),
  'sparse_learned': dict(positions=Learned(), moe=dict(capacity=All())),
}


@pytest.mark.parametrize('name', PACKED)
def test_packed_documents_have_the_logits_they_have_alone(name):
  model = tiny.build(**PACKED[name])
  params, run = tiny.params_of(model), tiny.apply(model)
  tokens = tiny.tokens()
  # Row 0 has documents of 4, 3 and 2 tokens, then padding; rows 1 and 2 are
  # padding.
  segments, positions = np.zeros((2, B, T), np.int32)
  segments[0] = [1] * 4 + [2] * 3 + [3] * 2 + [0]
  positions[0] = [0, 1, 2, 3, 0, 1, 2, 0, 1, 0]
  packed_logits, packed_aux = run(params, tokens, segments, positions)
  assert np.isfinite(packed_logits).all()
  alone_tokens = np.zeros((3, T), np.int32)
  ends = [(0, 4), (4, 7), (7, 9)]
  for row, (start, stop) in enumerate(ends):
    alone_tokens[row, : stop - start] = tokens[0, start:stop]
  alone_segments = (np.arange(T) < np.array([[4], [3], [2]])).astype(np.int32)
  alone_logits, alone_aux = run(
    params,
    alone_tokens,
    alone_segments,
    np.tile(np.arange(T, dtype=np.int32), (3, 1)),
  )
  for row, (start, stop) in enumerate(ends):
    np.testing.assert_allclose(
      packed_logits[0, start:stop],
      alone_logits[row, : stop - start],
      rtol=1e-4,
      atol=1e-4,
    )
  np.testing.assert_allclose(packed_aux.stats.load, alone_aux.stats.load)
  # Documents do change each other where nothing separates them.
  joined_logits, _ = run(params, tokens, np.minimum(segments, 1), positions)
  assert np.abs(np.asarray(joined_logits) - packed_logits)[0, 4:9].max() > 0.01


def test_padding_changes_no_other_token_and_no_statistic():
  moe = dict(num_selected=1, router=TokenChoice(), group_size=20)
  model = tiny.build(moe, positions=NoPositions(), ffn=dict(activation='relu'))
  params, run = tiny.params_of(model), tiny.apply(model)
  tokens = tiny.tokens()
  segments = np.ones((B, T), np.int32)
  segments[0, 7:] = segments[1, :2] = segments[2] = 0
  positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
  real = segments > 0
  changed_tokens = np.where(real, tokens, tiny.tokens(seed=1))
  logits, aux = run(params, tokens, segments, positions)
  changed_logits, changed_aux = run(params, changed_tokens, segments, positions)
  np.testing.assert_array_equal(
    np.asarray(logits)[real], np.asarray(changed_logits)[real]
  )
  tiny.assert_trees_close(aux, changed_aux)
  np.testing.assert_array_equal(aux.stats.tokens, [7 + 8] * 2)
  assert aux.stats.overflowed.sum() > 0


def test_learned_positions_refuse_a_longer_row():
  options = tiny.options(positions=Learned(8))
  model = options.build()
  with pytest.raises(ValueError, match='seq_len=10 > max_len=8'):
    jax.eval_shape(model.init, tiny.key(0), tiny.tokens())
  # A run with such rows is refused earlier.
  run_shape = RunShape(
    total_steps=1, rows=3, microbatches=1, seq_len=10, target_len=0, parts=1
  )
  [problem] = options.problems_in(run_shape)
  assert 'data.seq_len=10 is more than the 8 positions' in problem
