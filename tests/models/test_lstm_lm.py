"""The model of 2017: its layers, separate documents, refused options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax.analysis.recording import records_of
from moe_jax.layers import FeedForward, MoE
from moe_jax.layers.ffn import FfnOptions
from moe_jax.layers.lstm import Lstm
from moe_jax.layers.positions import NoPositions, Relative
from moe_jax.layers.routers import Hash, Hierarchical, Random, TokenChoice
from moe_jax.layers.shared import Shared
from moe_jax.models.recorded import recording
from moe_jax.routing.capacity import All, PerToken
from tests.layers.test_moe import draw
from tests.models import tiny

B, T, V = tiny.B, tiny.T, tiny.V
SPARSE = dict(
  layers='1',
  num_experts=6,
  num_selected=4,
  router=Hierarchical(
    branching=3, branches_selected=2, noisy=True, gates='renormalized'
  ),
  capacity=All(),
)
TWIN = dict(layers='1', num_experts=0, num_selected=4)
IDS = np.array([[1] * T, [1] * 4 + [2] * 6, [1] * 7 + [0] * 3], np.int32)


def build(moe=SPARSE, **model):
  options = dict(kind='lstm', num_layers=3, positions=NoPositions())
  return tiny.build(moe, **options | model)


MODEL = build()


def run(model, params, tokens, ids=IDS):
  return tiny.apply(model)(params, tokens, ids, np.zeros_like(tokens))


@pytest.mark.slow
def test_it_is_its_layers_in_a_row():
  params, tokens = tiny.params_of(MODEL), tiny.tokens()
  logits, aux = run(MODEL, params, tokens)

  @jax.jit
  def expected(params, tokens):
    x = params['embedding'][tokens]
    for i, name in enumerate(['lstm', 'moe', 'lstm']):
      variables = {'params': params[f'layers_{i}'][name]}
      if name == 'lstm':
        y = Lstm(MODEL.options.lstm).apply(variables, x, jnp.asarray(IDS))[0]
      else:
        layer = MoE(MODEL.stacks.moe)
        y, moe_aux = layer.apply(variables, x, jnp.asarray(IDS) > 0)
        y = jax.nn.sigmoid(y)
      x = x + y
    return x @ params['embedding'].T, moe_aux

  expected_logits, moe_aux = expected(params, tokens)
  np.testing.assert_allclose(logits, expected_logits, rtol=1e-4, atol=1e-4)
  for a, b in zip(jax.tree.leaves(aux), jax.tree.leaves(moe_aux)):
    np.testing.assert_allclose(a[1], b, rtol=1e-4)
    assert a.shape[0] == 3 and not np.any(a[::2])
  assert aux.stats.load.shape == (3, 6) and aux.load_loss[1] > 0


def test_later_tokens_and_other_documents_change_nothing():
  params, tokens = tiny.params_of(MODEL), tiny.tokens()
  logits, _ = run(MODEL, params, tokens)
  edited = tokens.copy()
  edited[0, 6:] = (edited[0, 6:] + 1) % V  # tokens after position 5
  edited[1, :4] = (edited[1, :4] + 1) % V  # the first document of two
  edited[2, 7:] = (edited[2, 7:] + 1) % V  # padding
  changed_logits, _ = run(MODEL, params, edited)
  np.testing.assert_allclose(changed_logits[0, :6], logits[0, :6], atol=1e-6)
  np.testing.assert_allclose(changed_logits[1, 4:], logits[1, 4:], atol=1e-6)
  np.testing.assert_allclose(changed_logits[2, :7], logits[2, :7], atol=1e-6)
  assert np.abs(changed_logits[0, 6:] - logits[0, 6:]).max() > 0.1


@pytest.mark.slow
def test_dropout_is_of_each_layer_and_of_training_alone():
  model = build(dropout=0.5)
  params, tokens = tiny.params_of(model), tiny.tokens()
  rngs = {'dropout': tiny.key(0), 'router': tiny.key(1)}
  train_logits, _ = jax.jit(
    lambda p, t: model.apply({'params': p}, t, train=True, rngs=rngs)
  )(params, tokens)
  eval_logits = run(model, params, tokens, np.ones_like(tokens))[0]
  np.testing.assert_allclose(
    eval_logits, run(MODEL, params, tokens, np.ones_like(tokens))[0], atol=1e-6
  )
  assert np.abs(train_logits - eval_logits).max() > 0.1


def test_dense_twins_are_wide_or_deep():
  wide, deep = (
    build(TWIN),
    build(TWIN, ffn=dict(activation='relu'), lstm=dict(twin_depth=4)),
  )
  shapes = [
    {
      name: leaf.shape
      for name, leaf in tiny.leaves(tiny.params_of(model)['layers_1']).items()
    }
    for model in (wide, deep)
  ]
  hidden = 20
  assert shapes[0] == {
    'ffn/w_in': (12, 4 * hidden), 'ffn/w_out': (4 * hidden, 12)
  }  # fmt: skip
  inner = {f'ffn/w_hidden_{i}': (hidden, hidden) for i in (1, 2, 3)}
  assert shapes[1] == inner | {
    'ffn/w_in': (12, hidden), 'ffn/w_out': (hidden, 12)
  }  # fmt: skip
  assert deep.stacks.moe is None and not deep.stacks.blocks


def test_a_deep_feed_forward_is_its_products():
  c, biased = FfnOptions(11, 'relu'), Shared(use_bias=True)
  x = draw(2, 3, 6, seed=9)
  deep = FeedForward(c, biased, depth=3)
  shapes = jax.eval_shape(deep.init, jax.random.key(0), jnp.asarray(x))
  leaves, tree = jax.tree.flatten(shapes)
  arrays = [draw(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)]
  params = tree.unflatten(arrays)
  p = nn.meta.unbox(params)['params']
  h = x
  for w, b in (
    ('w_in', 'b_in'), ('w_hidden_1', 'b_hidden_1'),
    ('w_hidden_2', 'b_hidden_2'),
  ):  # fmt: skip
    h = np.maximum(h @ p[w] + p[b], 0)
  expected = h @ p['w_out'] + p['b_out']
  x = jnp.asarray(x)
  y = jax.jit(deep.apply)(params, x)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
  with pytest.raises(ValueError, match='without gate'):
    FeedForward(FfnOptions(3, 'swiglu'), depth=2).init(tiny.key(0), x)


def test_which_tokens_go_where_is_counted():
  params, tokens = tiny.params_of(MODEL), tiny.tokens()
  batch = {
    'tokens': jnp.asarray(tokens),
    'segment_ids': jnp.asarray(IDS),
    'positions': jnp.zeros_like(IDS),
  }
  _, choices = recording(MODEL, {'params': params}, **MODEL.inputs(batch))
  (record,) = records_of(MODEL, 'eval', 0, 0, batch, jax.device_get(choices))
  expert = record.layers[1].expert
  _, aux = run(MODEL, params, tokens)
  load = np.bincount(expert[expert >= 0], minlength=len(aux.stats.load[1]))
  np.testing.assert_array_equal(load, aux.stats.load[1])
  np.testing.assert_array_equal((expert >= 0).sum(-1), 4 * (IDS > 0))


def test_routers_without_parameters_differ_by_layer():
  moe = dict(layers='0,1', router=Random(), capacity=All())
  model, tokens = build(moe, num_layers=2), tiny.tokens()
  variables = {'params': tiny.params_of(model)}
  apply = jax.jit(lambda tokens: model.apply(variables, tokens)[1].stats.load)
  first, second = np.asarray(apply(tokens))
  assert (first != second).any()


def test_what_it_does_not_do_is_refused():
  for router in (Hash(), TokenChoice(gates='sigmoid', balance_bias_rate=0.1)):
    with pytest.raises(ValueError, match='knows neither routers that hash'):
      build(SPARSE | dict(router=router))
  with pytest.raises(ValueError, match='twin_depth=0 must be at least 1'):
    build(lstm=dict(twin_depth=0))
  leaking = TokenChoice(slot_priority='choice_major')
  with pytest.raises(ValueError, match='allow_future_leak=True'):
    build(SPARSE | dict(router=leaking, capacity=PerToken()))
  with pytest.raises(ValueError, match="'relative' has no effect in a model"):
    build(positions=Relative())
  with pytest.raises(ValueError, match=r'moe.extra_ffn=True has no effect'):
    build(SPARSE | dict(extra_ffn=True))
  assert build(SPARSE | {'layers': 'none'}).stacks.moes == (None,) * 3
