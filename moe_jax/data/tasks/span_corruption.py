"""Span corruption: predict the spans that were cut out of a text.

T5 (https://arxiv.org/abs/1910.10683), sections 3.1.4 and 3.3.4.
"""

import dataclasses
import functools
from typing import cast

import numpy as np
from jaxtyping import Integer

from moe_jax.config import option
from moe_jax.data.examples import DenoisedRows, WindowTask
from moe_jax.data.layouts import (
  Counts,
  Example,
  Layout,
  Lengths,
  RowShape,
  Window,
)
from moe_jax.data.packing import Rows
from moe_jax.data.store import Stream
from moe_jax.data.tasks.contract import TaskOptions
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.data.tokenizers.extra_ids import extend
from moe_jax.errors import InputError
from moe_jax.shapes import Bool


@dataclasses.dataclass(frozen=True)
class SpanCorruptionTask(TaskOptions):
  """Windows of text; spans that are cut out of them are predicted."""

  label = 'span_corruption'

  noise_density: float = option(
    0.15,
    'Share of the tokens of a window of text that is cut out, in spans.',
    above=0,
    below=1,
  )
  mean_noise_span: float = option(
    3.0,
    'Mean number of tokens of a span that is cut out of a window of text.',
    minimum=1,
  )
  num_sentinels: int = option(
    100,
    'Number of sentinels, the ids that stand for cut-out spans; those that the '
    'tokenizer lacks are added after its last id. With 0 there are only those '
    'that the tokenizer has.',
    minimum=0,
  )
  final_sentinel: bool = option(
    True,
    'Whether the targets end in one more sentinel before the EOS, as in figure '
    '2 of T5; its released checkpoints have only the EOS.',
  )

  def vocabulary(self, base: Tokenizer, shape: RowShape) -> Tokenizer:
    """The tokenizer with an EOS and sentinels."""
    del shape
    return extend(base, num_sentinels=self.num_sentinels, end_inputs=True)

  def rows(self, stream: Stream, tokenizer: Tokenizer, shape: RowShape) -> Rows:
    """Rows of examples, one example of each window of the documents."""
    windows = SpanCorruption(
      shape.layout(tokenizer.start_id),
      tokenizer.sentinel_ids[: self.num_sentinels],
      cast(int, tokenizer.eos_id),
      self.noise_density,
      self.mean_noise_span,
      self.final_sentinel,
    )
    return DenoisedRows(*stream, windows, pack=shape.pack)


@dataclasses.dataclass(frozen=True)
class SpanCorruption(WindowTask):
  """Inputs with sentinels for spans of a window, and targets with the spans.

  The window `a b c d e f` with `b` and `d e` cut out becomes the inputs
  `a <0> c <1> f <eos>` and the targets `<0> b <1> d e <2> <eos>`.

  Attributes:
    layout: Layout of the rows.
    sentinels: Ids of the sentinels, in the order in which they are used.
    eos_id: Id that ends both sides.
    density: Share of a window that is cut out.
    mean_span: Mean number of tokens of a span.
    final_sentinel: Whether the targets end in one more sentinel.
    mode_id: Id that is put before the inputs (UL2); None puts none.
  """

  layout: Layout
  sentinels: tuple[int, ...]
  eos_id: int
  density: float = 0.15
  mean_span: float = 3.0
  final_sentinel: bool = True
  mode_id: int | None = None

  @functools.cached_property
  def window(self) -> int:
    """The largest number of tokens of a window whose example fits in a row.

    Raises:
      ValueError: A row has no room for an example, or there are too few
        sentinels.
    """
    # Every token of a window is in the inputs or in the targets.
    sizes = np.arange(1, self.layout.max_inputs + self.layout.max_targets + 1)
    window = int(self.layout.fits(self.lengths(sizes)).sum())
    if window < 2:
      rows = self.layout.describe()
      raise InputError(f'rows of {rows} are too short for span corruption')
    _, spans = noise_counts(np.array([window]), self.density, self.mean_span)
    num_needed = int(spans[0]) + self.final_sentinel
    if num_needed > len(self.sentinels):
      raise InputError(
        f'num_sentinels={len(self.sentinels)} is below the {num_needed} that a '
        f'window of {window} tokens needs at noise_density={self.density} and '
        f'mean_noise_span={self.mean_span}'
      )
    return window

  def lengths(self, n: Counts) -> Lengths:
    """The lengths of examples of windows of `n` tokens; none falls with `n`."""
    noise, spans = noise_counts(n, self.density, self.mean_span)
    inputs = n - noise + spans + 1 + (self.mode_id is not None)
    targets = noise + spans + 1 + self.final_sentinel
    return Lengths(inputs, targets, inputs + targets)

  def __call__(self, window: Window, generator: np.random.Generator) -> Example:
    """One example of the window, whose own EOS at its end is left out."""
    if window[-1] == self.eos_id and len(window) > 1:
      window = window[:-1]
    mask = noise_mask(len(window), generator, self.density, self.mean_span)
    sentinels = np.array(self.sentinels, np.int32)
    inputs, targets = corrupt(window, mask, sentinels)
    last = [] if not self.final_sentinel else [sentinels[_begins(mask).sum()]]
    mode = [] if self.mode_id is None else [self.mode_id]
    return Example(
      np.concatenate([mode, inputs, [self.eos_id]]).astype(np.int32),
      np.concatenate([targets, last, [self.eos_id]]).astype(np.int32),
    )


def noise_counts(
  n: Counts, density: float, mean_span: float
) -> tuple[Counts, Counts]:
  """The numbers of tokens and of spans that are cut out of `n` tokens.

  At least one token is cut out and, if `n` > 1, at least one is kept. At least
  one kept token lies between two spans.
  """
  noise = np.clip(np.round(n * density), 1, np.maximum(n - 1, 1))
  most = np.minimum(noise, n - noise + 1)
  spans = np.clip(np.round(noise / mean_span), 1, most)
  return noise.astype(np.int64), spans.astype(np.int64)


def noise_mask(
  n: int, generator: np.random.Generator, density: float, mean_span: float
) -> Bool[np.ndarray, ' n']:
  """A mask that is True for tokens that are cut out.

  The numbers of cut-out tokens and of spans are those of `noise_counts`; all
  such masks are equally likely. Unlike in T5's code, a window need not begin
  with a kept token, nor end with a span.
  """
  counts = noise_counts(np.array([n]), density, mean_span)
  noise, spans = (int(count[0]) for count in counts)
  noise_lengths = _random_partition(noise, spans, generator)
  # The first and the last stretch of kept tokens may be empty.
  kept_lengths = _random_partition(n - noise + 2, spans + 1, generator)
  kept_lengths[[0, -1]] -= 1
  lengths = np.zeros(2 * spans + 1, np.int64)
  lengths[0::2], lengths[1::2] = kept_lengths, noise_lengths
  return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)


def corrupt(
  window: Window,
  mask: Bool[np.ndarray, ' N'],
  sentinels: Integer[np.ndarray, ' S'],
) -> tuple[Integer[np.ndarray, ' I'], Integer[np.ndarray, ' J']]:
  """The kept tokens and the tokens that are cut out, with sentinels.

  A sentinel replaces each span among the kept tokens, and precedes the span's
  tokens among the tokens that are cut out.
  """
  begins = _begins(mask)
  marks = sentinels[np.maximum(np.cumsum(begins) - 1, 0)]
  # For every token a sentinel and the token itself, from which masks choose.
  pairs = np.stack([marks, window], axis=1)
  inputs = pairs[np.stack([begins, ~mask], axis=1)]
  targets = pairs[np.stack([begins, mask], axis=1)]
  return inputs, targets


def _begins(mask: np.ndarray) -> np.ndarray:
  """A mask that is True at the first token of each span."""
  return mask & ~np.append(False, mask[:-1])


def _random_partition(total: int, count: int, generator: np.random.Generator):
  """`count` positive numbers of sum `total`, every choice equally likely."""
  cuts = generator.choice(total - 1, count - 1, replace=False)
  return np.diff(np.sort(cuts) + 1, prepend=0, append=total)
