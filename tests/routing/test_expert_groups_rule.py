"""Choices in the best groups of experts, against a loop over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.routing.limited_rules import (
  GROUP_SCORES,
  OUTSIDE,
  limited_scores,
)
from tests import reference


def test_a_group_is_as_good_as_its_best_or_as_its_two_best():
  # Three groups of two experts. The second has the best expert of all, the
  # third the best pair; experts of the other groups can no longer be chosen.
  scores = jnp.array([0.1, 0.2, 0.9, 0.0, 0.6, 0.5])
  rule = dict(num_groups=3, chosen_groups=1)
  best = limited_scores(scores, **rule)
  inf = np.inf
  np.testing.assert_allclose(best, [-inf, -inf, 0.9, 0.0, -inf, -inf])
  pair = limited_scores(scores, **rule, group_score='two_best')
  np.testing.assert_allclose(pair, [-inf, -inf, -inf, -inf, 0.6, 0.5])
  zeros = limited_scores(scores, **rule, outside='zero')
  np.testing.assert_allclose(zeros, [0, 0, 0.9, 0.0, 0, 0])


@pytest.mark.parametrize('outside', OUTSIDE)
@pytest.mark.parametrize('group_score', GROUP_SCORES)
@pytest.mark.parametrize('chosen_groups', [1, 2, 4])
def test_it_equals_a_loop_over_tokens(group_score, outside, chosen_groups):
  G, S, E = 2, 7, 12
  rng = np.random.default_rng(chosen_groups)
  # Rounded, so that groups tie; a bias makes some scores negative.
  scores = rng.normal(0.2, 0.5, (G, S, E)).round(1).astype(np.float32)
  rule = dict(num_groups=4, chosen_groups=chosen_groups)
  out = limited_scores(
    jnp.asarray(scores), **rule, group_score=group_score, outside=outside
  )
  best = {'best': 1, 'two_best': 2}[group_score]
  value = 0.0 if outside == 'zero' else -np.inf
  for g, s in np.ndindex(G, S):
    want = reference.limited_scores(scores[g, s], 4, chosen_groups, best, value)
    np.testing.assert_array_equal(out[g, s], want)
  if chosen_groups == 4:
    np.testing.assert_array_equal(out, scores)


def test_it_has_no_gradient():
  def total(x):
    return limited_scores(
      x, num_groups=2, chosen_groups=1, outside='zero'
    ).sum()

  np.testing.assert_array_equal(jax.grad(total)(jnp.arange(4.0)), np.zeros(4))


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(num_groups=4), 'num_experts=6 does not divide by 4 groups'),
    (
      dict(num_groups=6, group_score='two_best'),
      "each has 1, and 'two_best' needs 2",
    ),
    (dict(num_groups=3, chosen_groups=4), r'not in \[1, num_groups=3\]'),
    (dict(num_groups=3, group_score='mean'), "unknown group_score 'mean'"),
    (dict(num_groups=3, outside='nan'), "unknown outside 'nan'"),
  ],
)
def test_what_does_not_fit_is_refused(options, message):
  with pytest.raises(ValueError, match=message):
    limited_scores(jnp.zeros(6), **{'chosen_groups': 1, **options})
