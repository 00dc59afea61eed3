"""Measures of routing, as functions over arrays of choices and of counts.

The choices of N tokens are `expert`, int [N, K], with numbers in [0, E), -1
where there is none, and the first choice in column 0; `kept`, bool [N, K], says
which of them are served. Tables count choices by label and expert. Entropies
and information are in nats.

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
from scipy import special
from scipy.stats import random_table

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
Table = Int[np.ndarray, 'labels E']
Rates = Float[np.ndarray, 'n']


class Tokens(NamedTuple):
  """N real tokens, batch after batch and row after row, and who follows whom.

  Attributes:
    flat_index: int [N], the index of each token among those of all batches.
    token: int [N], its id.
    column: int [N], its place in its row, from 0.
    position: int [N], its place in its document, from 0.
    document: int [N], the number of its document, from 0.
    source: int [documents], the source of each document, or None.
    after: int [P], the numbers, of N, of tokens whose document goes on from the
      token before them.
    stranger: int [P], for each of these a random other token of its batch,
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


def real_tokens(records: Sequence[Record], rng: np.random.Generator) -> Tokens:
  """The real tokens of batches of one sequence; `rng` draws the strangers."""
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
  if not any(x is None for x in sources):
    source = np.concatenate(sources).reshape(-1)[flat_index[is_start]]
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
  """The choices of one sparse layer in all batches.

  Attributes:
    info: The description of the layer.
    header: The header of its trace.
    length: Number T of places of a row.
    tokens: The N tokens.
    expert: int [N, K], their choices before any is dropped.
    gate: float [N, K], the weights; 0 where a choice is not kept.
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
    """Choices of each expert before any is dropped."""
    return expert_counts(self.expert, self.info.num_experts)

  def first_counts(self, label: Numbers, num_labels: int) -> Table:
    """The table of first choices by a label of each token."""
    return joint_counts(label, self.first, (num_labels, self.info.num_experts))

  @property
  def by_token(self) -> Int[np.ndarray, 'V E']:
    """First choices by token id."""
    return self.first_counts(self.tokens.token, self.header.vocab_size)


Layers = Mapping[int, Layer]


def layers_of(
  header: Header, records: Iterable[Record], seed: int = 0
) -> dict[int, Layer]:
  """The choices in records, in memory, by the number of the layer.

  Args:
    header: The header of the trace.
    records: Its records.
    seed: Seed of the draws of random other tokens.

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
  """The choices of all tokens of batches, of which some may have more."""
  K = max(x.shape[-1] for x in batches)
  rows = [x.reshape(-1, x.shape[-1]) for x in batches]
  more = [((0, 0), (0, K - x.shape[1])) for x in rows]
  padded = [np.pad(x, n, constant_values=filler) for x, n in zip(rows, more)]
  return np.concatenate(padded)


def joint_counts(
  row: Numbers, column: Numbers, shape: tuple[int, int]
) -> Table:
  """Counts of each pair of numbers; pairs with a -1 are left out."""
  is_counted = (row >= 0) & (column >= 0)
  pair_code = row[is_counted].astype(np.int64) * shape[1] + column[is_counted]
  return np.bincount(pair_code, minlength=shape[0] * shape[1]).reshape(shape)


def expert_counts(
  expert: Int[np.ndarray, '...'], num_experts: int
) -> Int[np.ndarray, 'E']:
  """The number of times that each expert is chosen; -1 is no choice."""
  return np.bincount(expert[expert >= 0], minlength=num_experts)


def pair_counts(expert: Experts, num_experts: int) -> Square:
  """Counts of tokens that chose both of two experts; 0 on the diagonal."""
  shape = num_experts, num_experts
  pairs = np.zeros(shape, np.int64)
  for one, other in combinations(expert.T, 2):
    pairs += joint_counts(one, other, shape)
  return pairs + pairs.T


def expected_pairs(pairs: Square) -> Float[np.ndarray, 'E E']:
  """The pairs that tokens would choose if partners did not matter.

  Each expert keeps its number of partners, and no token chooses an expert
  twice: the counts are w_a w_b for a != b, with the w that give the same sums
  of rows (quasi-independence, found by iterative proportional fitting). With an
  even load they are all equal. Without the second condition even random choices
  would seem to avoid each other.

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


def repeats(
  one: Int[np.ndarray, 'P K'], other: Int[np.ndarray, 'P K']
) -> Int[np.ndarray, '3']:
  """Compares the choices of P pairs of tokens.

  Returns:
    The number of pairs of which both made a choice, that of those whose first
    choices are the same expert, and that of those with an expert in common.
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
  """The shares of repeats if all sets of experts were equally likely.

  Returns:
    The share of pairs of tokens with the same first choice, 1 / E, and that of
    pairs with an expert in common, 1 - C(E - K, K) / C(E, K): 12.5 % and 46.4 %
    for two of eight experts, as in section 5 of arXiv:2401.04088.
  """
  E, K = num_experts, num_selected
  return 1 / E, 1 - math.comb(E - K, K) / math.comb(E, K)


def parts_of(position: Numbers, length: int, num_parts: int) -> Numbers:
  """The part of `length` places that each lies in, or else the last part."""
  part = position.astype(np.int64) * num_parts // length
  return np.clip(part, 0, num_parts - 1)


def drop_rates(
  expert: Experts, kept: Kept, part: Numbers | None = None, num_parts: int = 1
) -> Rates:
  """Choices that are not served over choices, by a part of each token.

  Without parts, there is one rate. NaN where nothing was chosen.
  """
  part = np.zeros(len(expert), int) if part is None else part
  chosen = expert >= 0
  dropped = np.bincount(part, (chosen & ~kept).sum(1), num_parts)
  return shares(dropped, np.bincount(part, chosen.sum(1), num_parts))


def unserved_rate(expert: Experts, kept: Kept) -> float:
  """Share of the tokens that no expert served; NaN if there are no tokens.

  No expert served a token if none of its choices is kept, or if it has none.
  """
  served = ((expert >= 0) & kept).any(1)
  return 1 - float(served.mean()) if len(expert) else math.nan


def drop_rates_by_rank(expert: Experts, kept: Kept) -> Rates:
  """Share of first choices that are not served, of second ones, and so on."""
  chosen = expert >= 0
  return shares((chosen & ~kept).sum(0), chosen.sum(0))


def shares(
  part: np.number | Num[np.ndarray, '*n'],
  whole: np.number | Num[np.ndarray, '*n'],
) -> Float[np.ndarray, '*n']:
  """Quotients; NaN where the whole is 0."""
  undefined = np.full(np.shape(whole), math.nan)
  return np.divide(part, whole, out=undefined, where=whole > 0)


def entropy(counts: Num[np.ndarray, '...']) -> float:
  """The entropy in nats of the distribution that counts have, 0 for none."""
  counts = np.asarray(counts)
  counts = counts[counts > 0].astype(np.float64)
  if not counts.size:
    return 0.0
  total = counts.sum()
  return max(float(np.log(total) - counts @ np.log(counts) / total), 0.0)


def load_evenness(load: Int[np.ndarray, 'E']) -> float:
  """The entropy of a load over ln E: 1 if all experts are chosen equally."""
  most = math.log(len(load))
  return entropy(load) / most if most else math.nan


def router_evenness(logits: Float[np.ndarray, 'N E'] | None) -> float:
  """The entropy of the softmax over columns, a mean over tokens, over its most.

  NaN without logits, or with one column.
  """
  if logits is None or not len(logits) or logits.shape[1] < 2:
    return math.nan
  probs = special.softmax(logits.astype(np.float64), axis=1)
  return float(special.entr(probs).sum(1).mean() / math.log(logits.shape[1]))


def mutual_information(table: Num[np.ndarray, 'labels E']) -> float:
  """The mutual information in nats of the label and the expert of a choice.

  It is estimated from the shares of counts alone, so that it is too high by
  about (labels - 1) (E - 1) / (2 N) if the two are independent.
  """
  mutual = entropy(table.sum(0)) + entropy(table.sum(1)) - entropy(table)
  return max(mutual, 0.0)  # rounding may leave less than 0


class Information(NamedTuple):
  """The information of a label on the expert that is chosen.

  Attributes:
    choices: Number of choices.
    labels: Number of labels that occur.
    entropy: Entropy of the experts, in nats.
    mutual: Mutual information of label and expert, in nats.
    shuffled: The same of shuffled labels, averaged over shuffles: what chance
      gives with as many choices.
    deviation: The standard deviation over shuffles.
    accuracy: Share of choices that are the most frequent expert of their label,
      counted on the choices that made it the most frequent.
    base_rate: Share of choices of the most frequent expert of all.
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
    """Mutual information less that of shuffled labels, in nats."""
    return self.mutual - self.shuffled

  @property
  def fraction(self) -> float:
    """`net` as a fraction of the entropy of the experts; NaN if that is 0."""
    return self.net / self.entropy if self.entropy else math.nan

  @property
  def adjusted(self) -> float:
    """`net` as a fraction of the most that it can be with these counts.

    It is 1 if the label determines the expert, however few choices there are,
    and 0 on average if the two are independent; NaN where nothing is left to
    say. Source: the adjusted mutual information of Vinh, Epps and Bailey (2010)
    with the entropy of the experts as the upper bound.
    """
    maximum = self.entropy - self.shuffled
    return self.net / maximum if maximum > 1e-12 else math.nan


def information(table: Table, rng: np.random.Generator) -> Information:
  """The information of labels on experts; labels are shuffled by choice.

  A table with the same sums of rows and columns is drawn at random, which is
  exactly the table of shuffled labels. Labels that neighbours share, such as
  the domain of a document, are better shuffled over documents; see
  `document_information`.

  Args:
    table: Number of choices of each expert with each label.
    rng: The generator of random numbers.
  """
  table = table[table.sum(1) > 0]
  table = table[:, table.sum(0) > 0]
  shuffles: Iterable[np.ndarray] = [table]
  if min(table.shape, default=0) > 1:
    rows, columns = table.sum(1), table.sum(0)
    shuffles = (
      random_table.rvs(rows, columns, random_state=rng)
      for _ in range(NUM_SHUFFLES)
    )
  return information_of(table, shuffles)


def information_of(table: Table, shuffles: Iterable[np.ndarray]) -> Information:
  """The information of labels on experts, and that of shuffled tables.

  Args:
    table: Number of choices of each expert with each label.
    shuffles: Such tables with shuffled labels, one at a time.
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
  label: Int[np.ndarray, 'documents'],
  counts: Int[np.ndarray, 'documents E'],
  num_labels: int,
) -> Information:
  """The information of labels of documents, such as sources, on experts.

  Choices within a document are alike for many reasons. Labels are therefore
  shuffled among documents, and equally in all layers.

  Args:
    label: The label of each document.
    counts: Number of choices of each expert in each document.
    num_labels: Number of labels.
  """

  def table(label: Int[np.ndarray, 'documents']) -> Table:
    by_label = np.zeros((num_labels, counts.shape[1]), np.int64)
    np.add.at(by_label, label, counts)
    return by_label

  rng = np.random.default_rng(0)
  shuffles = (table(rng.permutation(label)) for _ in range(NUM_SHUFFLES))
  return information_of(table(label), shuffles)


# By the name of a label and by the number of a layer.
ByLabel = Mapping[str, Mapping[int, Information]]


def specialisation(layers: Layers) -> dict[str, dict[int, Information]]:
  """The information of labels on the first choices in each layer.

  Returns:
    By the name of the labels ('token id', 'position' in the document, 'source'
    where the trace has several) and by layer.
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
      found = document_information(source, counts, num_sources)
      by_label[SOURCE][number] = found
  return {name: found for name, found in by_label.items() if found}


def flows(layers: Layers) -> dict[tuple[int, int], Table]:
  """First choices by that of the same token in the sparse layer before.

  Returns:
    The tables, by the numbers of the two layers.
  """
  tables, last = {}, {}
  for number, layer in layers.items():
    sequence = layer.info.sequence
    if (before := last.get(sequence)) is not None:
      num_experts = layers[before].info.num_experts
      table = layer.first_counts(layers[before].first, num_experts)
      if table.any():
        tables[before, number] = table
    last[sequence] = number
  return tables


def transitions(layers: Layers) -> dict[int, Information]:
  """The information of a token's first choice on that in the next sparse layer.

  Returns:
    By the number of the later of the two layers.
  """
  return {
    number: information(table, np.random.default_rng((0, number)))
    for (_, number), table in flows(layers).items()
  }


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


def persistence(layer: Layer) -> Persistence:
  """The repeats of one layer."""
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
  """Share of tokens whose first choice is another expert, by layer.

  Tokens that made no choice in either are left out; NaN if none is left.

  Args:
    records: Records at one step, or of one trace.
    other_records: Records of the same batches, in the same order.

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
  """What two records have to share so that their choices can be compared."""
  tokens = np.where(record.documents > 0, record.tokens, -1)
  return record.batch, record.sequence, {*record.layers}, tokens.tolist()
