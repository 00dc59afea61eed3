"""Balance losses of rows, of several rows, and of the whole batch.

They are told by hand and judged by `tests/reference.py`; that they are the same
on a mesh is in `tests/parallel/test_mesh_equality.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import All, Shared, TokenChoice
from moe_jax.layers.routers import Sizes
from tests import reference
from tests.models.tiny import draw

B, T, E, K, M = 8, 6, 5, 2, 4
NAMES = ('sequence_balance', 'batch_balance', 'global_balance')
ALL_SCOPES = TokenChoice(
  sequence_balance_weight=1.0,
  batch_balance_weight=1.0,
  batch_balance_rows=3,
  global_balance_weight=1.0,
)


def routed(options, x, mask, w, row_length=T, num_selected=K, **variables):
  sizes = Sizes(w.shape[1], num_selected, All(), row_length)
  module = options.module(sizes, Shared(), 'router')
  variables['params'] = {'w': jnp.asarray(w)}
  run = jax.jit(lambda x, mask: module.apply(variables, x, mask))
  return run(jnp.asarray(x), jnp.asarray(mask))


def test_even_in_the_batch_is_not_even_in_each_row():
  # Both tokens of the first row choose expert 0, with a probability of 0.8,
  # and those of the second row expert 1. In each row the loss is
  # 2 * (1 * 0.8 + 0 * 0.2) = 1.6; in both rows together loads and mean
  # probabilities are 1/2, and the loss is 1.
  x = np.log([[[0.8, 0.2]] * 2, [[0.2, 0.8]] * 2]).astype(np.float32)
  options = dataclasses.replace(ALL_SCOPES, batch_balance_rows=1)
  _, aux = routed(options, x, np.ones((2, 2), bool), np.eye(2), 2, 1)
  for name, loss in zip(NAMES, (1.6, 1.6, 1.0), strict=True):
    total = getattr(aux, f'{name}_loss')
    np.testing.assert_allclose(total / 4, loss, rtol=1e-6)


@pytest.mark.parametrize(
  ('group_size', 'scores', 'choices'),
  [(T // 2, 'sigmoid', 'all'), (3 * T, 'softmax', 'first')],
)
def test_losses_are_those_of_rows_whatever_the_groups(
  group_size, scores, choices
):
  options = dataclasses.replace(
    ALL_SCOPES, balance_scores=scores, balance_choices=choices
  )
  x, w = draw(B, T, M), draw(M, E, seed=1)
  mask = np.random.default_rng(2).random((B, T)) < 0.8
  mask[2] = False
  padding = -(B * T) % group_size
  groups = np.pad(x.reshape(-1, M), ((0, padding), (0, 0)))
  in_groups = np.pad(mask.ravel(), (0, padding)).reshape(-1, group_size)
  _, aux = routed(options, groups.reshape(-1, group_size, M), in_groups, w)
  logits = x.astype(np.float64) @ w
  probs = reference.softmax(logits)
  if scores == 'sigmoid':
    probs = 1 / (1 + np.exp(-logits))
    probs = probs / probs.sum(-1, keepdims=True)
  index = np.argsort(-logits, -1)[..., :K]
  for name, rows in zip(NAMES, (1, 3, B), strict=True):
    total = 0.0
    for b in range(0, B, rows):
      block = [a[b : b + rows] for a in (probs, index, mask)]
      block = [a.reshape(1, -1, *a.shape[2:]) for a in block]
      (loss,) = reference.balance_loss(*block, choices=choices)
      total += loss * block[2].sum()
    value = getattr(aux, f'{name}_loss')
    np.testing.assert_allclose(value, total, rtol=1e-5, err_msg=name)


def test_with_a_bias_they_count_choices_without_it():
  # The bias sends every token to experts 3 and 4, which makes their loads
  # uneven; Eq. 18 of DeepSeek-V3 counts the best scores without the bias.
  biased = dataclasses.replace(
    ALL_SCOPES, gates='sigmoid', balance_bias_rate=0.1
  )
  args = draw(B, T, M), np.ones((B, T), bool), draw(M, E, seed=1)
  bias = {'balance_bias': jnp.array([0.0, 0, 0, 5, 5])}
  chosen, aux = routed(biased, *args, router_state=bias)
  assert set(np.unique(chosen.expert_index)) == {3, 4}
  plain = dataclasses.replace(biased, balance_bias_rate=0.0)
  _, unbiased = routed(plain, *args)
  for name in NAMES:
    loss, expected = (getattr(a, f'{name}_loss') for a in (aux, unbiased))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
  assert abs(aux.balance_loss - unbiased.balance_loss) > 1.0
