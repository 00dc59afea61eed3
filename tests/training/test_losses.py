"""Normalisers and weights of losses, by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.models.base import TokenLosses
from moe_jax.routing import empty_aux
from moe_jax.training import losses
from tests.training import tiny

ENCODER_DECODER = tiny.options(
  data={'source': {'kind': 'python_stdlib_docstrings'},
        'task': {'kind': 'seq2seq'}, 'target_len': 3},
  model={'kind': 'encoder_decoder'},
)  # fmt: skip


def batch():
  """Decoder rows of 3 and 1 real tokens, encoder rows of 4 and 3."""
  return {
    'segment_ids': jnp.array([[1, 1, 1], [1, 0, 0]]),
    'encoder_segment_ids': jnp.array([[1, 1, 1, 1], [1, 1, 1, 0]]),
    'targets': jnp.array([[0, 1, 2], [2, 0, 0]]),
    'loss_weights': jnp.array([[1.0, 0, 1], [1, 0, 0]]),
  }


def aux(z_losses):
  empty = jax.tree.map(
    lambda leaf: jnp.stack([leaf] * len(z_losses)), empty_aux(4, 1)
  )
  return empty._replace(losses={'z_loss': jnp.array(z_losses)})


def test_each_stack_is_divided_by_its_own_tokens():
  model = tiny.model_of(ENCODER_DECODER)
  totals = losses.normalizers(model, batch())
  assert totals.weight == 3
  # The encoder's layers come first.
  assert totals.tokens.tolist() == [7, 7, 4, 4]
  # Z-losses are 14 and 0 over 7 tokens, and 8 and 0 over 4: means are 2 and 2.
  weights = losses.LossWeights({'z_loss': 0.5})
  total = losses.aux_loss(aux([14.0, 0.0, 8.0, 0.0]), totals, weights)
  np.testing.assert_allclose(total, 0.5 * (2 + 0 + 2 + 0), rtol=1e-6)
  # A mean over layers has that over their number.
  moe = {'layers': 'all', 'layer_reduce': 'mean'}
  model = tiny.model_of(tiny.options(model={'moe': moe, 'num_layers': 3}))
  averaged = losses.loss_weights(model)
  assert averaged.num_averaged == 3
  weights = losses.LossWeights({'z_loss': 0.5}, num_averaged=4)
  mean = losses.aux_loss(aux([14.0, 0.0, 8.0, 0.0]), totals, weights)
  np.testing.assert_allclose(mean, total / 4, rtol=1e-6)


def test_the_logits_z_loss_is_weighted_like_the_cross_entropy():
  first = [[1.0, 1, 2], [9, 9, 9], [3, 1, 0.5]]
  second = [[1.0, 2, 4], [1, 1, 1], [1, 1, 1]]
  logits = jnp.log(jnp.array([first, second]))
  rows, model = batch(), tiny.model_of(tiny.options())
  sums = losses.loss_sums(model.loss(logits, rows), rows, aux([0.0, 0.0]))
  z = np.log([4, 4.5, 7.0])
  nats = -np.log([1 / 4, 0.5 / 4.5, 4 / 7])
  np.testing.assert_allclose(sums.logits_z, (z**2).sum(), rtol=1e-5)
  totals = losses.normalizers(model, rows)
  weights = losses.LossWeights(logits_z=0.1)
  expected = nats.mean() + 0.1 * (z**2).mean()
  total = losses.total_loss(sums, totals, weights)
  np.testing.assert_allclose(total, expected, rtol=1e-5)
  # As a microbatch the rows are divided by the weights of the whole batch.
  of_more = losses.total_loss(sums, totals._replace(weight=12.0), weights)
  np.testing.assert_allclose(of_more, expected / 4, rtol=1e-5)
  plain = losses.total_loss(sums, totals, losses.LossWeights())
  np.testing.assert_allclose(plain, nats.mean(), rtol=1e-5)


def test_the_weights_are_those_of_the_chosen_router():
  own = {'load_weight': 0.2, 'importance_weight': 0.3}
  router = {'kind': 'noisy_top_k', 'noisy_top_k': own}
  options = tiny.options(model={'moe': {'router': router}})
  weights = losses.loss_weights(tiny.model_of(options), 0.4)
  assert weights.routers['load_loss'] == 0.2
  assert weights.routers['importance_loss'] == 0.3
  assert (weights.logits_z, weights.num_averaged) == (0.4, 1)


def test_what_has_no_weight_may_be_nan():
  weights = jnp.array([[1.0, 0.0, 2.0]])
  batch = {'loss_weights': weights}
  aux = empty_aux(1, 1)
  nats = jnp.array([[3.0, jnp.nan, 5.0]])

  def total(nats):
    sums = losses.loss_sums(TokenLosses(nats, nats), batch, aux)
    return sums.cross_entropy + sums.logits_z

  assert total(nats) == 2 * (3.0 + 2 * 5.0)
  assert jax.grad(total)(nats).tolist() == [[2.0, 0.0, 4.0]]
