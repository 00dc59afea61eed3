"""The whole decoder against numpy, and its windows."""

import jax
import numpy as np

from moe_jax.layers.norms import RmsNorm
from moe_jax.models.stack import LayerKind
from moe_jax.routing.capacity import All
from tests.models import oracle, tiny

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
