"""Tasks on texts: language modelling, and windows of text to be denoised.

In prefix language modelling a model predicts how a text goes on: T5, section
3.3.1 (https://arxiv.org/abs/1910.10683). In span corruption it predicts spans
that are cut out of a text: T5, sections 3.1.4 and 3.3.4. UL2 mixes both, with a
token for the mode before the inputs (https://arxiv.org/abs/2205.05131).
"""

import abc
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from jaxtyping import Integer

from moe_jax.config import option, unknown_text
from moe_jax.data.contracts import TaskOptions
from moe_jax.data.layouts import (
  Counts,
  Example,
  Layout,
  Lengths,
  RowShape,
  Window,
)
from moe_jax.data.packing import ExampleRows, PackedRows, Rows
from moe_jax.data.store import Stream
from moe_jax.data.tokenizers import Extended, Tokenizer
from moe_jax.data.tokenizers.extra_ids import extend, mode_name
from moe_jax.errors import InputError
from moe_jax.shapes import Bool, Int

MODES = ('R', 'S', 'X')
Denoiser = tuple[str, float, float, float]
# The denoisers of table 1 of UL2 (arXiv:2205.05131), each with its mode, mean
# span (0: a prefix), density and weight, as in `Ul2Task.denoisers`.
DENOISERS: tuple[Denoiser, ...] = (
  ('R', 3.0, 0.15, 1.0),
  ('R', 8.0, 0.15, 1.0),
  ('S', 0.0, 0.25, 1.0),
  ('X', 3.0, 0.5, 1.0),
  ('X', 8.0, 0.5, 1.0),
  ('X', 64.0, 0.15, 1.0),
  ('X', 64.0, 0.5, 1.0),
)
# `SpanCorruptionTask` and `Ul2Task` have the same two options.
_NUM_SENTINELS: Any = option(
  100,
  'Number of sentinels, the ids that stand for cut-out spans; those that the '
  'tokenizer lacks are added after its last id. With 0 there are only those '
  'that the tokenizer has.',
  minimum=0,
)
_FINAL_SENTINEL: Any = option(
  True,
  'Whether the targets of cut-out spans end in one more sentinel before the '
  'EOS, as in figure 2 of T5; its released checkpoints have only the EOS.',
)


@dataclasses.dataclass(frozen=True)
class LmTask(TaskOptions):
  """Predicts each next token of documents, with a decoder-only model."""

  label = ''
  makes_examples = False
  answers_go_on = True

  def rows(self, stream: Stream, tokenizer: Tokenizer, shape: RowShape) -> Rows:
    """Packs all documents of the stream into rows, one after another."""
    return PackedRows(*stream, shape.seq_len)


class WindowTask(abc.ABC):
  """Turns a window, which is consecutive tokens of a document, into an example.

  Attributes:
    layout: Layout of the rows.
    window: Largest number of tokens of a window whose example always fits in a
      row.
  """

  layout: Layout
  window: int

  @abc.abstractmethod
  def lengths(self, n: Counts) -> Lengths:
    """The largest lengths of examples that P windows of `n` tokens give."""

  @abc.abstractmethod
  def __call__(self, window: Window, generator: np.random.Generator) -> Example:
    """One example of a window of 2 to `self.window` tokens."""


class DenoisedRows(ExampleRows):
  """Random access to rows of examples, one example of each window of a text.

  A window never spans documents: a document is cut into as few windows as the
  task allows, whose lengths differ by one token at most. Windows of one token
  are left out, since one side would be empty.
  """

  def __init__(self, stream: Stream, task: WindowTask, *, pack: bool = True):
    """Wraps tokens and where each document begins, without copying them.

    With `pack`, examples of short windows share a row.
    """
    (self._tokens, starts), self._task = stream, task
    self._bounds = windows(starts, len(self._tokens), task.window)
    lengths = task.lengths(self._bounds[:, 1] - self._bounds[:, 0])
    super().__init__(lengths, task.layout, pack=pack)

  def example(self, index: int, generator: np.random.Generator) -> Example:
    begin, end = self._bounds[index]
    return self._task(self._tokens[begin:end], generator)


def windows(
  starts: Integer[np.ndarray, ' D'], total: int, longest: int
) -> Int[np.ndarray, 'P 2']:
  """The begin and end of P windows, of 2 to `longest` tokens of a document.

  Documents begin at `starts` and have `total` tokens in all. Each is cut into
  as few windows as possible, of nearly equal lengths.
  """
  length = np.diff(starts, append=total)
  count = -(-length // longest)
  document = np.repeat(np.arange(len(starts)), count)
  k = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
  length, count = length[document], count[document]
  bounds = np.stack([k, k + 1], axis=1) * length[:, None] // count[:, None]
  bounds = bounds + np.asarray(starts)[document][:, None]
  return bounds[bounds[:, 1] - bounds[:, 0] > 1]


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
    return DenoisedRows(stream, windows, pack=shape.pack)


@dataclasses.dataclass(frozen=True)
class PrefixLM(WindowTask):
  """Windows of text, split in two at a position that each epoch draws anew.

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
      ValueError: A row has no room for an example.
    """
    sizes = np.arange(2, self.layout.longest_text + 1)
    shortest, longest = self.suffixes(sizes)
    fits = (shortest <= longest) & self.layout.fits(self.lengths(sizes))
    if not fits.any():
      rows = self.layout.describe()
      raise InputError(f'rows of {rows} are too short for a prefix LM')
    return int(sizes[fits][-1])

  def suffixes(self, n: Counts) -> tuple[Counts, Counts]:
    """The fewest and the most target tokens of windows of `n` > 1 tokens."""
    room = self.layout.max_inputs - self._marks
    shortest = np.maximum(n - room, 1)
    around_mean = (2 * self.density * n).astype(np.int64) - shortest
    most = np.minimum(n - 1, self.layout.max_targets)
    return shortest, np.clip(around_mean, shortest, most)

  def lengths(self, n: Counts) -> Lengths:
    shortest, longest = self.suffixes(n)
    inputs = n - shortest + self._marks
    return Lengths(inputs, longest, n + self._marks)

  def __call__(self, window: Window, generator: np.random.Generator) -> Example:
    """One example of the window, split at a position that is drawn."""
    (shortest,), (longest,) = self.suffixes(np.array([len(window)]))
    split = len(window) - generator.integers(shortest, longest, endpoint=True)
    marks = self.mode_id, self.eos_id
    mode, eos = ([] if mark is None else [mark] for mark in marks)
    inputs = np.concatenate([mode, window[:split], eos])
    return Example(inputs.astype(np.int32), window[split:].astype(np.int32))

  @property
  def _marks(self) -> int:
    return (self.mode_id is not None) + (self.eos_id is not None)


@dataclasses.dataclass(frozen=True)
class SpanCorruptionTask(TaskOptions):
  """Span corruption: predicts spans that are cut out of windows of text."""

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
  num_sentinels: int = _NUM_SENTINELS
  final_sentinel: bool = _FINAL_SENTINEL

  def vocabulary(self, base: Tokenizer, shape: RowShape) -> Tokenizer:
    """The tokenizer with an EOS and sentinels."""
    return extend(base, num_sentinels=self.num_sentinels, end_inputs=True)

  def rows(self, stream: Stream, tokenizer: Tokenizer, shape: RowShape) -> Rows:
    """Rows of examples, one example of each window of the documents."""
    layout, eos_id = shape.layout(tokenizer.start_id), tokenizer.eos_id
    sentinels = tokenizer.sentinel_ids[: self.num_sentinels]
    spans = self.noise_density, self.mean_noise_span, self.final_sentinel
    windows = SpanCorruption(layout, sentinels, cast(int, eos_id), *spans)
    return DenoisedRows(stream, windows, pack=shape.pack)


@dataclasses.dataclass(frozen=True)
class SpanCorruption(WindowTask):
  """Makes inputs with sentinels in place of spans, and targets of the spans.

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
    """The lengths of examples of windows of `n` tokens.

    None of the lengths falls as `n` rises, which `window` depends on.
    """
    noise, spans = noise_counts(n, self.density, self.mean_span)
    inputs = n - noise + spans + 1 + (self.mode_id is not None)
    targets = noise + spans + 1 + self.final_sentinel
    return Lengths(inputs, targets, inputs + targets)

  def __call__(self, window: Window, generator: np.random.Generator) -> Example:
    """One example of a window; an EOS at the window's end is left out."""
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
  """The numbers of tokens and of spans that are cut out of P windows.

  Of each window's `n` tokens the share `density` is cut out, in spans of
  `mean_span` tokens on average: at least one and, if `n` > 1, not all. At least
  one kept token lies between two spans.
  """
  noise = np.clip(np.round(n * density), 1, np.maximum(n - 1, 1))
  most = np.minimum(noise, n - noise + 1)
  spans = np.clip(np.round(noise / mean_span), 1, most)
  return noise.astype(np.int64), spans.astype(np.int64)


def noise_mask(
  n: int, generator: np.random.Generator, density: float, mean_span: float
) -> Bool[np.ndarray, ' n']:
  """A mask of a window of `n` tokens, True for tokens that are cut out.

  A share `density` of the tokens is cut out, in spans of `mean_span` tokens on
  average, as many as `noise_counts` says; all such masks are equally likely.
  Unlike in T5's code, a window need not begin with a kept token, nor end with a
  span.
  """
  counts = noise_counts(np.array([n]), density, mean_span)
  noise, spans = (int(count[0]) for count in counts)
  noise_lengths = _random_partition(noise, spans, generator)
  # The kept tokens before the first span or after the last one may be none.
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
  """The kept tokens [I] and the cut-out tokens [J] of a window, with sentinels.

  A sentinel replaces each span among the kept tokens, and precedes the span's
  tokens among the tokens that are cut out.

  Args:
    window: The N tokens.
    mask: True for tokens that are cut out; a span is a run of True.
    sentinels: The sentinels' ids, the first for the first span; there are at
      least as many as spans.
  """
  begins = _begins(mask)
  marks = sentinels[np.maximum(np.cumsum(begins) - 1, 0)]
  # For each token there is a pair of a sentinel and the token, of which a mask
  # chooses both, one or none.
  pairs = np.stack([marks, window], axis=1)
  inputs = pairs[np.stack([begins, ~mask], axis=1)]
  targets = pairs[np.stack([begins, mask], axis=1)]
  return inputs, targets


def _begins(mask: np.ndarray) -> np.ndarray:
  """A mask that is True at the first token of each span cut out by `mask`."""
  return mask & ~np.append(False, mask[:-1])


def _random_partition(total: int, count: int, generator: np.random.Generator):
  """`count` positive numbers that sum to `total`, all lists equally likely."""
  cuts = generator.choice(total - 1, count - 1, replace=False)
  return np.diff(np.sort(cuts) + 1, prepend=0, append=total)


@dataclasses.dataclass(frozen=True)
class Ul2Task(TaskOptions):
  """UL2: a window of text becomes an example by a denoiser drawn for it."""

  label = 'ul2'

  denoisers: tuple[Denoiser, ...] = option(
    DENOISERS,
    "Denoisers as (mode, mean span in tokens, density, weight). Modes 'R' and "
    "'X' cut out spans, 'S' is a prefix LM with mean span 0. The density is "
    'the share of a window that is predicted; the weight is the relative '
    'frequency of the denoiser, 0 for never.',
  )
  num_sentinels: int = _NUM_SENTINELS
  final_sentinel: bool = _FINAL_SENTINEL

  def problems(self) -> Iterator[str]:
    """Yields a text for each problem of the denoisers."""
    for mode, mean_span, density, weight in self.denoisers:
      where = f'denoisers: {(mode, mean_span, density, weight)}:'
      if mode not in MODES:
        yield f'{where} {unknown_text("mode of a denoiser", mode, MODES)}'
      if weight < 0:
        yield f'{where} weight={weight} must be at least 0'
      if not 0 < density < 1:
        yield f'{where} density={density} not in (0, 1)'
      if mode != 'S' and mean_span < 1:
        yield f'{where} mean span={mean_span} must be at least 1'
    if not any(weight for *_, weight in self.denoisers):
      yield f'denoisers={self.denoisers} has none of positive weight'

  def vocabulary(self, base: Tokenizer, shape: RowShape) -> Tokenizer:
    """The tokenizer with an EOS, sentinels and mode tokens."""
    sentinels, ends = self.num_sentinels, shape.encoder_decoder
    return extend(base, num_sentinels=sentinels, modes=MODES, end_inputs=ends)

  def rows(self, stream: Stream, tokenizer: Tokenizer, shape: RowShape) -> Rows:
    """Rows of examples, one example of each window of the documents."""
    windows = self.windows(cast(Extended, tokenizer), shape)
    return DenoisedRows(stream, windows, pack=shape.pack)

  def windows(self, tokenizer: Extended, shape: RowShape) -> 'Mixture':
    """The mixture of the denoisers with a weight above 0."""
    layout = shape.layout(tokenizer.start_id)
    end_id = cast(int, tokenizer.eos_id)
    sentinels = tokenizer.sentinel_ids[: self.num_sentinels]
    denoisers = [denoiser for denoiser in self.denoisers if denoiser[-1]]
    tasks = []
    for mode, mean_span, density, _ in denoisers:
      mode_id = tokenizer.token_id(mode_name(mode))
      if mode == 'S':
        end = end_id if shape.encoder_decoder else None
        tasks.append(PrefixLM(layout, density, end, mode_id))
      else:
        spans = density, mean_span, self.final_sentinel, mode_id
        tasks.append(SpanCorruption(layout, sentinels, end_id, *spans))
    weights = tuple(weight for *_, weight in denoisers)
    return Mixture(layout, tuple(tasks), weights)


@dataclasses.dataclass(frozen=True)
class Mixture(WindowTask):
  """Examples of windows, each by a denoiser that is drawn for the window.

  Attributes:
    layout: Layout of the rows, which is the same for all denoisers.
    tasks: The task of each denoiser.
    weights: Relative frequencies of the denoisers; they need not sum to 1.
  """

  layout: Layout
  tasks: tuple[WindowTask, ...]
  weights: tuple[float, ...]

  @functools.cached_property
  def window(self) -> int:
    """The largest number of tokens that every denoiser can fit in a row.

    Raises:
      ValueError: A denoiser can fit no window in a row.
    """
    return min(task.window for task in self.tasks)

  def lengths(self, n: Counts) -> Lengths:
    """The largest lengths of examples that windows of `n` tokens give.

    Each length is the largest that any of the denoisers gives.
    """
    by_task = [task.lengths(n) for task in self.tasks]
    return Lengths(*(np.max(side, axis=0) for side in zip(*by_task)))

  def __call__(self, window: Window, generator: np.random.Generator) -> Example:
    """One example of the window, by a denoiser that is drawn at random."""
    share = np.array(self.weights) / sum(self.weights)
    task = self.tasks[generator.choice(len(self.tasks), p=share)]
    return task(window, generator)
