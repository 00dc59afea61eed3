"""Two levels of gates: choices and loads by hand and by definition."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import routing
from moe_jax.routing import load_probability, shazeer_rules
from moe_jax.routing.aux_losses import cv_squared
from moe_jax.routing.token_choice_rule import choose
from tests import reference
from tests.models import tiny

G, S, A, B, K1, K2 = 2, 7, 4, 5, 2, 3
noisy_logits = jax.jit(routing.noisy_logits)


def test_choices_are_told():
  # The token goes to branch 2 with 0.7 and to branch 0 with 0.3. In branch 2 it
  # chooses expert 1 alone, in branch 0 expert 2. With three experts each these
  # are experts 7 and 2.
  index, gate = jax.jit(shazeer_rules.flat_choices, static_argnums=4)(
    np.int32([[[2, 0]]]),
    np.float32([[[0.7, 0.3]]]),
    np.int32([[[[1, 0], [2, 1]]]]),
    np.float32([[[[1.0, 0.0], [0.5, 0.5]]]]),
    3,
  )
  index, gate = np.asarray(index), np.asarray(gate)
  np.testing.assert_array_equal(index[0, 0], [7, 6, 2, 1])
  np.testing.assert_allclose(gate[0, 0], [0.7, 0, 0.15, 0.15])


def test_load_is_told():
  # There are two tokens and two branches of two experts. Both tokens chose
  # branch 0, with probabilities of 0.9 and 0.6; the second could also have
  # chosen branch 1, with 0.4, but no token did. Branch 0's experts have loads
  # of 1.2 and 0.8.
  load = jax.jit(shazeer_rules.hierarchical_load)(
    np.float32([[[0.9, 0.1], [0.6, 0.4]]]),
    np.float32([[[[0.5, 0.5]], [[0.7, 0.3]]]]),
    np.zeros((1, 2, 1), np.int32),
    np.ones((1, 2), bool),
  )
  load = np.asarray(load)
  share = (0.9 + 0.6) / 2
  np.testing.assert_allclose(load[0], [share * 1.2, share * 0.8, 0, 0])


def example(seed):
  """Logits of both levels, with noise, for the code and in numpy."""
  rng = np.random.default_rng(seed)
  levels = []
  for i, shape in enumerate([(G, S, A), (G, S * A, B)]):
    clean, noise = rng.normal(size=(2, *shape)).astype(np.float32)
    levels.append(noisy_logits(clean, noise, tiny.key(2 * seed + i)))
  return levels


@jax.jit
def losses(branch, experts, mask):
  """The load loss as a function of the logits of all branches."""
  index = choose(branch.noisy, K1)
  chosen = jax.tree.map(
    lambda x: jnp.take_along_axis(
      x.reshape(G, S, A, B), index[..., None], axis=2
    ).reshape(G, S * K1, B),
    experts,
  )
  load = shazeer_rules.hierarchical_load(
    load_probability(branch, K1),
    load_probability(chosen, K2).reshape(G, S, K1, B),
    index,
    mask,
  )
  return cv_squared(load)


def test_load_loss_follows_the_definition_with_noise():
  mask = np.ones((G, S), bool)
  mask[1, 3:] = False
  for seed in range(3):
    branch, experts = example(seed)
    loss = losses(branch, experts, jnp.asarray(mask))
    for g in range(G):
      fields = [
        (
          np.asarray(getattr(branch, name), np.float64)[g],
          np.asarray(getattr(experts, name), np.float64)[g].reshape(S, A, B),
        )
        for name in ('clean', 'noisy', 'std')
      ]
      _, expected = reference.two_level_losses(*fields, K1, K2, mask[g])
      np.testing.assert_allclose(loss[g], expected, rtol=1e-4)


def test_load_loss_has_a_gradient_to_the_primary_gate():
  # The paper has the factor Load_p for this gradient, which would be zero
  # without it.
  branch, experts = example(5)
  mask = np.ones((G, S), bool)

  def loss(clean):
    shifted_branch = branch._replace(clean=clean, noisy=branch.noisy)
    return losses(shifted_branch, experts, mask)

  clean = np.asarray(branch.clean)
  gradient = np.asarray(jax.jit(jax.grad(lambda x: loss(x).sum()))(clean))
  assert np.abs(gradient).max() > 1e-4
  toward = np.random.default_rng(9).normal(size=clean.shape).astype(np.float32)
  up, down = (np.sum(loss(clean + d * toward)) for d in (1e-2, -1e-2))
  np.testing.assert_allclose(
    (gradient * toward).sum(), (up - down) / 2e-2, rtol=0.02
  )
