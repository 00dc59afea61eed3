"""First choices by labels of documents, such as their source or language.

Not here: labels of single tokens, which are tables of `route_sums.py`.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from moe_jax.analysis.route_measures import NUM_SHUFFLES
from moe_jax.errors import InputError

_BLOCK = 8192  # documents among which labels are shuffled


class LabelledDocuments:
  """First choices by the label of the document, and by shuffled labels.

  Choices within a document are alike for many reasons. Labels are therefore
  shuffled among documents, within blocks of some thousand of them.

  Args:
    num_labels: Number of labels.
    num_experts: Number E of experts.
    seed: Seed of the shuffles, equal in all layers, so that documents keep
      their shuffled labels from layer to layer.
    num_shuffles: Number n of shuffles.
  """

  def __init__(
    self,
    num_labels: int,
    num_experts: int,
    seed: int = 0,
    num_shuffles: int = NUM_SHUFFLES,
  ):
    shape = num_labels, num_experts
    self._table = np.zeros(shape, np.int64)
    self._shuffled = np.zeros((num_shuffles, *shape), np.int64)
    self._rng = np.random.default_rng(seed)
    self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
    self._count = 0

  def add(
    self,
    label: Int[np.ndarray, 'documents'],
    counts: Int[np.ndarray, 'documents E'],
  ) -> None:
    """Adds documents, each with its label and its number of choices."""
    self._waiting.append((label, counts.astype(np.int32)))
    self._count += len(label)
    if self._count >= _BLOCK:
      self._flush()

  def tables(
    self,
  ) -> tuple[Int[np.ndarray, 'labels E'], Int[np.ndarray, 'n labels E']]:
    """The counts by label, and those by shuffled labels."""
    self._flush()
    return self._table, self._shuffled

  def _flush(self) -> None:
    if not self._waiting:
      return
    labels, counts = map(np.concatenate, zip(*self._waiting, strict=True))
    self._waiting, self._count = [], 0
    np.add.at(self._table, labels, counts)
    for table in self._shuffled:
      np.add.at(table, self._rng.permutation(labels), counts)


def grouped(
  table: Int[np.ndarray, '*n rows E'],
  names: Sequence[str],
  labels: Mapping[str, str],
) -> tuple[Int[np.ndarray, '*n labels E'], list[str]]:
  """Sums of rows that share a label, such as sources of one language.

  Args:
    table: Counts with a row for each name; dimensions before it are kept.
    names: Names of the rows.
    labels: The label of each name.

  Returns:
    The summed table, and the names of its rows, in order.

  Raises:
    ValueError: A name has no label, or a label is given to no name.
  """
  if set(labels) != set(names):
    raise InputError(
      f'labels are given to {sorted(labels)}, but the sources are '
      f'{sorted(names)}; each needs one'
    )
  kinds = sorted(set(labels.values()))
  members = np.array([[labels[n] == kind for n in names] for kind in kinds])
  return np.einsum('kr,...re->...ke', members.astype(table.dtype), table), kinds


def read_labels(text: str) -> tuple[str, dict[str, str]]:
  """Reads labels of sources that are written as NAME=SOURCE:LABEL,...

  Returns:
    The name of the labels, such as 'language', and the label of each source.

  Raises:
    ValueError: The text is not of this form, or names a source twice.
  """
  name, equals, rest = text.partition('=')
  pairs = [pair.rpartition(':') for pair in rest.split(',')]
  labels = {source: label for source, _, label in pairs}
  if not (name and equals and all(map(all, pairs))):
    raise InputError(
      f'labels {text!r} are not of the form NAME=SOURCE:LABEL,SOURCE:LABEL,...'
    )
  if len(labels) < len(pairs):
    raise InputError(f'labels {text!r} name a source twice')
  return name, labels
