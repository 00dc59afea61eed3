"""Algorithm 1 of FasterMoE against plain loops and against all subsets."""

import itertools

import numpy as np
import pytest

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
  return chosen, n, best


def test_it_is_the_printed_algorithm_on_a_thousand_draws():
  rng = np.random.default_rng(0)
  lengths = set()
  for _ in range(1000):
    W = int(rng.integers(1, 7))
    counts = draw(rng, W * int(rng.choice([1, 1, 2, 4])), W)
    choice = shadowing.choose(counts, SIZES, SPEEDS)
    chosen, rows, best = in_loops(counts.tolist(), SIZES, SPEEDS)
    assert list(choice.experts) == chosen
    assert choice.rows.tolist() == rows
    np.testing.assert_allclose(choice.seconds, best, rtol=1e-12)
    assert choice.seconds <= choice.seconds_before
    lengths.add(len(chosen))
  assert {0, 1, 2, 3} <= lengths


def cost(counts, subset):
  rows = shadowing.rows_of(counts, subset)
  if not subset:
    return shadowing.imbalanced_seconds(rows, SIZES, SPEEDS)
  return shadowing.shadowed_seconds(len(subset), rows, SIZES, SPEEDS)


def test_it_is_never_better_than_the_best_subset():
  rng = np.random.default_rng(1)
  gaps = []
  for _ in range(100):
    counts = draw(rng, 8, int(rng.choice([4, 8])))
    best = min(
      cost(counts, subset)
      for size in range(9)
      for subset in itertools.combinations(range(8), size)
    )
    greedy = shadowing.choose(counts, SIZES, SPEEDS).seconds
    assert greedy >= best * (1 - 1e-12)
    gaps.append(greedy / best - 1 if best else 0.0)
  # It is best nearly always; to stop at the first that does not pay costs
  # something where two experts are as hot.
  assert np.mean(np.array(gaps) < 1e-9) > 0.8


def test_rows_and_costs_by_hand():
  # Device 0 has expert 0, which all want.
  counts = np.array([[10, 30], [2, 4]])
  assert shadowing.rows_of(counts).tolist() == [40, 6]
  assert shadowing.leaving(counts) == 32
  assert shadowing.rows_of(counts, (0,)).tolist() == [10, 36]
  assert shadowing.leaving(counts, (0,)) == 2
  sizes, speeds = Sizes(M=2, F=3), Speeds(flops=24.0, elements=8.0)
  # A row has 4 * 2 * 3 = 24 FLOPs, three times in a step: 3 s and 1 s of rows.
  before = shadowing.imbalanced_seconds(np.array([40, 6]), sizes, speeds)
  assert before == 40 * 3 + 40 * 1
  after = shadowing.shadowed_seconds(1, np.array([10, 36]), sizes, speeds)
  assert after == 36 * 3 + 2 * 12 / 8
  choice = shadowing.choose(counts, sizes, speeds)
  assert (choice.experts, choice.seconds) == ((0,), after)
  assert choice.seconds_before == before
  assert shadowing.choose(counts, sizes, speeds, most=0).experts == ()
  assert shadowing.pays(counts, 13, sizes)
  assert not shadowing.pays(counts, 14, sizes)


def test_equal_totals_go_to_the_lower_number():
  counts = np.array([[0, 50, 0, 0], [0, 0, 0, 50], [0, 0, 0, 0], [0, 0, 0, 0]])
  assert shadowing.choose(counts, SIZES, SPEEDS, most=1).experts == (0,)


def test_bandwidths_are_converted_in_one_place():
  speeds = Speeds.of_bytes(5.0, 80.0, Sizes(1, 1, bytes_per_element=2))
  assert speeds == Speeds(5.0, 40.0)


def test_what_cannot_be_is_refused():
  with pytest.raises(
    ValueError, match='num_experts=3 is not divisible by the 2'
  ):
    shadowing.choose(np.ones((3, 2), int), SIZES, SPEEDS)
  with pytest.raises(
    ValueError, match=r'elements=0\.0 a second must be above 0'
  ):
    Speeds(1.0, 0.0)
