"""The whole decoder against numpy; its padding, windows and multipliers."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.layers.norms import RmsNorm
from moe_jax.layers.positions import NoPositions
from moe_jax.layers.routers import TokenChoice
from moe_jax.models.stack import LayerKind
from moe_jax.routing.capacity import All
from tests.models import oracle, tiny
from tests.models.tiny import B, T

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


OPTIONS = dict(
  attention=dict(window=3, full_layers='every 2', sinks=True), num_layers=4
)
DENSE = dict(layers='none')


def test_layers_that_alternate_are_one_loop_of_two():
  model = tiny.build(DENSE, **OPTIONS)
  (stack,) = model.stacks.blocks
  assert stack.windows == (3, 0, 3, 0)
  assert stack.kinds[:2] == (LayerKind(None, 3), LayerKind(None, 0))
  params = tiny.params_of(model)
  assert set(params['layers']) == {'layer_0', 'layer_1'}


def test_a_token_sees_what_the_windows_of_its_layers_let_through():
  # With windows alone, token 9 is reached by those of 2 (3 - 1) = 4 tokens
  # before it; with one full layer by all.
  tokens = tiny.tokens()
  for full_layers, reach in (('none', 4), ('0', 9)):
    attention = dict(window=3, full_layers=full_layers)
    model = tiny.build(DENSE, attention=attention)
    params = tiny.params_of(model)
    run = tiny.apply(model)
    last_logits = np.asarray(run(params, tokens)[0])[:, -1]
    changes = []
    for n in range(1, 10):
      changed_tokens = tokens.copy()
      changed_tokens[:, 9 - n] = (tokens[:, 9 - n] + 1) % tiny.V
      logits = np.asarray(run(params, changed_tokens)[0])
      changes.append(np.abs(logits[:, -1] - last_logits).max())
    assert [n for n, change in enumerate(changes, 1) if change > 1e-4] == [
      *range(1, reach + 1)
    ]


def test_a_window_for_longer_texts_is_also_that_of_full_layers():
  model = tiny.build(DENSE, **OPTIONS)
  for window, expected in ((5, (3, 5, 3, 5)), (2, (2,) * 4), (0, (3, 0, 3, 0))):
    prepared, _ = model.for_decoding(
      {'params': tiny.params_of(model)}, window=window
    )
    (stack,) = prepared.stacks.blocks
    assert stack.windows == expected
    cache = jax.eval_shape(lambda: prepared.make_cache(1, 9))  # noqa: B023
    assert [leaf.shape[2] for leaf in cache.key] == [w or 9 for w in expected]


def test_a_small_copy_has_a_layer_of_each_kind():
  options = tiny.options(DENSE, **{**OPTIONS, 'num_layers': 9}).shrunk()
  assert options.windows == (3, 0)


def test_multipliers_are_those_of_kernels():
  # A number before a product is one in its kernel; tied logits also have that
  # of the embeddings, so that embeddings are not tied here.
  multipliers = dict(
    embedding=dict(
      tie=False, multiplier=3.0, logits_divisor=0.5, logits_bias=True
    ),
    residual_multiplier=0.25,
    attention=dict(scale='fixed', fixed_scale=0.2),
  )
  scaled = tiny.build(DENSE, **multipliers)
  plain = tiny.build(
    DENSE,
    embedding=dict(tie=False, logits_bias=True),
    attention=dict(scale='none'),
  )
  params = tiny.params_of(scaled)
  factors = {'w_query': 0.2, 'w_out': 0.25, 'embedding': 3.0}
  factors |= {'w_logits': 2.0, 'b_logits': 2.0}

  def multiplied(path, leaf):
    return factors.get(path[-1].key, 1.0) * leaf

  new_params = jax.tree_util.tree_map_with_path(multiplied, params)
  tokens = jnp.asarray(tiny.tokens())
  logits = tiny.apply(scaled)(params, tokens)[0]
  assert np.std(logits) > 0.1
  np.testing.assert_allclose(
    logits, tiny.apply(plain)(new_params, tokens)[0], rtol=1e-4, atol=1e-4
  )
