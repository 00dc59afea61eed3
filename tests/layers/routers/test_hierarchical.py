"""Two levels of gates equal the flat layer, a loop, and the definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax import (
  All,
  FeedForwardExpert,
  Fixed,
  Gather,
  Hierarchical,
  MoE,
  MoeOptions,
  NoisyTopK,
  Shared,
  TokenChoice,
)
from moe_jax.layers.routers import Sizes
from moe_jax.layers.shared import Gpt2, Numerics
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


def layer(router_and_sizes, dispatch=Gather()):
  router, sizes = router_and_sizes
  return MoE(
    MoeOptions(
      num_experts=sizes.num_experts,
      num_selected=sizes.num_selected,
      capacity=sizes.capacity,
      router=router,
      expert=FeedForwardExpert(hidden=F, activation='relu'),
      dispatch=dispatch,
    )
  )


def build(router_and_sizes):
  router, sizes = router_and_sizes
  return router.module(sizes, Shared())


def params_of(module, x):
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)
  leaves, tree = jax.tree.flatten(nn.meta.unbox(shapes)['params'])
  drawn = [draw(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)]
  return tree.unflatten(drawn)


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


def test_one_branch_is_the_flat_layer():
  x, mask = x_and_mask()
  nested, single = build(two_levels(1, 5, K1=1, K2=3)), build(flat(5, 3))
  flat_params = params_of_router(single)
  branch = {'w': draw(M, 1), 'w_noise': draw(M, 1, seed=1)}
  branch |= {
    'w_branch': flat_params['w'][None],
    'w_branch_noise': flat_params['w_noise'][None],
  }
  chosen, aux = compiled(nested)(branch, x, mask)
  expected, flat_aux = compiled(single)(flat_params, x, mask)
  np.testing.assert_array_equal(chosen.expert_index, expected.expert_index)
  np.testing.assert_allclose(chosen.gate, expected.gate, rtol=1e-5)
  for name in ('importance_loss', 'load_loss'):
    assert getattr(aux, name) > 0.1
    np.testing.assert_allclose(
      getattr(aux, name), getattr(flat_aux, name), rtol=1e-5
    )
  for name in ('load', 'kept_load', 'entropy'):
    np.testing.assert_allclose(
      getattr(aux.stats, name), getattr(flat_aux.stats, name), rtol=1e-5
    )


@pytest.mark.slow
def test_branches_that_are_copies_are_the_flat_layer_of_one():
  # The gates of branches sum to one, and all branches have equal outputs.
  a, b = 3, 4
  x, mask = x_and_mask()
  nested, single = layer(two_levels(a, b)), layer(flat(b, 2))
  params = params_of(single, x)
  copies = {k: np.concatenate([v] * a) for k, v in params['experts'].items()}
  router_params = params['router']
  branch = {'w': draw(M, a), 'w_noise': draw(M, a, seed=1)}
  branch |= {
    'w_branch': np.stack([router_params['w']] * a),
    'w_branch_noise': np.stack([router_params['w_noise']] * a),
  }
  y, aux = compiled(nested)({'router': branch, 'experts': copies}, x, mask)
  expected, _ = compiled(single)(params, x, mask)
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
  assert (np.asarray(aux.stats.load).reshape(a, b).sum(1) > 0).all()


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
  gates, flat_gates = (
    np.take_along_axis(
      np.asarray(r.gate), np.asarray(r.expert_index).argsort(-1), -1
    )
    for r in (chosen, expected)
  )
  np.testing.assert_allclose(gates, flat_gates, rtol=1e-4)
  np.testing.assert_allclose(
    aux.importance_loss, flat_aux.importance_loss, rtol=1e-4
  )
  np.testing.assert_allclose(
    aux.stats.entropy, flat_aux.stats.entropy, rtol=1e-4
  )


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
  x, mask = x_and_mask()
  shapes = jax.eval_shape(module.init, jax.random.key(0), x, mask)
  shapes = nn.meta.unbox(shapes)['params']
  return {k: draw(*v.shape, seed=i) for i, (k, v) in enumerate(shapes.items())}


def test_gradients_reach_both_gates_by_the_output_and_by_either_loss():
  module = build(two_levels(3, 5))
  x, mask = x_and_mask()

  def output_and_losses(params):
    chosen, aux = module.apply(
      {'params': params}, x, mask, True, rngs={'router': tiny.key(0)}
    )
    output = (chosen.gate * chosen.expert_index).sum()
    return jnp.stack([output, aux.importance_loss, aux.load_loss])

  grads = jax.jit(jax.jacrev(output_and_losses))(params_of_router(module))
  for name, leaf in grads.items():
    largest = np.abs(leaf).reshape(3, -1).max(1)
    assert (largest > 1e-3).all(), (name, largest)


def test_gates_start_with_the_fan_in_of_one_branch():
  x, mask = jnp.ones((1, 3, 50)), jnp.ones((1, 3), bool)
  for noisy in (False, True):
    module = build(two_levels(8, 40, noisy=noisy))
    init = jax.jit(lambda key, m=module: m.init(key, x, mask)['params'])
    start = nn.meta.unbox(init(tiny.key(0)))
    expected = 0 if noisy else 50**-0.5
    for name in ('w', 'w_branch'):
      np.testing.assert_allclose(start[name].std(), expected, rtol=0.1)


def test_an_initialisation_without_fan_in_is_that_of_one_branch_too():
  shared = Shared(Numerics(init=Gpt2()))
  module = Hierarchical(branching=8).module(Sizes(40, 1, All()), shared)
  x, mask = jnp.ones((1, 3, 50)), jnp.ones((1, 3), bool)
  init = jax.jit(lambda key: module.init(key, x, mask)['params'])
  for leaf in nn.meta.unbox(init(tiny.key(0))).values():
    np.testing.assert_allclose(leaf.std(), 0.02, rtol=0.1)


@pytest.mark.slow
def test_full_experts_drop_later_choices():
  module = build(two_levels(2, 3, capacity=Fixed(slots=2)))
  x, mask = x_and_mask()
  chosen, aux = compiled(module)(params_of_router(module), x, mask)
  free, _ = compiled(build(two_levels(2, 3)))(params_of_router(module), x, mask)
  counts = np.zeros((B, 6), int)
  for g, s in zip(*np.nonzero(mask)):
    for k, e in enumerate(chosen.expert_index[g, s]):
      counts[g, e] += 1
      assert chosen.kept[g, s, k] == (counts[g, e] <= 2)
      gate = free.gate[g, s, k] if chosen.kept[g, s, k] else 0
      np.testing.assert_allclose(chosen.gate[g, s, k], gate, rtol=1e-6)
  assert aux.stats.overflowed.sum() > 0


def test_work_does_not_grow_with_the_branches():
  # A gate over all 512 experts would multiply each token by 512 columns.
  x, mask = jnp.ones((B, T, M)), jnp.ones((B, T), bool)
  module = build(two_levels(32, 16))
  text = str(
    jax.make_jaxpr(
      lambda x: module.init_with_output(jax.random.key(0), x, mask)[0][0].gate
    )(x)
  )
  assert f'{B},{T},512]' not in text
  single = build(flat(512, 4))
  text = str(
    jax.make_jaxpr(
      lambda x: single.init_with_output(jax.random.key(0), x, mask)[0][0].gate
    )(x)
  )
  assert f'{B},{T},512]' in text


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


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    (Sizes(13, 4), 'num_experts=13 .*branching=3'),
    (Sizes(12, 3), 'num_selected=3 .*branches_selected=2'),
    (Sizes(12, 10), r'num_selected=5 not in \[1, num_experts=4\] \(in each'),
    (Sizes(12, 2), 'num_selected=1 .*takes the router.s gradient away'),
  ],
)
def test_sizes_that_do_not_fit_are_said(sizes, message):
  router, valid_sizes = two_levels(3, 4)
  assert not list(router.problems_with(valid_sizes))
  with pytest.raises(ValueError, match=message):
    raise ValueError('; '.join(router.problems_with(sizes)))


def test_more_branches_than_there_are_cannot_be_chosen():
  with pytest.raises(ValueError, match=r'branches_selected=4 not in \[1, bra'):
    two_levels(3, 4, K1=4)
  with pytest.raises(ValueError, match="gates 'sigmoid'"):
    two_levels(3, 4, gates='sigmoid')


def test_one_branch_has_a_gate_of_one():
  # With a single branch renormalised gates of branches are all one, and that is
  # no problem.
  router, sizes = two_levels(1, 4, K1=1, K2=2)
  assert not list(router.problems_with(sizes))
