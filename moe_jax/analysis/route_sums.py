"""Sums of the choices in the records of a trace, layer by layer.

Records are read one at a time, so memory does not grow with their number; it
holds a table of token ids and experts for each layer. Where a token has several
choices, the first one counts, or, where experts choose tokens, the one with the
largest gate. Not here: counts of one batch (`route_counts.py`), and what the
sums say (`route_measures.py`).
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from moe_jax.analysis import route_counts
from moe_jax.analysis.route_counts import Repeats, Tokens
from moe_jax.analysis.route_labels import LabelledDocuments
from moe_jax.analysis.traces import (
  Header,
  LayerChoices,
  LayerInfo,
  Record,
)
from moe_jax.errors import InputError
from moe_jax.routing.load_summary import load_summary

NUM_PARTS = 32  # the most parts that a row is divided into
GATE_BINS = 100  # bins of equal width between 0 and 1
_TIME_BINS = 200


@dataclasses.dataclass(eq=False)
class LayerSums:
  """Sums over the choices of one sparse layer.

  Attributes:
    info: The description of the layer.
    load: [E], choices of each expert before any is dropped.
    kept: [E], served choices of each expert.
    first: [E], first choices of each expert.
    by_rank: [E, 2], choices and drops of the first choices, the second ones ...
    by_column: [parts, 4], counts by place in the row; sums of `fates`.
    by_position: [parts, 4], the same by place in the document.
    gate_sums: [E], sum of the gates of served first choices, second ones ...
    gates: [GATE_BINS], histogram of gates of served first choices.
    logit_entropy: Entropy of the router's softmax in nats, summed over tokens.
    logit_tokens: Number of these tokens; 0 where there are no logits.
    logit_columns: Number of the router's columns, which is above E where
      columns share experts or lead to none; 0 where there are no logits.
    pairs: [E, E], tokens that chose both of two experts.
    tokens: [V, E], first choices of each token id.
    positions: [parts, E], first choices by place in the document.
    documents: First choices by source; None where the trace has no sources.
    previous: Number of the sparse layer before, or None for the first.
    following: [E', E], first choices by that of the same token in `previous`.
    repeats: Comparison of each token with the one before in its document.
    different: The same for pairs of two different ids.
    chance: Comparison with random other tokens of the batch instead.
    over_time: [bins, E], load by part of the steps.
    evenness: For each batch the numbers of `load_summary`.
  """

  info: LayerInfo
  vocab_size: dataclasses.InitVar[int]
  num_sources: dataclasses.InitVar[int]
  time_bins: dataclasses.InitVar[int]
  previous: int | None = None
  previous_experts: dataclasses.InitVar[int] = 0
  logit_entropy: float = 0.0
  logit_tokens: int = 0
  logit_columns: int = 0
  repeats: Repeats = Repeats(0, 0, 0)
  different: Repeats = Repeats(0, 0, 0)
  chance: Repeats = Repeats(0, 0, 0)

  def __post_init__(
    self,
    vocab_size: int,
    num_sources: int,
    time_bins: int,
    previous_experts: int,
  ) -> None:
    E = self.info.num_experts
    zeros = lambda *shape: np.zeros(shape, np.int64)  # noqa: E731
    self.load, self.kept, self.first = zeros(E), zeros(E), zeros(E)
    self.by_rank, self.gate_sums = zeros(E, 2), np.zeros(E)
    self.gates = zeros(GATE_BINS)
    self.pairs = zeros(E, E)
    self.following = np.zeros((previous_experts, E), np.int64)
    # Memory pages of ids that do not occur are never touched.
    self.tokens = np.zeros((vocab_size, E), np.int32)
    self.over_time = zeros(time_bins, E)
    self.reset_parts(NUM_PARTS)
    self.documents = LabelledDocuments(num_sources, E) if num_sources else None
    self.evenness: list[dict[str, float]] = []

  def reset_parts(self, num_parts: int) -> None:
    """Starts the sums by place anew, with `num_parts` parts."""
    self.by_column, self.by_position = np.zeros((2, num_parts, 4), np.int64)
    self.positions = np.zeros((num_parts, self.info.num_experts), np.int64)

  def add(
    self,
    choices: LayerChoices,
    tokens: Tokens,
    part_indices: tuple[np.ndarray, np.ndarray],
    time_bin: int,
  ) -> Int[np.ndarray, 'N']:
    """Adds the choices of a batch.

    Args:
      choices: The choices.
      tokens: The batch's tokens.
      part_indices: The part of the row and that of the document of each token.
      time_bin: Number of the part of the steps.

    Returns:
      The first choice of each token.
    """
    E = self.info.num_experts
    expert, gate, kept = (
      x.reshape(-1, x.shape[-1])[tokens.flat_index] for x in choices[:3]
    )
    if self.info.by_expert:
      expert, gate, kept = route_counts.by_gate(expert, gate, kept)
    load = route_counts.expert_counts(expert, E)
    self.load += load
    self.over_time[time_bin] += load
    self.evenness.append(load_summary(load))
    self.kept += route_counts.expert_counts(expert[kept], E)
    self._add_gates(expert, gate, kept, choices.logits, tokens)
    fates = route_counts.fates(expert, kept)
    for sums, part in zip((self.by_column, self.by_position), part_indices):
      sums += route_counts.sums_by_part(fates, part, len(sums))
    self.pairs += route_counts.pair_counts(expert, E)
    first = expert[:, 0]
    self._add_first(first, tokens, part_indices[1])
    self._add_repeats(expert, tokens)
    return first

  def _add_gates(
    self,
    expert: Int[np.ndarray, 'N K'],
    gate: Float[np.ndarray, 'N K'],
    kept: Bool[np.ndarray, 'N K'],
    logits: Float[np.ndarray, 'B T E'] | None,
    tokens: Tokens,
  ) -> None:
    K, served = expert.shape[1], kept & (expert >= 0)
    self.by_rank[:K, 0] += (expert >= 0).sum(0)
    self.by_rank[:K, 1] += ((expert >= 0) & ~kept).sum(0)
    self.gate_sums[:K] += np.where(served, gate, 0).sum(0, dtype=np.float64)
    bins = (gate[:, 0][served[:, 0]] * GATE_BINS).astype(np.int64)
    bins = np.clip(bins, 0, GATE_BINS - 1)
    self.gates += np.bincount(bins, minlength=GATE_BINS)
    if logits is not None:
      token_logits = logits.reshape(-1, logits.shape[-1])[tokens.flat_index]
      self.logit_entropy += route_counts.logit_entropy(token_logits)
      self.logit_tokens += len(token_logits)
      self.logit_columns = token_logits.shape[1]

  def _add_first(
    self,
    first: Int[np.ndarray, 'N'],
    tokens: Tokens,
    part: Int[np.ndarray, 'N'],
  ) -> None:
    E, has_choice = self.info.num_experts, first >= 0
    code = tokens.token[has_choice].astype(np.int64) * E + first[has_choice]
    np.add.at(self.tokens.reshape(-1), code, np.int32(1))
    self.first += route_counts.expert_counts(first, E)
    self.positions += route_counts.joint_counts(
      part, first, self.positions.shape
    )
    if self.documents is not None and tokens.source is not None:
      shape = len(tokens.source), E
      counts = route_counts.joint_counts(tokens.document, first, shape)
      self.documents.add(tokens.source, counts)

  def _add_repeats(
    self, expert: Int[np.ndarray, 'N K'], tokens: Tokens
  ) -> None:
    current, previous = expert[tokens.after], expert[tokens.after - 1]
    ids = tokens.token
    differs = ids[tokens.after] != ids[tokens.after - 1]
    stranger = expert[tokens.stranger]
    self.repeats += route_counts.repeats(current, previous)
    self.different += route_counts.repeats(current[differs], previous[differs])
    self.chance += route_counts.repeats(current, stranger)


class RouteSums:
  """Sums over the records of a trace that are added.

  Attributes:
    header: The trace's header.
    layers: The sums of each sparse layer, by its number.
    records: Number of records that were added.
    tokens: Number of real tokens in them.
    times: The mean step of each time bin.
    length: Number of places of a row, by sequence.

  Args:
    header: The trace's header.
    steps: The steps of the records that will be added; they are the axis of
      the loads over time. Without them all time is one.
    seed: Seed of the random numbers.
  """

  def __init__(self, header: Header, steps: Sequence[int] = (), seed: int = 0):
    steps = sorted(set(steps)) or [0]
    bins = np.array_split(steps, min(len(steps), _TIME_BINS))
    self._bin_of = {int(s): i for i, part in enumerate(bins) for s in part}
    self._rng = np.random.default_rng(seed)
    self.header, self.records, self.tokens = header, 0, 0
    self.times: Float[np.ndarray, 'bins'] = np.array([s.mean() for s in bins])
    self.length: dict[str, int] = {}
    self.layers: dict[int, LayerSums] = {}
    last_layer: dict[str, int] = {}  # by sequence
    for number, info in sorted(header.layers.items()):
      earlier = last_layer.get(info.sequence)
      experts = header.layers[earlier].num_experts if earlier is not None else 0
      self.layers[number] = LayerSums(
        info,
        header.vocab_size,
        len(header.sources),
        len(bins),
        previous=earlier,
        previous_experts=experts,
      )
      last_layer[info.sequence] = number

  def add(self, record: Record) -> None:
    """Adds the choices in a batch."""
    batch = (record.tokens, record.positions, record.documents, record.sources)
    tokens = route_counts.real_tokens(*batch, self._rng)
    length = self._length_of(record)
    time_bin = self._bin_of.get(int(record.step), 0)
    firsts: dict[int | None, np.ndarray] = {}
    for number, choices in sorted(record.layers.items()):
      sums = self.layers[number]
      column, position = (
        route_counts.parts_of(positions, length, len(sums.by_column))
        for positions in (tokens.column, tokens.position)
      )
      part_indices = column, position
      first = firsts[number] = sums.add(choices, tokens, part_indices, time_bin)
      if sums.previous in firsts:
        rows, columns = sums.following.shape
        sums.following += route_counts.joint_counts(
          firsts[sums.previous], first, (rows, columns)
        )
    self.records += 1
    self.tokens += len(tokens.flat_index)

  def _length_of(self, record: Record) -> int:
    """The places of a row of the sequence; those of its first record."""
    name = record.sequence
    if name not in self.length:
      self.length[name] = T = record.tokens.shape[1]
      for layer in self.layers.values():
        if layer.info.sequence == name:
          layer.reset_parts(min(NUM_PARTS, T))
    return self.length[name]


def collect(
  header: Header,
  records: Iterable[Record],
  steps: Sequence[int] = (),
  seed: int = 0,
) -> RouteSums:
  """The sums over records; see `RouteSums` for the arguments.

  Raises:
    ValueError: There are no records.
  """
  sums = RouteSums(header, steps, seed)
  for record in records:
    sums.add(record)
  if not sums.records:
    raise InputError('no records: the trace has none of this kind and steps')
  return sums
