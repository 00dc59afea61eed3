"""Measures of routing, as functions over arrays of choices and of counts.

The choices of N tokens are `expert`, int [N, K], with indices in [0, E), -1
where there is no choice, and the first choice in column 0; `kept`, bool [N, K],
says which choices are served. Tables count choices by label and expert.
Entropies and information are in nats.

    layers = layers_of(trace.header, trace.records('train'))
    load = expert_counts(layers[1].expert, layers[1].info.num_experts)
    share = specialisation(layers)[TOKEN][1].fraction
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, zip_longest
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Num
from scipy import special, stats

from moe_jax.analysis.traces import Header, LayerInfo, Record
from moe_jax.errors import InputError

TOKEN, POSITION, SOURCE = 'token id', 'position', 'source'
NUM_PARTS = 32  # the most parts that a row is divided into
NUM_SHUFFLES = 8
_FITTING_ROUNDS = 500  # at most

Experts = Int[np.ndarray, 'N K']
Kept = Bool[np.ndarray, 'N K']
Numbers = Int[np.ndarray, 'N']
Square = Int[np.ndarray, 'E E']
Counts = np.number | Num[np.ndarray, '*n']
Table = Int[np.ndarray, 'labels E']
Rates = Float[np.ndarray, 'n']


class Tokens(NamedTuple):
  """The N tokens of some batches that are no padding, by batch and by row.

  Attributes:
    flat_index: int [N], the index of each token among all tokens of the
      batches, padding included.
    token: int [N], the id of each token.
    column: int [N], the index of each token in its row.
    position: int [N], the position of each token in its document, from 0.
    document: int [N], the index of each token's document.
    source: int [documents], the index of each document's source of data; None
      if a record lacks sources.
    after: int [P], the indices, in [0, N), of the P tokens that have a token
      before them in their document.
    stranger: int [P], for each token of `after` the index of a random other
      token of its batch, with which it is compared instead of its predecessor.
  """

  flat_index: Int[np.ndarray, 'N']
  token: Int[np.ndarray, 'N']
  column: Int[np.ndarray, 'N']
  position: Int[np.ndarray, 'N']
  document: Int[np.ndarray, 'N']
  source: Int[np.ndarray, 'documents'] | None
  after: Int[np.ndarray, 'P']
  stranger: Int[np.ndarray, 'P']


def real_tokens(records: Sequence[Record], rng: np.random.Generator) -> Tokens:
  """The tokens of records, without padding, in the order of the records.

  All records are of the decoder's sequences, or all of the encoder's. For each
  token with a predecessor `rng` draws a token of its batch, the `stranger` with
  which `persistence` compares it to tell what chance gives.
  """
  ids, positions, documents = (
    np.concatenate([getattr(record, name) for record in records])
    for name in ('tokens', 'positions', 'documents')
  )
  flat_index = np.flatnonzero(documents > 0)
  row, column = np.divmod(flat_index, ids.shape[1])
  segment = documents.reshape(-1)[flat_index]
  is_same = (row[1:] == row[:-1]) & (segment[1:] == segment[:-1])
  is_start = np.concatenate([np.ones(min(len(flat_index), 1), bool), ~is_same])
  after = 1 + np.flatnonzero(is_same & (column[1:] == column[:-1] + 1))
  sources: list[Any] = [record.sources for record in records]
  source = None
  if all(x is not None for x in sources):
    source = np.concatenate(sources).flat[flat_index[is_start]]
  sizes = np.array([np.sum(record.documents > 0) for record in records])
  starts = np.cumsum(sizes) - sizes
  batch = np.searchsorted(starts + sizes, after, 'right')
  counts = np.bincount(batch, minlength=len(sizes))
  shift = [rng.integers(1, max(n, 2), k) for n, k in zip(sizes, counts)]
  in_batch = (after - starts[batch] + np.concatenate(shift)) % sizes[batch]
  return Tokens(
    flat_index=flat_index,
    token=ids.reshape(-1)[flat_index],
    column=column,
    position=positions.reshape(-1)[flat_index],
    document=np.cumsum(is_start) - 1,
    source=source,
    after=after,
    stranger=starts[batch] + in_batch,
  )


class Layer(NamedTuple):
  """The choices of one sparse layer in all batches of some records.

  Attributes:
    info: The description of the layer.
    header: The header of the trace that the choices are from.
    length: Number T of tokens of a row, padding included.
    tokens: The N tokens of the batches, without padding.
    expert: int [N, K], the tokens' choices before any is dropped.
    gate: float [N, K], the gates of the choices; 0 for a choice that is not
      kept.
    kept: bool [N, K], whether choices are served.
    logits: float [N, E], the router's logits; None if they are not recorded.
  """

  info: LayerInfo
  header: Header
  length: int
  tokens: Tokens
  expert: Experts
  gate: Float[np.ndarray, 'N K']
  kept: Kept
  logits: Float[np.ndarray, 'N E'] | None

  @property
  def first(self) -> Numbers:
    """The first choice of each token."""
    return self.expert[:, 0]

  @property
  def load(self) -> Int[np.ndarray, 'E']:
    """How often each expert is chosen, before any choice is dropped."""
    return expert_counts(self.expert, self.info.num_experts)

  def first_counts(self, label: Numbers, num_labels: int) -> Table:
    """Number of first choices by the label of tokens (rows) and by expert.

    `label` has the label of each token, from 0.
    """
    return joint_counts(label, self.first, (num_labels, self.info.num_experts))

  @property
  def by_token(self) -> Int[np.ndarray, 'V E']:
    """Number of first choices by token id (rows) and by expert."""
    return self.first_counts(self.tokens.token, self.header.vocab_size)


Layers = Mapping[int, Layer]


def layers_of(
  header: Header, records: Iterable[Record], seed: int = 0
) -> dict[int, Layer]:
  """Joins the choices of all records in memory, by the index of the layer.

  Args:
    header: The header of the trace.
    records: The records of the trace that are read.
    seed: Seed of the draws of `Tokens.stranger`.

  Raises:
    ValueError: There are no records.
  """
  rng, by_sequence, layers = np.random.default_rng(seed), defaultdict(list), {}
  for record in records:
    by_sequence[record.sequence].append(record)
  if not by_sequence:
    raise InputError('no records: the trace has none of this kind and steps')
  for batches in by_sequence.values():
    tokens = real_tokens(batches, rng)
    for number in batches[0].layers:
      choices = zip(*(record.layers[number] for record in batches))
      fields: Any = (
        None if x[0] is None else _stacked(x, filler)[tokens.flat_index]
        for x, filler in zip(choices, (-1, 0, False, 0))
      )
      T, info = batches[0].tokens.shape[1], header.layers[number]
      layers[number] = Layer(info, header, T, tokens, *fields)
  return dict(sorted(layers.items()))


def _stacked(batches: Sequence[np.ndarray], filler: int) -> np.ndarray:
  """Joins the batches' arrays [B, T, K] to [all tokens, K], padding included.

  Where experts choose, batches differ in K, the most choices of a token;
  `filler` stands for the choices that the tokens of a batch lack.
  """
  K = max(x.shape[-1] for x in batches)
  rows = [x.reshape(-1, x.shape[-1]) for x in batches]
  widths = [((0, 0), (0, K - x.shape[1])) for x in rows]
  return np.concatenate(
    [np.pad(x, width, constant_values=filler) for x, width in zip(rows, widths)]
  )


def joint_counts(
  row: Numbers, column: Numbers, shape: tuple[int, int]
) -> Table:
  """The table, of size `shape`, of how often each (row[n], column[n]) occurs.

  A pair in which an index is -1 is not counted.
  """
  is_counted = (row >= 0) & (column >= 0)
  pair_code = row[is_counted].astype(np.int64) * shape[1] + column[is_counted]
  return np.bincount(pair_code, minlength=shape[0] * shape[1]).reshape(shape)


def expert_counts(
  expert: Int[np.ndarray, '...'], num_experts: int
) -> Int[np.ndarray, 'E']:
  """The number of times that each expert is chosen; -1 stands for no choice."""
  return np.bincount(expert[expert >= 0], minlength=num_experts)


def pair_counts(expert: Experts, num_experts: int) -> Square:
  """The number of tokens that chose both of two experts; 0 on the diagonal."""
  shape = num_experts, num_experts
  pairs = np.zeros(shape, np.int64)
  for one, other in combinations(expert.T, 2):
    pairs += joint_counts(one, other, shape)
  return pairs + pairs.T


def expected_pairs(pairs: Square) -> Float[np.ndarray, 'E E']:
  """The pairs of experts expected if a token's choices were independent.

  Each expert is in as many pairs as before, and no token chooses an expert
  twice: the counts are w_a w_b for a != b, with the weights w that give the
  same sums of rows (quasi-independence, found by iterative proportional
  fitting). With an even load all counts are equal. A product of a row's and a
  column's sum would expect pairs of an expert with itself, and too few others.

  Args:
    pairs: Symmetric counts of pairs, 0 on the diagonal.
  """
  row_sums = pairs.sum(1).astype(np.float64)
  weight = np.sqrt(row_sums / max(row_sums.mean(), 1e-300))
  expected = np.zeros(pairs.shape)
  for _ in range(_FITTING_ROUNDS):
    expected = np.outer(weight, weight)
    np.fill_diagonal(expected, 0)
    sums = expected.sum(1)
    ratio = np.divide(row_sums, sums, out=np.ones_like(sums), where=sums > 0)
    if np.abs(ratio[row_sums > 0] - 1).max(initial=0) < 1e-9:
      break
    weight *= np.sqrt(ratio)
  return expected


def repeats(one: Experts, other: Experts) -> Int[np.ndarray, '3']:
  """Compares the choices of N pairs of tokens: row n of `one` and of `other`.

  Returns:
    The number of pairs in which both tokens made a choice; how many of these
    have the same expert as first choice; how many have an expert in common.
  """
  both_chose = (one[:, 0] >= 0) & (other[:, 0] >= 0)
  one, other = one[both_chose], other[both_chose]
  common = np.zeros(len(one), bool)
  for column in one.T:  # faster than a reduction over so few columns
    for other_column in other.T:
      common |= (column >= 0) & (column == other_column)
  first = one[:, 0] == other[:, 0]
  return np.array([len(one), first.sum(), common.sum()])


def uniform_repeats(num_experts: int, num_selected: int) -> tuple[float, float]:
  """The shares of equal choices if all sets of K experts were equally likely.

  Returns:
    The share of pairs of tokens with the same first choice, 1 / E, and the
    share with an expert in common, 1 - C(E - K, K) / C(E, K): 12.5 % and 46.4 %
    for two of eight experts, as in section 5 of arXiv:2401.04088.
  """
  E, K = num_experts, num_selected
  return 1 / E, 1 - math.comb(E - K, K) / math.comb(E, K)


def parts_of(position: Numbers, length: int, num_parts: int) -> Numbers:
  """The index of the part, such as a quarter, of a row that positions lie in.

  A row's `length` is divided evenly; later positions are in the last part.
  """
  part = position.astype(np.int64) * num_parts // length
  return np.clip(part, 0, num_parts - 1)


def drop_rates(
  expert: Experts, kept: Kept, part: Numbers | None = None, num_parts: int = 1
) -> Rates:
  """The share of choices not served, in each part of the tokens.

  `part` has the index of each token's part, such as a quarter of the row;
  without it there is one rate for all tokens. Parts without choices have NaN.
  """
  part = np.zeros(len(expert), int) if part is None else part
  chosen = expert >= 0
  dropped = np.bincount(part, (chosen & ~kept).sum(1), num_parts)
  return shares(dropped, np.bincount(part, chosen.sum(1), num_parts))


def unserved_rate(expert: Experts, kept: Kept) -> float:
  """Share of the tokens that no expert served; NaN if there are no tokens.

  No expert served a token that has no choices, or none that is kept.
  """
  served = ((expert >= 0) & kept).any(1)
  return 1 - float(served.mean()) if len(expert) else math.nan


def drop_rates_by_rank(expert: Experts, kept: Kept) -> Rates:
  """The share [K] of first choices, second ones, ... that are not served."""
  chosen = expert >= 0
  return shares((chosen & ~kept).sum(0), chosen.sum(0))


def shares(part: Counts, whole: Counts) -> Float[np.ndarray, '*n']:
  """The quotients part / whole; NaN where the whole is 0."""
  undefined = np.full(np.shape(whole), math.nan)
  return np.divide(part, whole, out=undefined, where=whole > 0)


def entropy(counts: Num[np.ndarray, '...']) -> float:
  """The entropy in nats of counts divided by their sum; 0 without counts."""
  counts = np.asarray(counts, np.float64).ravel()
  return float(stats.entropy(counts)) if counts.any() else 0.0


def load_evenness(load: Int[np.ndarray, 'E']) -> float:
  """The entropy of a load divided by ln E; 1 if it is even, NaN if E is 1."""
  most = math.log(len(load))
  return entropy(load) / most if most else math.nan


def router_evenness(logits: Float[np.ndarray, 'N E'] | None) -> float:
  """The mean entropy of tokens' softmax over the E logits, divided by ln E.

  The result is NaN without logits or tokens, or with a single expert.
  """
  if logits is None or not len(logits) or logits.shape[1] < 2:
    return math.nan
  probs = special.softmax(logits.astype(np.float64), axis=1)
  return float(special.entr(probs).sum(1).mean() / math.log(logits.shape[1]))


def mutual_information(table: Num[np.ndarray, 'labels E']) -> float:
  """The mutual information in nats of the label and the expert of a choice.

  `table` counts N choices by label and expert, and this is the plug-in estimate
  from its shares. It is too high
  by about (labels - 1) (E - 1) / (2 N) if label and expert are independent.
  """
  mutual = entropy(table.sum(0)) + entropy(table.sum(1)) - entropy(table)
  return max(mutual, 0.0)  # rounding may leave less than 0


class Information(NamedTuple):
  """How much a token's label tells about the expert that it chooses.

  Attributes:
    choices: Number of choices.
    labels: Number of labels that occur.
    entropy: Entropy of the experts, in nats.
    mutual: Mutual information of label and expert, in nats.
    shuffled: Mutual information of shuffled labels and expert, in nats,
      averaged over shuffles: what chance gives with as many choices.
    deviation: Standard deviation of `shuffled` over the shuffles.
    accuracy: Share of choices that are the most frequent expert of their label.
      The same choices tell which expert that is, so the share is optimistic.
    base_rate: Share of choices that are the most frequent expert of all.
  """

  choices: int
  labels: int
  entropy: float
  mutual: float
  shuffled: float
  deviation: float
  accuracy: float
  base_rate: float

  @property
  def net(self) -> float:
    """`mutual` less `shuffled`: the information beyond chance, in nats."""
    return self.mutual - self.shuffled

  @property
  def fraction(self) -> float:
    """`net` divided by the entropy of the experts; NaN if that entropy is 0."""
    return self.net / self.entropy if self.entropy else math.nan

  @property
  def adjusted(self) -> float:
    """The information beyond chance over the most that these counts allow.

    It is 1 if the label determines the expert, however few choices there are,
    and 0 on average if label and expert are independent; NaN where shuffled
    labels determine the expert, too. Source: the adjusted mutual information of
    Vinh, Epps and Bailey (2010) with the entropy of the experts as the upper
    bound.
    """
    maximum = self.entropy - self.shuffled
    return self.net / maximum if maximum > 1e-12 else math.nan


def information(table: Table, rng: np.random.Generator) -> Information:
  """How much labels tell about experts, against labels shuffled over choices.

  Instead of labels, random tables with the same sums of rows and columns are
  drawn; their distribution is that of tables of shuffled labels. Labels that
  neighbours share, such as the domain of a document, are better shuffled over
  documents; see `document_information`.

  Args:
    table: Number of choices of each expert with each label.
    rng: The generator of random numbers.
  """
  table = table[table.sum(1) > 0]
  table = table[:, table.sum(0) > 0]
  if min(table.shape) < 2:
    return information_of(table, [table])
  sums = table.sum(1), table.sum(0)
  draws = range(NUM_SHUFFLES)
  return information_of(
    table, (stats.random_table.rvs(*sums, random_state=rng) for _ in draws)
  )


def information_of(table: Table, shuffles: Iterable[np.ndarray]) -> Information:
  """How much labels tell about experts, against tables of shuffled labels.

  Args:
    table: Number of choices of each expert with each label.
    shuffles: Tables of the same choices with shuffled labels, one at a time.
  """
  shuffled, total = np.array([*map(mutual_information, shuffles)]), table.sum()
  best = table.max(1, initial=0).sum(), table.sum(0).max(initial=0)
  accuracy, base_rate = shares(np.array(best), np.full(2, total)).tolist()
  return Information(
    choices=int(total),
    labels=int((table.sum(1) > 0).sum()),
    entropy=entropy(table.sum(0)),
    mutual=mutual_information(table),
    shuffled=float(shuffled.mean()),
    deviation=float(shuffled.std(ddof=1)) if len(shuffled) > 1 else 0.0,
    accuracy=accuracy,
    base_rate=base_rate,
  )


def document_information(
  label: Numbers, counts: Int[np.ndarray, 'N E'], num_labels: int
) -> Information:
  """How much labels of documents, such as sources, tell about experts.

  Choices within a document are alike for many reasons. So whole documents
  exchange their labels, by the same permutations in all layers.

  Args:
    label: The label of each of N documents.
    counts: Number of choices of each expert in each document.
    num_labels: Number of labels.
  """

  def table(label: Numbers) -> Table:
    by_label = np.zeros((num_labels, counts.shape[1]), np.int64)
    np.add.at(by_label, label, counts)
    return by_label

  rng = np.random.default_rng(0)
  shuffles = (table(rng.permutation(label)) for _ in range(NUM_SHUFFLES))
  return information_of(table(label), shuffles)


# The information by the name of the label, and by the index of the layer.
ByLabel = Mapping[str, Mapping[int, Information]]


def specialisation(layers: Layers) -> dict[str, dict[int, Information]]:
  """How much labels of tokens tell about their first choices in each layer.

  Returns:
    The information, by the name of the label ('token id', 'position' in the
    document, 'source' where the trace has several) and by layer.
  """
  by_label = {TOKEN: {}, POSITION: {}, SOURCE: {}}
  for number, layer in layers.items():
    tokens, parts = layer.tokens, min(NUM_PARTS, layer.length)
    part = parts_of(tokens.position, layer.length, parts)
    positions = layer.first_counts(part, parts)
    for name, table in ((TOKEN, layer.by_token), (POSITION, positions)):
      rng = np.random.default_rng((0, number))
      by_label[name][number] = information(table, rng)
    source, num_sources = tokens.source, len(layer.header.sources)
    if source is not None and num_sources > 1 and (layer.first >= 0).any():
      counts = layer.first_counts(tokens.document, len(source))
      of_source = document_information(source, counts, num_sources)
      by_label[SOURCE][number] = of_source
  return {name: found for name, found in by_label.items() if found}


def flows(layers: Layers) -> dict[tuple[int, int], Table]:
  """Tables of first choices in two consecutive sparse layers.

  A table's rows stand for the experts that tokens choose in the earlier layer,
  its columns for those in the later layer.

  Returns:
    The tables, by the indices of the earlier and the later layer.
  """
  tables, last = {}, {}
  for number, layer in layers.items():
    sequence = layer.info.sequence
    if (before := last.get(sequence)) is not None:
      earlier = layers[before]
      table = layer.first_counts(earlier.first, earlier.info.num_experts)
      tables[before, number] = table
    last[sequence] = number
  return {numbers: table for numbers, table in tables.items() if table.any()}


def transitions(layers: Layers) -> dict[int, Information]:
  """How much a token's first choice tells about that in the next sparse layer.

  Returns:
    The information, by the index of the later of the two sparse layers.
  """
  return {
    number: information(table, np.random.default_rng((0, number)))
    for (_, number), table in flows(layers).items()
  }


class Persistence(NamedTuple):
  """The shares of tokens that chose the same experts as the token before.

  The shares are of pairs of consecutive tokens of a document. Source: section 5
  of arXiv:2401.04088.

  Attributes:
    pairs: Number of pairs.
    first: Share of pairs whose first choices are the same expert.
    first_chance: `first` for pairs of a token and a random other one of its
      batch: what these loads give if neighbours do not matter.
    first_uniform: `first_chance` if all loads were even, 1 / E.
    any: Share of pairs that have an expert in common among all choices.
    any_chance: `any` for pairs of a token and a random other one of its batch.
    any_uniform: `any_chance` if all sets of K experts were equally likely; NaN
      where experts choose tokens.
    different: `first` of the pairs whose two token ids differ.
  """

  pairs: int
  first: float
  first_chance: float
  first_uniform: float
  any: float
  any_chance: float
  any_uniform: float
  different: float


def persistence(layer: Layer) -> Persistence:
  """How often consecutive tokens choose the same experts in one layer."""
  info, tokens, expert = layer.info, layer.tokens, layer.expert
  after, before = tokens.after, tokens.after - 1
  differs = tokens.token[after] != tokens.token[before]
  own = repeats(expert[after], expert[before])
  chance = repeats(expert[after], expert[tokens.stranger])
  different = repeats(expert[after[differs]], expert[before[differs]])
  rates = [shares(x[1:], np.full(2, x[0])) for x in (own, chance, different)]
  first, common = np.array(rates).T.tolist()
  K = 1 if info.by_expert else info.num_selected
  first_uniform, any_uniform = uniform_repeats(info.num_experts, K)
  return Persistence(
    int(own[0]),
    *(*first[:2], first_uniform, *common[:2]),
    any_uniform=math.nan if info.by_expert else any_uniform,
    different=first[2],
  )


def churn(
  records: Iterable[Record], other_records: Iterable[Record]
) -> dict[int, float]:
  """Share of tokens whose first choice differs between records, by layer.

  Tokens that have a choice in neither record are left out; the share is NaN if
  no token is left.

  Args:
    records: Records at one step, or of one trace.
    other_records: Records of the same batches, in the same order, at another
      step or of another trace.

  Raises:
    ValueError: The records are not of the same batches, tokens and layers.
  """
  counts: dict[int, Any] = defaultdict(lambda: np.zeros(2, int))
  for one, other in zip_longest(records, other_records):
    if one is None or other is None or _key(one) != _key(other):
      names = [
        r and f'batch {r.batch} {r.sequence} of {r.kind!r} at step {r.step}'
        for r in (one, other)
      ]
      raise InputError(
        f'{names[0]} and {names[1]} are not of the same tokens and layers, so '
        'that their choices cannot be compared'
      )
    for number, choices in one.layers.items():
      expert, other_expert = choices.expert, other.layers[number].expert
      chose = (expert >= 0).any(-1) | (other_expert >= 0).any(-1)
      same = expert[..., 0] == other_expert[..., 0]
      real = chose & (one.documents > 0)
      counts[number] += (same & real).sum(), real.sum()
  return {n: 1 - float(shares(*counts[n])) for n in sorted(counts)}


def _key(record: Record) -> tuple[Any, ...]:
  """The batch, sequence, layers and tokens of a record.

  The choices of two records can be compared only if these are equal.
  """
  tokens = np.where(record.documents > 0, record.tokens, -1)
  return record.batch, record.sequence, {*record.layers}, tokens.tolist()
