"""Algorithm 1 of FasterMoE, as printed in plain loops, and by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.parallel import shadowing
from moe_jax.parallel.cost_model import Sizes
from moe_jax.parallel.shadowing import Speeds

SIZES = Sizes(M=16, F=32)
SPEEDS = Speeds(flops=3e4, elements=4e3)


def draw(rng, E, W):
  """Counts between none and very skewed ones."""
  skew = rng.choice([0.0, 0.7, 1.5, 3.0])
  popularity = rng.permutation(np.arange(1, E + 1) ** -skew)
  tokens = int(rng.choice([0, 5, 60, 900]))
  share = popularity / popularity.sum()
  return rng.multinomial(tokens, share, size=W).T


def in_loops(counts, sizes, speeds):
  """The algorithm as the paper prints it, on nested lists."""
  E, W = len(counts), len(counts[0])
  per = E // W
  n = [0] * W
  for e in range(E):
    for w in range(W):
      n[e // per] += counts[e][w]
  totals = [sum(counts[e]) for e in range(E)]
  order = sorted(range(E), key=lambda e: (-totals[e], e))
  work = 12 * sizes.M * sizes.F / speeds.flops
  best = max(work * x + 4 * x * sizes.M / speeds.elements for x in n)
  chosen = []
  for e in order:
    moved = list(n)
    for w in range(W):
      if w != e // per:
        moved[e // per] -= counts[e][w]
        moved[w] += counts[e][w]
    r = len(chosen) + 1
    cost = max(work * x for x in moved)
    cost += 4 * r * sizes.M * sizes.F / speeds.elements
    if cost >= best:
      break
    chosen, n, best = [*chosen, e], moved, cost
  return chosen, best


def chosen_by(counts, sizes=SIZES, speeds=SPEEDS, most=None):
  """The experts that are shadowed, and the seconds with them."""
  most = len(counts) if most is None else most
  chosen = shadowing.choose(counts, sizes, speeds, most=most)
  experts = chosen[chosen < len(counts)].tolist()
  by_number = shadowing.seconds_by_number(counts, sizes, speeds, most)[1]
  return experts, by_number[len(experts)]


def test_it_is_the_printed_algorithm_on_a_thousand_draws():
  rng = np.random.default_rng(0)
  lengths = set()
  for _ in range(1000):
    W = int(rng.integers(1, 7))
    counts = draw(rng, W * int(rng.choice([1, 1, 2, 4])), W)
    experts, seconds = chosen_by(counts)
    chosen, best = in_loops(counts.tolist(), SIZES, SPEEDS)
    assert experts == chosen
    np.testing.assert_allclose(seconds, best, rtol=1e-12)
    lengths.add(len(chosen))
  assert {0, 1, 2, 3} <= lengths


def rows_of(counts, subset=()):
  """The number of rows that each device multiplies."""
  (E, W), rows = counts.shape, [0] * counts.shape[1]
  for e, w in np.ndindex(E, W):
    rows[w if e in subset else e * W // E] += int(counts[e, w])
  return rows


def test_it_stops_though_two_experts_would_pay():
  # Experts 0 and 1, of devices 0 and 1, have 25 rows of each device. To shadow
  # one of them alone makes the other's device slower.
  counts = np.array([[25] * 4, [25] * 4, [0] * 4, [0] * 4])
  assert rows_of(counts, (0,)) == [25, 125, 25, 25]
  # A row takes 1 s of products, and all of 100 rows 0.4 s of exchange.
  by_hand = Sizes(M=1, F=200), Speeds(2400.0, 1000.0)
  assert chosen_by(counts, *by_hand) == ([], 100 + 0.4)


def test_rows_and_costs_by_hand():
  # Device 0 has expert 0, which all want.
  counts = np.array([[10, 30], [2, 4]])
  sizes, speeds = Sizes(M=2, F=3), Speeds(flops=24.0, elements=8.0)
  # A row has 4 * 2 * 3 = 24 FLOPs, three times in a step: 3 s of products, and
  # 1 s of exchanges. An expert's 12 parameters take 3 s there and back. Devices
  # multiply 40 and 6 rows; with expert 0 shadowed 10 and 36; with both the 12
  # and 34 that they have.
  experts, seconds = shadowing.seconds_by_number(counts, sizes, speeds, 2)
  assert experts.tolist() == [0, 1]
  assert seconds.tolist() == [40 * 3 + 40 * 1, 36 * 3 + 3, 34 * 3 + 6]
  assert chosen_by(counts, sizes, speeds, most=1)[0] == [0]
  assert chosen_by(counts, sizes, speeds, most=0)[0] == []
  assert shadowing.least_rows(13, sizes) == 39


def test_in_a_step_it_is_the_same():
  rng = np.random.default_rng(2)
  most, used = 3, set()
  choose = jax.jit(
    functools.partial(shadowing.choose, sizes=SIZES, speeds=SPEEDS, most=most)
  )
  for _ in range(100):
    counts = draw(rng, 8, 4)
    expected = chosen_by(counts, most=most)[0]
    filler = [8] * (most - len(expected))
    assert choose(jnp.asarray(counts)).tolist() == expected + filler
    used.add(len(expected))
  assert used == {0, 1, 2, 3}


def test_equal_totals_go_to_the_lower_number():
  counts = np.zeros((4, 4), int)
  counts[1], counts[2] = 500, 500  # of each device
  # They are beyond the threshold, yet all devices would have more rows.
  assert max(rows_of(counts)) > shadowing.least_rows(1, SIZES)
  assert chosen_by(counts, most=1)[0] == []
  fast = Speeds(flops=1e9, elements=1e3)
  assert chosen_by(counts, SIZES, fast, most=1)[0] == [1]
