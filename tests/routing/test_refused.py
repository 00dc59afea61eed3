"""Choices and sizes that would be silently wrong are refused by value."""

import jax
import jax.numpy as jnp
import pytest

from moe_jax import routing
from moe_jax.routing import limited_rules

LOGITS = jnp.zeros((2, 7, 6))
INDEX = jnp.zeros((2, 7, 1), jnp.int32)
REAL = jnp.ones((2, 7), bool)


def choose(**changes):
  options = dict(num_selected=2, capacity=3) | changes
  return routing.token_choice(LOGITS, **options)


def leave(**changes):
  sizes = dict(num_selected=1, num_nodes=2, limit=0) | changes
  return limited_rules.limited_choice(
    LOGITS, jnp.zeros(2, jnp.int32), REAL, **sizes
  )


REFUSED = {
  'num_selected=1.*gradient': lambda: choose(
    num_selected=1, gates='renormalized_after_drop'
  ),
  'num_selected=3, but': lambda: choose(
    num_selected=3, second_policy='sampled'
  ),
  r'num_selected=7 not in \[1, num_experts=6\]': lambda: choose(num_selected=7),
  'capacity=0 must be at least 1': lambda: choose(capacity=0),
  r'capacity=8 not in \[1, gro': lambda: routing.expert_choice(
    LOGITS, capacity=8
  ),
  "unknown slot_priority 'batch_prio": lambda: routing.even_choice(
    INDEX, num_experts=6, capacity=1, slot_priority='batch_priority'
  ),
  'bfloat16; it must be float32': lambda: routing.z_loss(
    LOGITS.astype(jnp.bfloat16), REAL
  ),
  'num_experts=6 does not divide by 4 groups': lambda: (
    limited_rules.limited_scores(LOGITS, num_groups=4, chosen_groups=1)
  ),
  "each has 1, and 'two_best' needs 2": lambda: limited_rules.limited_scores(
    LOGITS, num_groups=6, chosen_groups=1, group_score='two_best'
  ),
  'num_experts=6 is not divisible by num_nodes=4': lambda: leave(num_nodes=4),
  r'num_selected=4 not in \[1, 3\]': lambda: leave(num_selected=4),
}


@pytest.mark.parametrize('message', REFUSED)
def test_what_cannot_be_is_refused(message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(REFUSED[message])
