"""Two levels of gates equal the flat layer, a loop, and the definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from moe_jax import All, Hierarchical, NoisyTopK, Shared, TokenChoice
from moe_jax.layers.routers import Sizes
from tests import reference
from tests.layers.routers.run import draw
from tests.models import tiny

B, T, M, F = 2, 9, 6, 11


def two_levels(a, b, K1=2, K2=2, *, capacity=All(), **options):
  """A router of `a` branches of `b` experts, and its sizes."""
  options = {'noisy': True, 'gates': 'renormalized', **options}
  router = Hierarchical(branching=a, branches_selected=K1, **options)
  return router, Sizes(a * b, K1 * K2, capacity)


def flat(E, K, kind=NoisyTopK, gates='renormalized'):
  """A router of one level, and its sizes."""
  return kind(gates=gates), Sizes(E, K, All())


def build(router_and_sizes):
  router, sizes = router_and_sizes
  return router.module(sizes, Shared())


@functools.cache
def compiled(module, train=False):
  def run(params, x, mask):
    rngs = {'router': tiny.key(1)} if train else None
    return module.apply({'params': params}, x, mask, train, rngs=rngs)

  return jax.jit(run)


def x_and_mask():
  mask = np.ones((B, T), bool)
  mask[0, 7:] = mask[1, 2] = False
  return jnp.asarray(draw(B, T, M, seed=9)), jnp.asarray(mask)


def test_all_choices_with_gates_that_are_copies_are_the_flat_product():
  # All experts are chosen, so that a product of gates is the softmax of summed
  # logits.
  a, b = 3, 2
  x, mask = x_and_mask()
  nested = build(two_levels(a, b, K1=a, K2=b, noisy=False, gates='raw'))
  single = build(flat(a * b, a * b, TokenChoice, 'raw'))
  w, inner = draw(M, a), draw(M, b, seed=1)
  flat_params = {'w': (w[..., None] + inner[:, None]).reshape(M, a * b)}
  branch = {'w': w, 'w_branch': np.stack([inner] * a)}
  chosen, aux = compiled(nested)(branch, x, mask)
  expected, flat_aux = compiled(single)(flat_params, x, mask)
  tiny.assert_trees_close(
    *((r.token_gates(), a.importance_loss, a.stats.entropy)
      for r, a in ((chosen, aux), (expected, flat_aux))),
    rtol=1e-4,
  )  # fmt: skip


def in_numpy(params, x):
  """Logits and deviations of both levels, [B, T, a] and [B, T, a, b]."""
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  x = np.asarray(x, np.float64)
  clean, noise = (
    (x @ p[f'w{n}'], np.einsum('BTM,aMb->BTab', x, p[f'w_branch{n}']))
    for n in ('', '_noise')
  )
  return clean, tuple(np.log1p(np.exp(n)) for n in noise)


def test_choices_gates_and_losses_are_those_of_the_book():
  a, b, K1, K2 = 3, 5, 2, 3
  x, mask = x_and_mask()
  module = build(two_levels(a, b, K1, K2))
  params = params_of_router(module)
  chosen, aux = compiled(module)(params, x, mask)
  clean, std = in_numpy(params, x)
  importance = load = 0.0
  for g in range(B):
    for s in range(T):
      index, gate = reference.two_levels(clean[0][g, s], clean[1][g, s], K1, K2)
      np.testing.assert_array_equal(chosen.expert_index[g, s], index)
      if mask[g, s]:
        np.testing.assert_allclose(chosen.gate[g, s], gate, rtol=1e-4)
    one = [tuple(level[g] for level in levels) for levels in (clean, std)]
    losses = reference.two_level_losses(one[0], one[0], one[1], K1, K2, mask[g])
    importance += losses[0] * mask[g].sum()
    load += losses[1] * mask[g].sum()
  np.testing.assert_allclose(aux.importance_loss, importance, rtol=1e-4)
  np.testing.assert_allclose(aux.load_loss, load, rtol=1e-4)
  assert not np.asarray(chosen.gate)[~np.asarray(mask)].any()


def params_of_router(module):
  return tiny.layer_params(module, *x_and_mask())


def test_gates_start_with_the_fan_in_of_one_branch():
  x, mask = jnp.ones((1, 3, 50)), jnp.ones((1, 3), bool)
  for noisy in (False, True):
    module = build(two_levels(8, 40, noisy=noisy))
    init = jax.jit(lambda key, m=module: m.init(key, x, mask)['params'])
    start = nn.meta.unbox(init(tiny.key(0)))
    expected = 0 if noisy else 50**-0.5
    for name in ('w', 'w_branch'):
      np.testing.assert_allclose(start[name].std(), expected, rtol=0.1)


def test_work_does_not_grow_with_the_branches():
  # A gate over all 512 experts would multiply each token by 512 columns.
  for router, grows in ((two_levels(32, 16), False), (flat(512, 4), True)):
    init = functools.partial(build(router).init_with_output, jax.random.key(0))
    program = jax.make_jaxpr(lambda *args, f=init: f(*args)[0][0].gate)
    assert (f'{B},{T},512]' in str(program(*x_and_mask()))) == grows


def test_noise_is_drawn_at_both_levels_in_training_alone():
  module = build(two_levels(3, 5, 2, 3))  # as in the test of the definitions
  x, mask = x_and_mask()
  params = params_of_router(module)
  clean, _ = compiled(module)(params, x, mask)
  noisy, _ = compiled(module, True)(params, x, mask)
  clean, noisy = (np.asarray(r.expert_index) for r in (clean, noisy))
  assert (clean // 5 != noisy // 5).any()
  same_branch = (clean // 5 == noisy // 5).all(-1)
  assert same_branch.any() and (clean != noisy)[same_branch].any()
