"""Counts of the choices in one batch of a trace, as plain functions on arrays.

A choice is an int in [0, E), or -1 where there is none: at padding, and where
experts choose tokens, which may leave a token with fewer choices than another.
Tokens are counted in the order in which rows hold them, without padding. Not
here: sums over batches (`route_sums.py`), and what follows from them
(`route_measures.py`).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Num


class Tokens(NamedTuple):
  """The N real tokens of a batch, row after row, and who follows whom.

  Attributes:
    flat_index: int [N], the index of each token among the B * T of the batch.
    token: int [N], its id.
    column: int [N], its place in its row, from 0.
    position: int [N], its place in its document, from 0.
    document: int [N], the number of its document in the batch, from 0.
    source: int [documents], the source of each document, or None.
    after: int [P], the numbers, of N, of tokens whose document goes on from the
      token before them.
    stranger: int [P], for each of these a random other token of the batch,
      which takes the place of the token before in a comparison.
  """

  flat_index: Int[np.ndarray, 'N']
  token: Int[np.ndarray, 'N']
  column: Int[np.ndarray, 'N']
  position: Int[np.ndarray, 'N']
  document: Int[np.ndarray, 'N']
  source: Int[np.ndarray, 'documents'] | None
  after: Int[np.ndarray, 'P']
  stranger: Int[np.ndarray, 'P']


def real_tokens(
  tokens: Int[np.ndarray, 'B T'],
  positions: Int[np.ndarray, 'B T'],
  documents: Int[np.ndarray, 'B T'],
  sources: Int[np.ndarray, '*shape'] | None,
  rng: np.random.Generator,
) -> Tokens:
  """The real tokens of a batch.

  Args:
    tokens: Ids of tokens.
    positions: Places of tokens in their documents.
    documents: Numbers of the documents within a row; 0 is padding.
    sources: Number of the source of each row, [B], or of each token, [B, T];
      None where it is not known.
    rng: The generator of random numbers that draws the strangers.
  """
  B, T = tokens.shape
  flat_index = np.flatnonzero(documents > 0)
  row, column = np.divmod(flat_index, T)
  segment = documents.reshape(-1)[flat_index]
  is_same = (row[1:] == row[:-1]) & (segment[1:] == segment[:-1])
  is_start = np.concatenate([np.ones(min(len(flat_index), 1), bool), ~is_same])
  after = 1 + np.flatnonzero(is_same & (column[1:] == column[:-1] + 1))
  source = None
  if sources is not None:
    token_sources = sources if sources.ndim == 2 else sources[:, None]
    token_sources = np.broadcast_to(token_sources, (B, T)).reshape(-1)
    source = token_sources[flat_index[is_start]]
  N = len(flat_index)
  shift = rng.integers(1, N, len(after)) if N > 1 else np.zeros(0, np.int64)
  return Tokens(
    flat_index=flat_index,
    token=tokens.reshape(-1)[flat_index],
    column=column,
    position=positions.reshape(-1)[flat_index],
    document=np.cumsum(is_start) - 1,
    source=source,
    after=after,
    stranger=(after + shift) % max(N, 1),
  )


def by_gate(
  expert: Int[np.ndarray, 'N K'],
  gate: Float[np.ndarray, 'N K'],
  kept: Bool[np.ndarray, 'N K'],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The choices of each token with the largest gate first, and -1 last.

  This is the order of choices where experts choose tokens; ties go to the
  earlier entry.
  """
  key = np.where(expert >= 0, -gate, np.inf)
  order = np.argsort(key, axis=1, kind='stable')
  a, b, c = (np.take_along_axis(x, order, 1) for x in (expert, gate, kept))
  return a, b, c


def joint_counts(
  row: Int[np.ndarray, 'N'],
  column: Int[np.ndarray, 'N'],
  shape: tuple[int, int],
) -> Int[np.ndarray, 'rows columns']:
  """Counts of each pair of numbers; pairs with a -1 are left out."""
  is_counted = (row >= 0) & (column >= 0)
  pair_code = row[is_counted].astype(np.int64) * shape[1] + column[is_counted]
  return np.bincount(pair_code, minlength=shape[0] * shape[1]).reshape(shape)


def expert_counts(
  expert: Int[np.ndarray, '...'], num_experts: int
) -> Int[np.ndarray, 'E']:
  """The number of times that each expert is chosen; -1 is no choice."""
  return np.bincount(expert[expert >= 0], minlength=num_experts)


def pair_counts(
  expert: Int[np.ndarray, 'N K'], num_experts: int
) -> Int[np.ndarray, 'E E']:
  """Counts of tokens that chose both of two experts; 0 on the diagonal."""
  K = expert.shape[1]
  shape = (num_experts, num_experts)
  if K > 8:  # a product of matrices is faster than all pairs of columns
    is_chosen = np.zeros((len(expert), num_experts + 1), np.float32)
    np.put_along_axis(is_chosen, expert, 1, 1)  # -1 is the last column
    pairs = np.rint(is_chosen.T @ is_chosen).astype(np.int64)[:-1, :-1]
    return pairs - np.diag(np.diag(pairs))
  pairs = np.zeros(shape, np.int64)
  for i in range(K):
    for j in range(i + 1, K):
      pairs += joint_counts(expert[:, i], expert[:, j], shape)
  return pairs + pairs.T


class Repeats(NamedTuple):
  """The number of tokens that chose the same experts as those before them.

  Attributes:
    pairs: Number of pairs of tokens that both made a choice.
    first: Number of those whose first choices are the same expert.
    any: Number of those that have an expert in common, whatever the order.
  """

  pairs: int
  first: int
  any: int

  def __add__(self, other: 'Repeats') -> 'Repeats':
    return Repeats(*(a + b for a, b in zip(self, other)))


def repeats(
  one: Int[np.ndarray, 'P K'], other: Int[np.ndarray, 'P K']
) -> Repeats:
  """Compares the choices of P pairs of tokens, the first choice in column 0."""
  both_chose = (one[:, 0] >= 0) & (other[:, 0] >= 0)
  one, other = one[both_chose], other[both_chose]
  common = np.zeros(len(one), bool)
  for column in one.T:  # faster than a reduction over so few columns
    is_choice = column >= 0
    for other_column in other.T:
      common |= is_choice & (column == other_column)
  first = one[:, 0] == other[:, 0]
  return Repeats(len(one), int(first.sum()), int(common.sum()))


def fates(
  expert: Int[np.ndarray, 'N K'], kept: Bool[np.ndarray, 'N K']
) -> Int[np.ndarray, 'N 4']:
  """For each token 1, its choices, its drops, and whether no expert served it.

  No expert served it if none of its choices is kept, or if it has none.
  """
  chosen, served = np.zeros((2, len(expert)), np.int64)
  for experts, is_kept in zip(expert.T, kept.T, strict=True):
    chosen += experts >= 0
    served += (experts >= 0) & is_kept
  return np.stack(
    [np.ones_like(chosen), chosen, chosen - served, served == 0], 1
  )


def sums_by_part(
  values: Int[np.ndarray, 'N n'], part: Int[np.ndarray, 'N'], num_parts: int
) -> Int[np.ndarray, 'parts n']:
  """Sums of each column of values over the tokens of each part of the row."""
  sums = [np.bincount(part, column, num_parts) for column in values.T]
  return np.stack(sums, 1).astype(np.int64)


def parts_of(
  position: Num[np.ndarray, 'N'], length: int, num_parts: int
) -> Int[np.ndarray, 'N']:
  """The part of `length` places that each lies in, or else the last part."""
  part = position.astype(np.int64) * num_parts // length
  return np.clip(part, 0, num_parts - 1)


def logit_entropy(logits: Float[np.ndarray, 'N E']) -> float:
  """The entropies in nats of the softmax over experts, summed over tokens."""
  shifted = logits.astype(np.float64)
  # The floor keeps the product with a probability of 0 a number.
  shifted = np.maximum(shifted - shifted.max(1, keepdims=True), -700)
  total = np.exp(shifted).sum(1)
  return float(
    (np.log(total) - (np.exp(shifted) * shifted).sum(1) / total).sum()
  )
