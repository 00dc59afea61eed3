"""The losses' normalisers and weights, by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.routing import empty_aux
from moe_jax.training import losses


def batch():
  """Two decoder rows of three tokens, two of padding; encoder rows of four."""
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
  return empty._replace(z_loss=jnp.array(z_losses))


def test_each_stack_is_divided_by_its_own_tokens():
  whole = losses.normalizers(batch())
  assert (whole.weight, whole.tokens, whole.encoder_tokens) == (3, 4, 7)
  # Two encoder layers with z-losses of 14 and 0 over all tokens, a decoder's
  # with 8: means 2, 0 and 2.
  weights = losses.LossWeights(z=0.5, encoder_layers=2)
  total = losses.aux_loss(aux([14.0, 0.0, 8.0]), whole, weights)
  np.testing.assert_allclose(total, 0.5 * (2 + 0 + 2), rtol=1e-6)


def test_the_logits_z_loss_is_weighted_like_the_cross_entropy():
  first = [[1.0, 1, 2], [9, 9, 9], [3, 1, 0.5]]
  second = [[1.0, 2, 4], [1, 1, 1], [1, 1, 1]]
  logits = jnp.log(jnp.array([first, second]))
  one = batch()
  sums = losses.loss_sums(logits, one, aux([0.0]))
  z = np.log([4, 4.5, 7.0])
  nats = -np.log([1 / 4, 0.5 / 4.5, 4 / 7])
  np.testing.assert_allclose(sums.logits_z, (z**2).sum(), rtol=1e-5)
  whole = losses.normalizers(one)
  weights = losses.LossWeights(logits_z=0.1)
  expected = nats.mean() + 0.1 * (z**2).mean()
  total = losses.total_loss(sums, whole, weights)
  np.testing.assert_allclose(total, expected, rtol=1e-5)
  plain = losses.total_loss(sums, whole, losses.LossWeights())
  np.testing.assert_allclose(plain, nats.mean(), rtol=1e-5)
