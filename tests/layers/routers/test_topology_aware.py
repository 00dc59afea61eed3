"""The topology-aware gate with parameters, devices, limits and a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import All, Fixed, partitioning, run_config
from moe_jax.layers.routers import Sizes, TokenChoice, TopologyAware, contract
from moe_jax.layers.routers.topology_aware import sown_leaving
from tests import reference
from tests.layers.routers import run
from tests.training import tiny

G, S, E, K, M = 8, 7, 12, 2, 5
X = run.draw(G, S, M)
W = run.draw(M, E, seed=1)
MASK = np.random.default_rng(2).random((G, S)) < 0.8
# Four devices in two nodes, of which each has six experts.
GATE = TopologyAware(
  devices=4, per_node=2, outgoing_fraction=0.3, gates='renormalized'
)
SHIPPED = dataclasses.replace(GATE, variant='fastmoe')
UNLIMITED = dataclasses.replace(GATE, outgoing_fraction=1.0)
BOTH = pytest.mark.parametrize(
  'options', [GATE, SHIPPED], ids=['published', 'fastmoe']
)


def route(options, x=X, **kwargs):
  kwargs = {'num_experts': E, 'num_selected': K, 'mask': MASK, **kwargs}
  return run.route(options, {'w': W}, x, ids=None, **kwargs)


def expected_index(options, logits, mask=MASK):
  """The choices by the definition, [G, S, K]."""
  node = [reference.node_of_group(g, G, 4, 2) for g in range(G)]
  limit = int(options.outgoing_fraction * S)
  if options.variant == 'fastmoe':
    return reference.fastmoe_choice(logits, node, mask, 2, limit)
  return reference.limited_choice(logits, node, mask, K, 2, limit)


@BOTH
def test_choices_gates_and_losses_are_those_of_the_book(options):
  logits = np.float64(X) @ np.float64(W)
  index = expected_index(options, logits)
  plain = np.argsort(-logits, -1)[..., :K]
  assert 0 < (index != plain)[MASK].any(-1).mean() < 1
  chosen, aux = route(options)
  np.testing.assert_array_equal(chosen.expert_index, index)
  # Gates are the softmax over the logits of the two chosen experts.
  gate = reference.softmax(np.take_along_axis(logits, index, -1))
  gate *= MASK[..., None]
  np.testing.assert_allclose(chosen.gate, gate, rtol=1e-4, atol=1e-6)
  # The balance loss counts the choices that are made.
  probs, tokens = reference.softmax(logits), MASK.sum(1)
  balance = reference.balance_loss(probs, index, MASK) * tokens
  np.testing.assert_allclose(aux.balance_loss, balance.sum(), rtol=1e-4)
  load = np.bincount(index[MASK].reshape(-1), minlength=E)
  np.testing.assert_array_equal(aux.stats.load, load)


def test_without_a_limit_it_is_token_choice():
  capacity = Fixed(slots=2)
  one_node = TopologyAware(devices=4, per_node=4, gates='renormalized')
  shipped = dataclasses.replace(one_node, variant='fastmoe')
  expected = route(TokenChoice(gates='renormalized'), capacity=capacity)
  for options in (UNLIMITED, one_node, shipped):
    assert not options.limits
    chosen, aux = route(options, capacity=capacity)
    # Token choice has losses of other scopes, too.
    losses = {name: expected[1].losses[name] for name in aux.losses}
    jax.tree.map(
      np.testing.assert_array_equal,
      (chosen, aux),
      (expected[0], expected[1]._replace(losses=losses)),
    )
  assert (route(GATE)[0].expert_index != expected[0].expert_index).any()


def test_groups_lie_on_devices_in_order():
  for W, m in ((1, 1), (4, 2), (6, 2), (6, 6), (8, 1)):
    nodes = TopologyAware(devices=W, per_node=m).nodes(24)
    expected = [reference.node_of_group(g, 24, W, m) for g in range(24)]
    np.testing.assert_array_equal(nodes, expected)
  # Devices that do not divide the groups have as even parts as can be.
  assert TopologyAware(devices=4, per_node=2).nodes(3).tolist() == [0, 0, 1]
  assert TopologyAware(devices=4, per_node=2).nodes(1).tolist() == [0]


def test_the_limit_is_that_of_the_formula():
  # Two nodes of eight devices: a node sends 6.25 GB/s, and its devices have
  # 8 * 12.5 GB/s among them, so that one token of sixteen may leave.
  options = TopologyAware(
    devices=16,
    per_node=8,
    limit_by='bandwidth',
    network_gb_per_second=6.25,
    local_gb_per_second=12.5,
  )
  assert options.fraction == 0.0625
  assert (options.limit(128), options.limit(127)) == (8, 7)
  # A network as fast as all devices together limits nothing.
  fast = dataclasses.replace(options, network_gb_per_second=200.0)
  assert fast.fraction == 1 and not fast.limits
  assert TopologyAware().limit(50) == 7  # 0.14 in FastMoE
  # In floating point 0.29 * 100 is a little below 29.
  assert TopologyAware(outgoing_fraction=0.29).limit(100) == 29


def test_what_depends_on_later_tokens_is_said():
  sizes = Sizes(E, K, All())
  none_leave = dataclasses.replace(GATE, outgoing_fraction=0.0)
  for options in (GATE, SHIPPED):
    assert "use 'token_choice'" in options.leak(sizes)
    assert 'token_choice' in options.decodes(sizes)
  for options in (UNLIMITED, none_leave):
    assert options.leak(sizes) is None
  assert UNLIMITED.decodes(sizes) is None
  assert 'place in the batch' in none_leave.decodes(sizes)
  later = X + 10 * np.float32(np.arange(S) > 3)[:, None] * run.draw(
    G, S, M, seed=5
  )
  for options in (none_leave, GATE):
    before, after = (route(options, x)[0] for x in (X, later))
    unchanged = before.expert_index[:, :4] == after.expert_index[:, :4]
    assert unchanged.all() == (options.leak(sizes) is None)
  # Slots leak as they do in other routers.
  slots = dataclasses.replace(UNLIMITED, slot_priority='choice_major')
  assert 'slot_priority' in slots.leak(Sizes(E, K, Fixed(slots=2)))


@BOTH
def test_gradients_reach_the_router(options):
  module = run.module(options, Sizes(E, K, All()))

  @jax.jit
  @jax.grad
  def gradient(w):
    chosen, _ = module.apply(
      {'params': {'w': w}}, jnp.asarray(X), jnp.asarray(MASK)
    )
    return (chosen.gate * (chosen.expert_index + 1)).sum()

  dw = np.asarray(gradient(W))
  assert np.isfinite(dw).all() and (np.abs(dw).max(0) > 0).all()


@BOTH
def test_a_mesh_changes_nothing(options):
  module = run.module(options, Sizes(E, K, All()))
  apply = jax.jit(functools.partial(module.apply, mutable=['intermediates']))
  mesh = partitioning.make_mesh({'data': 2, 'expert': 2}, jax.devices()[:4])
  split = NamedSharding(mesh, PartitionSpec(('data', 'expert')))
  replicated = jax.device_put(W, NamedSharding(mesh, PartitionSpec()))
  one = apply({'params': {'w': W}}, X, MASK)
  many = apply({'params': {'w': replicated}}, *jax.device_put((X, MASK), split))
  np.testing.assert_array_equal(one[0][0].expert_index, many[0][0].expert_index)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(close, one, many)
  # The choices and the numbers of leaving tokens are sown for analysis.
  sown = one[1]['intermediates']
  index = contract.sown(sown)['expert_index']
  np.testing.assert_array_equal(index, one[0][0].expert_index)
  counts = sown_leaving(sown)
  np.testing.assert_array_equal(counts.tokens, MASK.sum(1))
  if options.variant == 'published':
    assert counts.leaving.max() == options.limit(S) < counts.wanting.max()


def test_options_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match='devices=6 is not divisible by per_n'):
    TopologyAware(devices=6, per_node=4)
  with pytest.raises(ValueError, match="gates='raw' with variant='fastmoe'"):
    TopologyAware(variant='fastmoe')
  with pytest.raises(ValueError, match='no effect unless limit_by'):
    TopologyAware(network_gb_per_second=3.0)
  for options, sizes, problem in (
    (GATE, Sizes(10, 2), 'num_experts=10 is not divisible by the devices=4'),
    (GATE, Sizes(8, 5), 'num_selected=5 is more than the 4 experts of a node'),
    (SHIPPED, Sizes(8, 3), "num_selected=3, but variant='fastmoe' is defined"),
  ):
    (message,) = options.problems_with(sizes)
    assert message.startswith(problem)
  moe = {
    'router': {'kind': 'topology', 'topology': {'devices': 8}},
    'num_experts': 8,
    'allow_future_leak': True,
  }
  config = tiny.config(model={'moe': moe})
  with pytest.raises(ValueError, match='4 groups in a microbatch do not divi'):
    run_config.read(config)
