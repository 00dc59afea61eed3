"""The rule of FastMoE's code against plain loops and by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.parallel import shadowing, shadowing_rules
from moe_jax.parallel.cost_model import Sizes
from moe_jax.parallel.shadowing import Speeds
from tests.parallel.test_shadowing import SIZES, SPEEDS, draw


def fastmoe_in_loops(counts, sizes, speeds, factor):
  """The rule of FastMoE's code, on nested lists."""
  E = len(counts)
  totals = [sum(counts[e]) for e in range(E)]
  order = sorted(range(E), key=lambda e: (-totals[e], e))
  row = 3 * 4 * sizes.M * sizes.F * factor / speeds.flops
  row += 4 * sizes.M / speeds.elements
  best, spent, chosen = row * totals[order[0]], 0.0, []
  for i, e in enumerate(order):
    if i + 1 == E:
      break
    spent += 2 * sizes.M * sizes.F / speeds.elements
    cost = row * totals[order[i + 1]] + spent
    if cost >= best:
      break
    chosen, best = [*chosen, e], cost
  return chosen, best


@pytest.mark.parametrize('overcounts', [False, True])
def test_the_rule_of_fastmoes_code_on_draws(overcounts):
  rng = np.random.default_rng(3)
  most, lengths, num_other = 3, set(), 0
  in_step = jax.jit(
    functools.partial(
      shadowing_rules.choose_fastmoe_in_step,
      sizes=SIZES,
      speeds=SPEEDS,
      most=most,
      overcounts=overcounts,
    )
  )
  for _ in range(100):
    counts = draw(rng, 8, 4)
    choice = shadowing_rules.choose_fastmoe(
      counts, SIZES, SPEEDS, overcounts=overcounts
    )
    chosen, best = fastmoe_in_loops(
      counts.tolist(), SIZES, SPEEDS, SIZES.bytes_per_element**overcounts
    )
    assert list(choice.experts) == chosen
    np.testing.assert_allclose(choice.seconds, best, rtol=1e-12)
    assert (choice.rows == shadowing.rows_of(counts, choice.experts)).all()
    expected = tuple(chosen[:most]) + (8,) * (most - len(chosen))
    assert tuple(in_step(jnp.asarray(counts)).tolist()) == expected
    lengths.add(len(chosen))
    num_other += chosen != list(shadowing.choose(counts, SIZES, SPEEDS).experts)
  assert {0, 1, 2} <= lengths and num_other > 10


def test_fastmoes_code_by_hand():
  # Experts of 40, 6 and 5 rows; a row takes 3 s and 1 s of exchange, and the
  # parameters of an expert 1.5 s.
  counts = np.array([[10, 30, 0], [2, 4, 0], [0, 0, 5]])
  sizes, speeds = Sizes(M=2, F=3), Speeds(flops=24.0, elements=8.0)
  choice = shadowing_rules.choose_fastmoe(counts, sizes, speeds)
  assert (choice.seconds_before, choice.seconds) == (160.0, 5 * 4 + 2 * 1.5)
  # The two devices have 12 and 34 rows then, which the rule does not see.
  assert choice.experts == (0, 1) and choice.rows.tolist() == [12, 34, 5]
  # The last expert is never shadowed.
  single = shadowing_rules.choose_fastmoe(np.array([[9]]), sizes, speeds)
  assert single.experts == ()
  in_step = shadowing_rules.choose_fastmoe_in_step(
    jnp.asarray(counts), sizes, speeds, most=3
  )
  assert in_step.tolist() == [0, 1, 3]
  # The prototype takes a row's products for 12 s.
  prototype = shadowing_rules.choose_fastmoe(
    counts, sizes, speeds, overcounts=True
  )
  assert prototype.seconds_before == 40 * 13
  with pytest.raises(ValueError, match=r'most=4 not in \[0, num_experts=3\]'):
    shadowing_rules.choose_fastmoe(counts, sizes, speeds, most=4)
