"""The topology-aware gate with parameters, devices, limits and a mesh."""

import dataclasses

import jax
import numpy as np

from moe_jax import All, Fixed
from moe_jax.layers.routers import Sizes, TokenChoice, TopologyAware
from tests import reference
from tests.layers.routers import run

G, S, E, K, M = 8, 7, 12, 2, 5
X = run.draw(G, S, M)
W = run.draw(M, E, seed=1)
MASK = np.random.default_rng(2).random((G, S)) < 0.8
# Four devices in two nodes, of which each has six experts.
GATE = TopologyAware(
  devices=4, per_node=2, outgoing_fraction=0.3, gates='renormalized'
)
UNLIMITED = dataclasses.replace(GATE, outgoing_fraction=1.0)


def route(options, x=X, **kwargs):
  kwargs = {'num_experts': E, 'num_selected': K, 'mask': MASK, **kwargs}
  return run.route(options, {'w': W}, x, ids=None, **kwargs)


def test_choices_gates_and_losses_are_those_of_the_book():
  logits = np.float64(X) @ np.float64(W)
  node = [reference.node_of_group(g, G, 4, 2) for g in range(G)]
  index = reference.limited_choice(logits, node, MASK, K, 2, int(0.3 * S))
  plain = np.argsort(-logits, -1)[..., :K]
  assert 0 < (index != plain)[MASK].any(-1).mean() < 1
  chosen, aux = route(GATE)
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
  expected = route(TokenChoice(gates='renormalized'), capacity=capacity)
  for options in (UNLIMITED, one_node):
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


def test_the_limit_is_a_share_of_a_group_in_whole_tokens():
  assert TopologyAware().limit(50) == 7  # 0.14 in FastMoE
  # In floating point 0.29 * 100 is a little below 29.
  assert TopologyAware(outgoing_fraction=0.29).limit(100) == 29


def test_what_depends_on_later_tokens_is_said():
  sizes = Sizes(E, K, All())
  none_leave = dataclasses.replace(GATE, outgoing_fraction=0.0)
  assert 'place in the batch' in none_leave.causality(sizes).undecodable
  assert UNLIMITED.causality(sizes) == none_leave.causality(sizes)._replace(
    undecodable=None
  )
  later = X + 10 * np.float32(np.arange(S) > 3)[:, None]
  before, after = (route(none_leave, x)[0].expert_index for x in (X, later))
  np.testing.assert_array_equal(before[:, :4], after[:, :4])
  # Slots leak as they do in other routers.
  slots = dataclasses.replace(UNLIMITED, slot_priority='choice_major')
  assert 'slot_priority' in slots.causality(Sizes(E, K, Fixed(slots=2))).leak
