"""Ratios and losses by seed, bounds of a row's numbers, tables in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moe_jax.analysis.intervals import Bounds


def bounds_of(row: Mapping[str, Any], column: Mapping[str, Any]) -> Bounds:
  """The bounds of a stored row's numbers; None for a row of differences."""
  return None if row.get('difference') else column.get('bounds')


def ratios(values: np.ndarray, base: np.ndarray) -> np.ndarray:
  """Ratios by seed, whose mean is the mean of `values` over that of `base`.

  To first order the ratios vary with both inputs, so that the interval of their
  mean is that of the ratio of means (the delta method).
  """
  ratio = values.mean() / base.mean()
  return ratio + (values - ratio * base) / base.mean()


def at_length(
  length: ArrayLike, lengths: Sequence[float], losses: Sequence[Sequence[float]]
) -> list[float]:
  """The losses by seed that training of another length would have.

  The loss is interpolated by the logarithm of the length; a length beyond the
  known ones counts as the nearest.

  Args:
    length: The length, of each seed or of all.
    lengths: The known lengths, ascending.
    losses: The losses by seed at each of them.
  """
  by_seed = np.transpose(losses)
  logs = np.log(np.resize(length, len(by_seed)))
  known = np.log(lengths)
  return [float(np.interp(x, known, y)) for x, y in zip(logs, by_seed)]


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
  """A table in GitHub's Markdown; its headings are the first row's keys."""
  headings = list(rows[0])
  lines = [headings, ['---'] * len(headings)]
  lines += [[row[h] for h in headings] for row in rows]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n'
