"""Findings on each layer from the sums over a trace.

Labels, transitions, repeats, drops and gates: the numbers that tables, pictures
and studies share. Not here: the sums (`route_sums.py`), and the formulas
(`route_measures.py`).
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from moe_jax.analysis.route_labels import grouped
from moe_jax.analysis.route_measures import (
  Information,
  entropy,
  expected_pairs,
  information,
  information_of,
  uniform_repeats,
)
from moe_jax.analysis.route_sums import GATE_BINS, LayerSums, RouteSums
from moe_jax.errors import InputError

TOKEN, POSITION, SOURCE = 'token id', 'position', 'source'


def specialisation(
  sums: RouteSums,
  labels: Mapping[str, Mapping[str, str]] | None = None,
  seed: int = 0,
) -> dict[str, dict[int, Information]]:
  """The information of labels on the first choices in each layer.

  Args:
    sums: Sums over records.
    labels: Labels of sources by a name, such as 'language': a label for each
      source of the trace.
    seed: Seed of the shuffles.

  Returns:
    By the name of the labels ('token id', 'position' in the document, 'source'
    where the trace has several, then those of `labels`) and by layer.

  Raises:
    ValueError: `labels` do not fit the sources of the trace.
  """
  names = [TOKEN, POSITION]
  by_label = {
    name: {
      number: information(
        layer.tokens if name == TOKEN else layer.positions,
        np.random.default_rng((seed, number)),
      )
      for number, layer in sums.layers.items()
    }
    for name in names
  }
  sources, labels = sums.header.sources, dict(labels or {})
  if labels and not sources:
    raise InputError(
      f'labels {sorted(labels)} belong to sources, and this trace has none'
    )
  if len(sources) < 2:
    return by_label
  for name in [SOURCE, *labels]:
    mapping = {s: s for s in sources} if name == SOURCE else labels[name]
    by_label[name] = {
      number: information_of(*(grouped(t, sources, mapping)[0] for t in tables))
      for number, layer in sums.layers.items()
      if layer.documents is not None
      and (tables := layer.documents.tables())[0].any()
    }
  return {name: layers for name, layers in by_label.items() if layers}


def transitions(sums: RouteSums, seed: int = 0) -> dict[int, Information]:
  """The information of a token's first choice on that in the next sparse layer.

  Returns:
    By the number of the later of the two layers.
  """
  return {
    number: information(layer.following, np.random.default_rng((seed, number)))
    for number, layer in sums.layers.items()
    if layer.previous is not None and layer.following.any()
  }


class Findings(NamedTuple):
  """Findings that take a while, made once for tables and pictures.

  Attributes:
    sums: The sums over the records of a trace.
    labels: The information of labels on experts; see `specialisation`.
    following: The information of layers on the next; see `transitions`.
    expected: The pairs of experts by chance in each layer that has pairs; see
      `route_measures.expected_pairs`.
  """

  sums: RouteSums
  labels: dict[str, dict[int, Information]]
  following: dict[int, Information]
  expected: dict[int, Float[np.ndarray, 'E E']]


def find(
  sums: RouteSums,
  labels: Mapping[str, Mapping[str, str]] | None = None,
  seed: int = 0,
) -> Findings:
  """The findings from sums; the arguments are those of `specialisation`."""
  return Findings(
    sums,
    specialisation(sums, labels, seed),
    transitions(sums, seed),
    {
      number: expected_pairs(layer.pairs)
      for number, layer in sums.layers.items()
      if layer.pairs.any()
    },
  )


class Persistence(NamedTuple):
  """The shares of tokens that chose the same experts as those before them.

  Shares of pairs of consecutive tokens of a document. Source: section 5 of
  arXiv:2401.04088.

  Attributes:
    pairs: Number of pairs.
    first: Share whose first choices are the same expert.
    first_chance: The same for a token and a random other one of its batch: what
      these loads give if neighbours do not matter.
    first_uniform: The same with even loads, 1 / E.
    any: Share that has an expert in common among all choices.
    any_chance: The same for a token and a random other one of its batch.
    any_uniform: The same if all sets of K experts were equally likely; NaN
      where experts choose.
    different: Share whose first choices are the same expert, of the pairs of
      two different token ids.
  """

  pairs: int
  first: float
  first_chance: float
  first_uniform: float
  any: float
  any_chance: float
  any_uniform: float
  different: float


def persistence(layer: LayerSums) -> Persistence:
  """The repeats of one layer; see `Persistence`."""
  info, (pairs, first, common) = layer.info, layer.repeats
  K = 1 if info.by_expert else info.num_selected
  first_uniform, any_uniform = uniform_repeats(info.num_experts, K)
  return Persistence(
    pairs,
    _share(first, pairs),
    _share(layer.chance.first, layer.chance.pairs),
    first_uniform,
    _share(common, pairs),
    _share(layer.chance.any, layer.chance.pairs),
    math.nan if info.by_expert else any_uniform,
    _share(layer.different.first, layer.different.pairs),
  )


def drop_rates(counts: np.ndarray, num_parts: int | None = None) -> np.ndarray:
  """Dropped choices over choices, by part of the row or of the document.

  Args:
    counts: `LayerSums.by_column` or `by_position`, int [parts, 4].
    num_parts: Number of parts that these are merged into, of which the last are
      empty if there are fewer; None keeps them.

  Returns:
    float [parts]; NaN where nothing was chosen.
  """
  _, choices, drops, _ = _merged(counts, num_parts)
  return _shares(drops, choices)


def unserved_rates(
  counts: Int[np.ndarray, 'parts 4'], num_parts: int | None = None
) -> Float[np.ndarray, 'n']:
  """Share of the tokens that no expert served, by part; see `drop_rates`."""
  tokens, _, _, unserved = _merged(counts, num_parts)
  return _shares(unserved, tokens)


class Gates(NamedTuple):
  """Gates of the served choices of one layer, and how decided its router is.

  Attributes:
    means: Mean gate of first choices, second ones, and so on.
    low: The gate that 10 % of first choices stay below, to 1 / GATE_BINS.
    median: The same for 50 %.
    high: The same for 90 %.
    router_entropy: Entropy in nats of the router's softmax, averaged over
      tokens; NaN without logits.
    router_share: The share that this is of the entropy of an even softmax over
      all columns of the router; NaN without logits, or with one column.
  """

  means: tuple[float, ...]
  low: float
  median: float
  high: float
  router_entropy: float
  router_share: float


def gates(layer: LayerSums) -> Gates:
  """The gates of one layer; those above 1 count as 1 in the percentiles."""
  choices, drops = layer.by_rank.T
  ranks = int((choices > 0).sum())
  means = _shares(layer.gate_sums, choices - drops)[:ranks]
  cumulative, total = np.cumsum(layer.gates), layer.gates.sum()
  low, median, high = (
    float(np.searchsorted(cumulative, q * total) + 1) / GATE_BINS
    if total
    else math.nan
    for q in (0.1, 0.5, 0.9)
  )
  num_tokens = layer.logit_tokens
  router_entropy = layer.logit_entropy / num_tokens if num_tokens else math.nan
  most = math.log(max(layer.logit_columns, 1))
  router_share = router_entropy / most if most else math.nan
  means = tuple(map(float, means))
  return Gates(means, low, median, high, router_entropy, router_share)


def token_entropy(layer: LayerSums, ids: np.ndarray | list[int]) -> float:
  """Entropy in nats of the experts that tokens of these ids choose first.

  It is small if few experts serve them all, and at most ln E. Source: Table 14
  of arXiv:2202.08906, for sentinels.

  Raises:
    ValueError: An id is outside the vocabulary.
  """
  ids = np.asarray(ids, np.int64)
  if ids.size and not 0 <= ids.min() <= ids.max() < len(layer.tokens):
    raise InputError(
      f'ids from {ids.min()} to {ids.max()} not in [0, vocab_size='
      f'{len(layer.tokens)})'
    )
  return entropy(layer.tokens[ids].sum(0))


def _merged(counts: np.ndarray, num_parts: int | None) -> np.ndarray:
  if num_parts is not None:
    groups = np.array_split(counts, num_parts)  # the last may be empty
    counts = np.array([group.sum(0) for group in groups])
  return counts.T


def _share(part: int, whole: int) -> float:
  return part / whole if whole else math.nan


def _shares(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
  undefined = np.full(np.shape(whole), math.nan)
  return np.divide(part, whole, out=undefined, where=whole > 0)
