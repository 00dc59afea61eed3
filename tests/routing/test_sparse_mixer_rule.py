"""SparseMixer: choices in turn, and draws.

Its gradient is compared with that of transformers in `tests/layers/routers`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing.sparse_mixer_rule import sparse_mixer
from tests import reference
from tests.models import tiny

RULE = dict(num_selected=2, threshold=0.3)
mix = jax.jit(sparse_mixer, static_argnames=('num_selected', 'threshold'))


def logits_of(*values):
  return jnp.asarray(np.array([[values]], np.float32))


def test_each_choice_is_a_softmax_of_the_logits_near_the_largest():
  # The largest logit is 4. Of the others 3 is within 0.3 of it, as (4 - 3) / 4
  # is 0.25, and 2 is not. Once expert 2 is gone, 3 is the largest, and (3 - 2)
  # / 3 is more than 0.3, so that its gate is 1.
  index, gate = mix(logits_of(2, 3, 4, -1), **RULE)
  assert index.tolist() == [[[2, 1]]]
  first = np.exp(4) / (np.exp(4) + np.exp(3))
  np.testing.assert_allclose(gate, [[[first, 1.0]]], rtol=1e-6)


@pytest.mark.parametrize(
  ('threshold', 'shift'), [(0.0, 0), (0.3, -3), (0.3, 3), (1.5, 0)]
)
def test_it_equals_a_loop_over_tokens(shift, threshold):
  G, S, E, K = 2, 7, 5, 3
  rng = np.random.default_rng(0)
  # Rounded, so that logits tie and some are zero.
  logits = rng.normal(shift, 1, (G, S, E)).round(0).astype(np.float32)
  rule = dict(num_selected=K, threshold=threshold)
  index, gate = map(np.asarray, mix(logits, **rule))
  for g, s in np.ndindex(G, S):
    row = logits[g, s].astype(np.float64)
    experts, gates = reference.sparse_mixer(row, K, threshold)
    assert index[g, s].tolist() == experts
    np.testing.assert_allclose(gate[g, s], gates, rtol=1e-5)


@pytest.mark.parametrize('trained', [False, True])
def test_choices_that_are_drawn_equal_a_loop_over_tokens(trained):
  G, S, E, K = 2, 7, 5, 3
  rng = np.random.default_rng(0)
  logits = rng.normal(0, 1, (G, S, E)).astype(np.float32)
  # Without draws of its own the rule takes experts that are imposed, of which
  # some are too far from the largest logit.
  imposed = rng.permuted(np.tile(np.arange(E), (G, S, 1)), axis=-1)[..., :K]
  imposed = imposed.astype(np.int32)
  draw = {'key': tiny.key(0)} if trained else {'imposed': imposed}
  rule = dict(num_selected=K, threshold=1.0)
  index, gate = map(np.asarray, mix(logits, **rule, **draw))
  want = np.zeros((G, S, K))
  for g, s in np.ndindex(G, S):
    row, draws = logits[g, s].astype(np.float64), index[g, s].tolist()
    experts, want[g, s] = reference.sparse_mixer(row, K, 1.0, draws)
    assert experts == draws
  if not trained:
    assert (index == imposed).all() and (want == 0).any() and (want > 0).any()
    np.testing.assert_allclose(gate, want, rtol=1e-5)
    return
  # A drawn expert takes part; a third of some gates of lesser ones is taken.
  assert want.min() > 0 and (index[..., 0] != logits.argmax(-1)).any()
  ratio = gate / want
  np.testing.assert_allclose(ratio, np.where(ratio > 0.5, 1, 1 / 3), rtol=1e-4)
  assert (ratio < 0.5).any() and (ratio > 0.5).any()


def test_training_draws_from_the_softmax_and_keeps_a_third_of_some_gates():
  # The last of four experts is too far for the first choice.
  logits = jnp.asarray(np.tile(np.float32([4, 3.5, 3, 1]), (1, 8000, 1)))
  index, gate = map(np.asarray, mix(logits, **RULE, key=tiny.key(0)))
  probs = reference.softmax(np.array([4.0, 3.5, 3.0]))
  first, share = index[0, :, 0], gate[0, :, 0]
  frequency = np.bincount(first, minlength=4) / 8000
  # The standard deviation of a frequency is at most sqrt(0.25 / 8000) = 0.006.
  np.testing.assert_allclose(frequency, [*probs, 0], atol=0.024)
  np.testing.assert_allclose(share[first == 0], probs[0], rtol=1e-5)
  for e in (1, 2):
    ratio = share[first == e] / probs[e]
    is_whole = np.isclose(ratio, 1, atol=1e-4)
    np.testing.assert_allclose(ratio[~is_whole], 1 / 3, rtol=1e-4)
    assert abs(is_whole.mean() - 0.25) < 0.05
  # No token has the same expert twice.
  assert (index[0, :, 0] != index[0, :, 1]).all()


def test_a_choice_that_takes_no_part_has_no_gate():
  imposed = jnp.array([[[3, -1]]], jnp.int32)
  index, gate = mix(logits_of(2, 3, 4, -1), **RULE, imposed=imposed)
  assert index.tolist() == [[[3, 2]]]
  assert gate[0, 0, 0] == 0 and gate[0, 0, 1] > 0
