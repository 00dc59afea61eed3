"""Groups, capacity and padding of the sparse layer, by small numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.layers.moe import to_groups
from moe_jax.layers.routers import TokenChoice
from moe_jax.routing.capacity import Fixed, PerAssignment, PerToken
from tests import reference
from tests.layers.test_moe import (
  B,
  E,
  K,
  M,
  T,
  compiled,
  draw,
  draw_params,
  make,
  run,
)
from tests.models.tiny import assert_trees_close


def test_to_groups_cuts_consecutive_tokens_and_pads_the_last():
  x = jnp.asarray(np.arange(24, dtype=np.float32).reshape(B, T, 1))
  mask = np.ones((B, T), bool)
  mask[0, 1] = False
  mask = jnp.asarray(mask)
  groups, group_mask = to_groups(x, mask, 16)
  np.testing.assert_array_equal(
    groups[..., 0], [list(range(16)), [*range(16, 24), *[0] * 8]]
  )
  expected = np.ones((2, 16), bool)
  expected[0, 1] = expected[1, 8:] = False
  np.testing.assert_array_equal(group_mask, expected)
  assert to_groups(x, mask, 0)[0].shape == (B, T, 1)
  assert to_groups(x, mask, 4)[0].shape == (6, 4, 1)


@pytest.mark.parametrize('group_size', [3, 5, 12])
def test_a_group_that_cuts_a_sequence_is_refused(group_size):
  with pytest.raises(
    ValueError, match=rf'group_size={group_size} is neither .* seq_len={T}'
  ):
    to_groups(jnp.ones((B, T, M)), jnp.ones((B, T), bool), group_size)


# All tokens are alike, so that each group fills its expert: G * C choices are
# kept.
@pytest.mark.parametrize(
  ('rule', 'group_size', 'kept'),
  [
    # With S = 16 capacity is ceil(1.25 * S / 5) = 4, in each of 2 groups, of
    # which the second is half padding.
    (PerToken(1.25), 16, 2 * 4),
    # With S = 8 it is ceil(1.25 * 2 * 8 / 5) = 4, in each of 3 groups.
    (PerAssignment(1.25), 0, 3 * 4),
  ],
)
def test_capacity_is_the_rule_at_the_size_of_the_group(rule, group_size, kept):
  layer = make(group_size=group_size, capacity=rule)
  params = draw_params(layer)
  row = draw(1, 1, M)
  _, aux = run(layer, params, np.tile(row, (B, T, 1)))
  load = np.zeros(E)
  logits = np.asarray(row[0, 0] @ params['router']['w'])
  load[np.argsort(-logits)[:K]] = kept
  np.testing.assert_array_equal(aux.stats.kept_load, load)
  np.testing.assert_array_equal(aux.stats.tokens, B * T)


TIGHT = Fixed(slots=3)


def test_an_incomplete_group_is_as_good_as_alone():
  # The 24 tokens are in groups of 16: rows 0 and 1 are a group, and row 2 is
  # half of one.
  router = TokenChoice(sequence_balance_weight=0.1)
  layer = make(router, group_size=16, capacity=TIGHT)
  params, x = draw_params(layer), draw(B, T, M, seed=9)
  y, aux = run(layer, params, x)
  pair, pair_aux = run(layer, params, x[:2])
  small_groups = make(router, group_size=8, capacity=TIGHT)
  last, last_aux = run(small_groups, params, x[2:])
  np.testing.assert_allclose(y[:2], pair, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(y[2:], last, rtol=1e-5, atol=1e-5)
  total = jax.tree.map(lambda a, b: a + b, pair_aux, last_aux)
  assert_trees_close(aux, total)
  assert aux.stats.overflowed.sum() > 0
  # A loss of rows is that of each row, though two of them are a group.
  logits = x.astype(np.float64) @ params['router']['w']
  index = np.argsort(-logits, -1)[..., :K]
  losses = reference.balance_loss(
    reference.softmax(logits), index, np.ones((B, T), bool)
  )
  np.testing.assert_allclose(
    aux.sequence_balance_loss, T * losses.sum(), rtol=1e-5
  )


def test_groups_are_routed_by_themselves():
  layer = make(group_size=4, capacity=Fixed(slots=1))
  params, x = draw_params(layer), draw(B, T, M, seed=9)
  y, _ = run(layer, params, x)
  other = x.copy()
  other[0, :4] = draw(4, M, seed=5)
  changed, _ = run(layer, params, other)
  differs = np.asarray(y) != np.asarray(changed)
  assert differs[0, :4].any()
  assert not differs[0, 4:].any()
  assert not differs[1:].any()


# Each router meets padding in `routers.test_contract`.
def test_padding_touches_no_token_no_loss_and_no_statistic():
  layer = make(group_size=16, capacity=TIGHT)
  params, x = draw_params(layer), draw(B, T, M, seed=9)
  mask = np.ones((B, T), bool)
  mask[0, :3] = mask[1, 6:] = mask[2] = False
  other = np.where(mask[..., None], x, 50 * draw(B, T, M, seed=1))
  y, aux = run(layer, params, x, mask)
  changed, changed_aux = run(layer, params, other, mask)
  np.testing.assert_array_equal(y, changed)
  assert_trees_close(aux, changed_aux)
  assert not np.asarray(y)[~mask].any()
  assert aux.stats.tokens == 5 + 6
  assert aux.stats.load.sum() == K * (5 + 6)
  assert aux.stats.overflowed.sum() > 0
  # Without the mask those tokens would have taken slots.
  unmasked, _ = run(layer, params, other, np.ones_like(mask))
  assert np.abs(np.asarray(unmasked) - y)[mask].max() > 0.1


def test_padding_carries_no_gradient():
  layer = make(capacity=TIGHT)
  params, x = draw_params(layer), draw(B, T, M, seed=9)
  mask = np.ones((B, T), bool)
  mask[1, 5:] = False

  @jax.jit
  @jax.grad
  def gradient(x):
    y, aux = compiled(layer)(params, x, mask)
    return (y**2).sum() + aux.z_loss + aux.balance_loss

  dx = np.asarray(gradient(x))
  assert not dx[~mask].any()
  assert (np.abs(dx).max(-1) > 0)[mask].all()
