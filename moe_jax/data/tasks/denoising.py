"""Rows of examples from windows of documents."""

import abc

import numpy as np
from jaxtyping import Integer

from moe_jax.data.examples import ExampleRows
from moe_jax.data.layouts import Example, Layout, Lengths
from moe_jax.data.shards import Shards
from moe_jax.shapes import Int


class WindowTask(abc.ABC):
  """Turns a window of text into inputs and targets.

  Attributes:
    layout: Layout of the rows.
    window: Largest number of tokens of a window whose example always fits in a
      row.
  """

  layout: Layout
  window: int

  @abc.abstractmethod
  def lengths(self, n: Int[np.ndarray, ' P']) -> Lengths:
    """The largest lengths of examples of windows of `n` tokens."""

  @abc.abstractmethod
  def __call__(
    self, window: Integer[np.ndarray, ' N'], generator: np.random.Generator
  ) -> Example:
    """One example of a window of 2 to `self.window` tokens."""


class DenoisedRows(ExampleRows):
  """Random access to rows of examples of windows, each window once.

  A window never spans documents: a document is cut into as few windows as the
  task allows, whose lengths differ by one token at most. Windows of one token
  are left out, since one side would be empty.
  """

  def __init__(
    self,
    tokens: Integer[np.ndarray, ' N'] | Shards,
    starts: Integer[np.ndarray, ' D'],
    task: WindowTask,
    *,
    pack: bool = True,
  ):
    """Wraps a stream without copying it.

    Args:
      tokens: Tokens of the documents, one after another.
      starts: Index at which each document begins, as in `PackedRows`.
      task: Function that makes an example from a window.
      pack: Whether windows of short documents share a row.
    """
    self._tokens, self._task = tokens, task
    self._bounds = windows(starts, len(tokens), task.window)
    lengths = task.lengths(self._bounds[:, 1] - self._bounds[:, 0])
    super().__init__(lengths, task.layout, pack=pack)

  def example(self, index: int, generator: np.random.Generator) -> Example:
    """The example of window `index`."""
    begin, end = self._bounds[index]
    return self._task(self._tokens[begin:end], generator)


def windows(
  starts: Integer[np.ndarray, ' D'], total: int, longest: int
) -> Int[np.ndarray, 'P 2']:
  """The begin and end of each window of at least two tokens.

  Args:
    starts: Index at which each document begins.
    total: Number of tokens of all documents.
    longest: Largest number of tokens of a window.
  """
  length = np.diff(starts, append=total)
  count = -(-length // longest)
  document = np.repeat(np.arange(len(starts)), count)
  k = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
  length, count = length[document], count[document]
  bounds = np.stack([k, k + 1], axis=1) * length[:, None] // count[:, None]
  bounds = bounds + np.asarray(starts)[document][:, None]
  return bounds[bounds[:, 1] - bounds[:, 0] > 1]
