"""Language modelling: predict each next token, or the rest of a text.

Prefix language modelling gives the beginning of a text, as in
T5 (https://arxiv.org/abs/1910.10683), section 3.3.1; with a mode token, the
S-denoiser of UL2 (https://arxiv.org/abs/2205.05131).
"""

import dataclasses
import functools

import numpy as np

from moe_jax.data.examples import DenoisedRows, WindowTask
from moe_jax.data.layouts import (
  Counts,
  Example,
  Layout,
  Lengths,
  RowShape,
  Window,
)
from moe_jax.data.packing import PackedRows, Rows
from moe_jax.data.store import Stream
from moe_jax.data.tasks.contract import TaskOptions
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.data.tokenizers.extra_ids import extend
from moe_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class LmTask(TaskOptions):
  """Predicts each next token of documents, with a decoder-only model."""

  label = ''
  makes_examples = False
  answers_go_on = True

  def rows(self, stream: Stream, tokenizer: Tokenizer, shape: RowShape) -> Rows:
    """Packs all documents of the stream into rows, one after another."""
    del tokenizer
    return PackedRows(*stream, shape.seq_len)


@dataclasses.dataclass(frozen=True)
class PrefixLmTask(TaskOptions):
  """Prefix language modelling: predicts the second part of windows of text."""

  label = 'prefix_lm'
  generates = True
  answers_go_on = True

  def vocabulary(self, base: Tokenizer, shape: RowShape) -> Tokenizer:
    """The tokenizer with an EOS, which ends inputs only for an encoder."""
    return extend(base, end_inputs=shape.encoder_decoder)

  def rows(self, stream: Stream, tokenizer: Tokenizer, shape: RowShape) -> Rows:
    """Rows of examples, one example of each window of the documents."""
    eos_id = tokenizer.eos_id if shape.encoder_decoder else None
    windows = PrefixLM(shape.layout(tokenizer.start_id), eos_id=eos_id)
    return DenoisedRows(*stream, windows, pack=shape.pack)


@dataclasses.dataclass(frozen=True)
class PrefixLM(WindowTask):
  """Windows of text, split in two at a position drawn anew each time.

  The targets end in an EOS only where the document does; a window from the
  middle of a document has no end to predict.

  Attributes:
    layout: Layout of the rows.
    density: Mean share of the window that is predicted, as far as the row's
      lengths allow. The length is uniform in a range around the mean; at 0.5
      every split is equally likely.
    eos_id: Id that ends the inputs, as in T5's encoder; None adds none, so that
      a decoder's text continues.
    mode_id: Id that is put before the inputs (UL2); None puts none.
  """

  layout: Layout
  density: float = 0.5
  eos_id: int | None = None
  mode_id: int | None = None

  @functools.cached_property
  def window(self) -> int:
    """The largest number of tokens of a window whose example fits in a row.

    Such a window leaves some padding in the row of an encoder-decoder, as a
    window that fills both sides has only one possible split.

    Raises:
      ValueError: A row has no room.
    """
    sizes = np.arange(2, self.layout.longest_text + 1)
    shortest, longest = self.suffixes(sizes)
    fits = (shortest <= longest) & self.layout.fits(self.lengths(sizes))
    if not fits.any():
      rows = self.layout.describe()
      raise InputError(f'rows of {rows} are too short for a prefix LM')
    return int(sizes[fits][-1])

  def suffixes(self, n: Counts) -> tuple[Counts, Counts]:
    """The fewest and most targets of windows of `n` > 1 tokens."""
    room = self.layout.max_inputs - self._marks
    shortest = np.maximum(n - room, 1)
    around_mean = (2 * self.density * n).astype(np.int64) - shortest
    return shortest, np.minimum(
      np.minimum(n - 1, self.layout.max_targets),
      np.maximum(around_mean, shortest),
    )

  def lengths(self, n: Counts) -> Lengths:
    """The largest lengths of examples of windows of `n` tokens."""
    shortest, longest = self.suffixes(n)
    inputs = n - shortest + self._marks
    return Lengths(inputs, longest, n + self._marks)

  def __call__(self, window: Window, generator: np.random.Generator) -> Example:
    """One example of the window."""
    (shortest,), (longest,) = self.suffixes(np.array([len(window)]))
    split = len(window) - generator.integers(shortest, longest, endpoint=True)
    marks = self.mode_id, self.eos_id
    mode, eos = ([] if mark is None else [mark] for mark in marks)
    inputs = np.concatenate([mode, window[:split], eos])
    return Example(inputs.astype(np.int32), window[split:].astype(np.int32))

  @property
  def _marks(self) -> int:
    return (self.mode_id is not None) + (self.eos_id is not None)
