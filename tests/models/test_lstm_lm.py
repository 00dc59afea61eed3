"""The model of 2017: its layers, separate documents, refused options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers import FeedForward, MoE
from moe_jax.layers.ffn import FfnOptions
from moe_jax.layers.lstm import Lstm
from moe_jax.layers.positions import NoPositions
from moe_jax.layers.routers import Hierarchical
from moe_jax.layers.shared import Shared
from moe_jax.routing.capacity import All
from tests.models import tiny
from tests.models.tiny import draw

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


def test_dense_twins_are_wide_or_deep():
  def shapes(model):
    layer = tiny.leaves(tiny.params_of(model)['layers_1'])
    return {name: leaf.shape for name, leaf in layer.items()}

  hidden = 20
  wide = {'ffn/w_in': (12, 4 * hidden), 'ffn/w_out': (4 * hidden, 12)}
  assert shapes(build(TWIN)) == wide
  deep = build(TWIN, ffn=dict(activation='relu'), lstm=dict(twin_depth=4))
  inner = {f'ffn/w_hidden_{i}': (hidden, hidden) for i in (1, 2, 3)}
  ends = {'ffn/w_in': (12, hidden), 'ffn/w_out': (hidden, 12)}
  assert shapes(deep) == inner | ends
  assert deep.stacks.moe is None and not deep.stacks.blocks


def test_a_deep_feed_forward_is_its_products():
  c, biased = FfnOptions(11, 'relu'), Shared(use_bias=True)
  x = draw(2, 3, 6, seed=9)
  deep = FeedForward(c, biased, depth=3)
  p = tiny.layer_params(deep, jnp.asarray(x))
  h = x
  for name in ('in', 'hidden_1', 'hidden_2'):
    h = np.maximum(h @ p[f'w_{name}'] + p[f'b_{name}'], 0)
  expected = h @ p['w_out'] + p['b_out']
  x = jnp.asarray(x)
  y = jax.jit(deep.apply)({'params': p}, x)
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
  with pytest.raises(ValueError, match='without gate'):
    FeedForward(FfnOptions(3, 'swiglu'), depth=2).init(tiny.key(0), x)
