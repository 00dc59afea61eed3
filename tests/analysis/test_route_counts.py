"""Counts of choices: an example by hand, and loops as the definition."""

import itertools

import numpy as np
import pytest

from moe_jax.analysis import route_counts

# Two rows of five places. The first holds a document of three tokens and one of
# two; the second one of three tokens, then padding.
TOKENS = np.array([[7, 8, 9, 7, 7], [4, 4, 5, 0, 0]], np.int32)
DOCUMENTS = np.array([[1, 1, 1, 2, 2], [1, 1, 1, 0, 0]], np.int32)
POSITIONS = np.array([[0, 1, 2, 0, 1], [0, 1, 2, 0, 0]], np.int32)
SOURCES = np.array([[2, 2, 2, 0, 0], [1, 1, 1, 0, 0]], np.int32)


def real_tokens(sources=SOURCES):
  rng = np.random.default_rng(0)
  return route_counts.real_tokens(TOKENS, POSITIONS, DOCUMENTS, sources, rng)


def test_tokens_of_a_batch():
  tokens = real_tokens()
  np.testing.assert_array_equal(tokens.flat_index, [0, 1, 2, 3, 4, 5, 6, 7])
  np.testing.assert_array_equal(tokens.token, [7, 8, 9, 7, 7, 4, 4, 5])
  np.testing.assert_array_equal(tokens.column, [0, 1, 2, 3, 4, 0, 1, 2])
  np.testing.assert_array_equal(tokens.position, [0, 1, 2, 0, 1, 0, 1, 2])
  np.testing.assert_array_equal(tokens.document, [0, 0, 0, 1, 1, 2, 2, 2])
  np.testing.assert_array_equal(tokens.source, [2, 0, 1])
  # Neither the first token of a document nor that of a row follows another.
  np.testing.assert_array_equal(tokens.after, [1, 2, 4, 6, 7])
  assert (tokens.stranger != tokens.after).all()
  # Sources may be given for each row.
  assert real_tokens(np.array([2, 1])).source.tolist() == [2, 2, 1]
  assert real_tokens(None).source is None


def test_a_batch_of_padding():
  rng = np.random.default_rng(0)
  zeros = np.zeros((2, 3), np.int32)
  tokens = route_counts.real_tokens(zeros, zeros, zeros, zeros, rng)
  assert [len(values) for values in tokens] == [0] * 8


def test_choices_in_the_order_of_gates():
  expert = np.array([[0, 2, -1], [-1, 3, 1]])
  gate = np.array([[0.1, 0.7, 0], [0, 0.5, 0.5]])
  ordered = route_counts.by_gate(expert, gate, gate > 0)
  np.testing.assert_array_equal(ordered[0], [[2, 0, -1], [3, 1, -1]])
  np.testing.assert_array_equal(ordered[1], [[0.7, 0.1, 0], [0.5, 0.5, 0]])
  assert ordered[2].tolist() == [[True, True, False]] * 2


def choices(seed, N=40, K=3, E=6):
  """Random choices, some of them missing, no expert twice for one token."""
  rng = np.random.default_rng(seed)
  expert = np.stack([rng.permutation(E)[:K] for _ in range(N)])
  return np.where(rng.random((N, K)) < 0.2, -1, expert)


@pytest.mark.parametrize('K', [1, 2, 3, 9])
def test_pairs_are_those_of_a_loop(K):
  E = 11
  expert = choices(K, K=K, E=E)
  pairs = np.zeros((E, E), int)
  for row in expert:
    for a, b in itertools.permutations(row, 2):
      if a >= 0 and b >= 0:
        pairs[a, b] += 1
  np.testing.assert_array_equal(route_counts.pair_counts(expert, E), pairs)


def test_repeats_are_those_of_a_loop():
  experts, next_experts = choices(1), choices(2)
  pairs = first = common = 0
  for a, b in zip(experts, next_experts, strict=True):
    if a[0] < 0 or b[0] < 0:
      continue
    pairs += 1
    first += a[0] == b[0]
    common += bool({*a} & {*b} - {-1})
  assert route_counts.repeats(experts, next_experts) == (pairs, first, common)
  assert 0 < first < common < pairs


def test_fates_and_their_sums_by_part():
  expert = np.array([[1, 0], [2, -1], [-1, -1], [0, 1]])
  kept = np.array([[True, False], [False, False], [False, True], [True, True]])
  fates = route_counts.fates(expert, kept)
  # Token 2 has no choice and token 1 loses its only one: neither is served.
  expected = [[1, 2, 1, 0], [1, 1, 1, 1], [1, 0, 0, 1], [1, 2, 0, 0]]
  np.testing.assert_array_equal(fates, expected)
  sums = route_counts.sums_by_part(fates, np.array([0, 0, 2, 2]), 3)
  np.testing.assert_array_equal(sums, [[2, 3, 2, 1], [0] * 4, [2, 2, 0, 1]])


def test_parts_of_a_row():
  columns = np.array([0, 2, 3, 9, 12])
  np.testing.assert_array_equal(
    route_counts.parts_of(columns, 10, 3), [0, 0, 0, 2, 2]
  )


def test_joint_counts_leave_out_what_is_unknown():
  joint_counts = route_counts.joint_counts(
    np.array([0, 1, 1, -1]), np.array([2, 0, -1, 1]), (2, 3)
  )
  np.testing.assert_array_equal(joint_counts, [[0, 0, 1], [1, 0, 0]])


def test_the_entropy_of_logits():
  logits = np.array([[0, 0, 0, 0], [0, 0, -np.inf, -np.inf]], np.float32)
  expected = np.log(4) + np.log(2)
  assert route_counts.logit_entropy(logits) == pytest.approx(expected)
