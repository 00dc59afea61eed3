"""UL2's mixture of denoisers (https://arxiv.org/abs/2205.05131)."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import cast

import numpy as np

from moe_jax.config import option, unknown_text
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
from moe_jax.data.tasks.prefix_lm import PrefixLM
from moe_jax.data.tasks.span_corruption import SpanCorruption
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.data.tokenizers.extra_ids import Extended, extend, mode_name

MODES = ('R', 'S', 'X')


Denoiser = tuple[str, float, float, float]
# The denoisers of table 1 of the paper, as `Ul2Task.denoisers` has them.
DENOISERS: tuple[Denoiser, ...] = (
  ('R', 3.0, 0.15, 1.0),
  ('R', 8.0, 0.15, 1.0),
  ('S', 0.0, 0.25, 1.0),
  ('X', 3.0, 0.5, 1.0),
  ('X', 8.0, 0.5, 1.0),
  ('X', 64.0, 0.15, 1.0),
  ('X', 64.0, 0.5, 1.0),
)


@dataclasses.dataclass(frozen=True)
class Ul2Task(TaskOptions):
  """Examples of windows of text, each by a denoiser drawn for the window."""

  label = 'ul2'

  denoisers: tuple[Denoiser, ...] = option(
    DENOISERS,
    "Denoisers as (mode, mean span in tokens, density, weight). Modes 'R' and "
    "'X' cut out spans, 'S' is a prefix LM with mean span 0. The density is "
    'the share of a window that is predicted; the weight is the relative '
    'frequency of the denoiser, 0 for never.',
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
    'Whether the targets of cut-out spans end in one more sentinel before the '
    'EOS.',
  )

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
    return extend(
      base,
      num_sentinels=self.num_sentinels,
      modes=MODES,
      end_inputs=shape.encoder_decoder,
    )

  def rows(self, stream: Stream, tokenizer: Tokenizer, shape: RowShape) -> Rows:
    """Rows of examples, one example of each window of the documents."""
    windows = self.windows(cast(Extended, tokenizer), shape)
    return DenoisedRows(*stream, windows, pack=shape.pack)

  def windows(self, tokenizer: Extended, shape: RowShape) -> 'Mixture':
    """The mixture of the denoisers with a weight above 0."""
    layout = shape.layout(tokenizer.start_id)
    end_id = cast(int, tokenizer.eos_id)
    sentinels = tokenizer.sentinel_ids[: self.num_sentinels]
    tasks, weights = [], []
    for mode, mean_span, density, weight in self.denoisers:
      if not weight:
        continue
      weights.append(weight)
      mode_id = tokenizer.token_id(mode_name(mode))
      if mode == 'S':
        end = end_id if shape.encoder_decoder else None
        tasks.append(PrefixLM(layout, density, end, mode_id))
      else:
        spans = density, mean_span, self.final_sentinel, mode_id
        tasks.append(SpanCorruption(layout, sentinels, end_id, *spans))
    return Mixture(tuple(tasks), tuple(weights))


@dataclasses.dataclass(frozen=True)
class Mixture(WindowTask):
  """Examples of windows, each by a denoiser that is drawn for the window.

  Attributes:
    tasks: The task of each denoiser.
    weights: Relative frequencies of the denoisers; they need not sum to 1.
  """

  tasks: tuple[WindowTask, ...]
  weights: tuple[float, ...]

  @functools.cached_property
  def layout(self) -> Layout:
    """The layout of the rows, which is the same for all denoisers."""
    return self.tasks[0].layout

  @functools.cached_property
  def window(self) -> int:
    """The largest number of tokens that every denoiser can fit in a row.

    Raises:
      ValueError: A denoiser can fit no window in a row.
    """
    return min(task.window for task in self.tasks)

  def lengths(self, n: Counts) -> Lengths:
    """The largest lengths, by any denoiser, of examples of `n` tokens."""
    by_task = [task.lengths(n) for task in self.tasks]
    return Lengths(*(np.max(side, axis=0) for side in zip(*by_task)))

  def __call__(self, window: Window, generator: np.random.Generator) -> Example:
    """One example of the window, by a denoiser that is drawn at random."""
    share = np.array(self.weights) / sum(self.weights)
    task = self.tasks[generator.choice(len(self.tasks), p=share)]
    return task(window, generator)
