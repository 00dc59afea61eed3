"""Properties of every routing with every option, on inputs full of ties."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

from moe_jax.routing import token_choice
from moe_jax.routing.token_choice_rule import (
  GATES,
  SECOND_POLICIES,
  SLOT_PRIORITIES,
)

G, S, E, C = 2, 7, 5, 3
few_examples = settings(max_examples=20, deadline=None, derandomize=True)

# Logits are small whole numbers, so that ties are frequent.
logits = st_np.arrays(np.float32, (G, S, E), elements=st.integers(-2, 2))
masks = st_np.arrays(bool, (G, S))


@st.composite
def options(draw):
  K = draw(st.integers(1, 3))
  policies = [p for p in SECOND_POLICIES if p != 'sampled' or K == 2]
  return dict(
    num_selected=K,
    gates=draw(st.sampled_from(tuple(GATES) if K > 1 else ('raw', 'sigmoid'))),
    slot_priority=draw(st.sampled_from(SLOT_PRIORITIES)),
    second_policy=draw(st.sampled_from(policies)),
    key=draw(st.sampled_from([None, *map(jax.random.key, range(3))])),
  )


@few_examples
@given(logits, masks, options(), st.sampled_from([1, C, None]))
def test_contract(logits, mask, options, capacity):
  routing = token_choice(
    jnp.asarray(logits), mask=jnp.asarray(mask), capacity=capacity, **options
  )
  expert, slot, gate, kept = (
    np.asarray(getattr(routing, name))
    for name in ('expert_index', 'slot', 'gate', 'kept')
  )
  assert expert.shape == slot.shape == gate.shape == kept.shape
  assert expert.shape == (G, S, options['num_selected'])
  assert ((expert >= 0) & (expert < E)).all() and (slot >= 0).all()
  assert not kept[~mask].any() and not slot[~mask].any()
  assert not gate[~kept].any()
  assert (gate[kept] > 0).all() and (gate <= 1 + 1e-6).all()
  if options['gates'] != 'sigmoid':
    assert (gate.sum(-1) <= 1 + 1e-5).all()
  if options['gates'] == 'renormalized_after_drop':
    np.testing.assert_allclose(gate.sum(-1), kept.any(-1), atol=1e-6)
  for g in range(G):
    for s in range(S):
      # Experts of a token differ.
      assert len(set(expert[g, s])) == expert.shape[-1]
    seats = list(zip(expert[g][kept[g]], slot[g][kept[g]]))
    assert len(seats) == len(set(seats))  # a slot has one token
    if capacity is not None:
      assert all(c < capacity for _, c in seats)
      served = np.bincount(expert[g][kept[g]], minlength=E)
      assert (served <= capacity).all()
      if options['key'] is None:  # Only a full expert drops a choice.
        demand = np.bincount(expert[g][mask[g]].ravel(), minlength=E)
        np.testing.assert_array_equal(served, np.minimum(demand, capacity))


def test_raw_gates_teach_the_router():
  @jax.jit
  def gradient_and_kept(logits):
    def total(logits):
      routing = token_choice(logits, num_selected=2, capacity=C)
      return routing.gate.sum(), routing.kept

    return jax.grad(total, has_aux=True)(logits)

  for seed in range(10):
    logits = np.random.default_rng(seed).normal(size=(G, S, E))
    gradient, kept = gradient_and_kept(jnp.asarray(logits, jnp.float32))
    served = np.asarray(kept).any(-1)
    size = np.abs(gradient).max(-1)
    assert (size[served] > 1e-4).all() and not size[~served].any()


@few_examples
@given(logits, options(), st.permutations(range(S)))
def test_without_drops_a_token_is_routed_alone(logits, options, order):
  # Permuting a group permutes what its tokens get, and changes nothing else.
  options['key'] = None
  order = np.array(order)
  routed, shuffled = (
    jax.tree.map(np.asarray, token_choice(x, capacity=S, **options))
    for x in (jnp.asarray(logits), jnp.asarray(logits[:, order]))
  )
  assert routed.kept.all() and shuffled.kept.all()
  np.testing.assert_array_equal(
    routed.expert_index[:, order], shuffled.expert_index
  )
  np.testing.assert_allclose(routed.gate[:, order], shuffled.gate, rtol=1e-6)
