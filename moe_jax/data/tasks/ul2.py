"""UL2's mixture of denoisers (https://arxiv.org/abs/2205.05131).

Not here: the denoisers themselves (`span_corruption.py`, `prefix_lm.py`).
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer

from moe_jax.config import unknown
from moe_jax.data.layouts import Example, Layout, Lengths
from moe_jax.data.tasks.denoising import WindowTask
from moe_jax.data.tasks.prefix_lm import PrefixLM
from moe_jax.data.tasks.span_corruption import SpanCorruption
from moe_jax.shapes import Int

MODES = ('R', 'S', 'X')


class Denoiser(NamedTuple):
  """One denoiser of a mixture.

  Attributes:
    mode: 'R' (regular) and 'X' (extreme) cut out spans, 'S' (sequential) is a
      prefix LM. Its token tells the model which is asked for.
    mean_span: Of a span; of no meaning for 'S', whose suffix is one span.
    density: The share of a window that is to be learned.
    weight: How often, relative to the others.
  """

  mode: str
  mean_span: float
  density: float
  weight: float


# Table 1 of the paper, each as often as another.
DENOISERS = (
  Denoiser('R', 3.0, 0.15, 1.0),
  Denoiser('R', 8.0, 0.15, 1.0),
  Denoiser('S', 0.0, 0.25, 1.0),
  Denoiser('X', 3.0, 0.5, 1.0),
  Denoiser('X', 8.0, 0.5, 1.0),
  Denoiser('X', 64.0, 0.15, 1.0),
  Denoiser('X', 64.0, 0.5, 1.0),
)


@dataclasses.dataclass(frozen=True)
class Mixture(WindowTask):
  """Windows of text to examples of a denoiser drawn for each.

  Attributes:
    tasks: The denoisers.
    weights: How often each is drawn; they need not sum to 1.
  """

  tasks: tuple[WindowTask, ...]
  weights: tuple[float, ...]

  @functools.cached_property
  def layout(self) -> Layout:
    """Of the rows."""
    return self.tasks[0].layout

  @functools.cached_property
  def window(self) -> int:
    """The largest number of tokens that fit in a row by every denoiser.

    Raises:
      ValueError: As theirs.
    """
    return min(task.window for task in self.tasks)

  def lengths(self, n: Int[np.ndarray, ' P']) -> Lengths:
    """Of windows of `n` tokens, whatever the denoiser."""
    each = [task.lengths(n) for task in self.tasks]
    return Lengths(*(np.max(side, axis=0) for side in zip(*each)))

  def __call__(
    self, window: Integer[np.ndarray, ' N'], generator: np.random.Generator
  ) -> Example:
    """One example."""
    share = np.array(self.weights) / sum(self.weights)
    task = self.tasks[generator.choice(len(self.tasks), p=share)]
    return task(window, generator)


def mixture(
  denoisers: Sequence[Sequence[Any]],
  layout: Layout,
  *,
  sentinels: tuple[int, ...],
  eos_id: int,
  mode_ids: Mapping[str, int],
  final_sentinel: bool,
  end_prefix: bool,
) -> Mixture:
  """The mixture of `denoisers`, each as the fields of a `Denoiser`.

  Args:
    denoisers: Those of weight 0 are left out.
    layout: Of the rows.
    sentinels: As in `SpanCorruption`.
    eos_id: As in `SpanCorruption`.
    mode_ids: The token of each of `MODES`.
    final_sentinel: As in `SpanCorruption`.
    end_prefix: Whether the inputs of 'S' end in the EOS; see `PrefixLM`.

  Raises:
    ValueError: There is none, a mode is unknown, or a weight is negative.
  """
  chosen = [d for d in map(_denoiser, denoisers) if d.weight]
  if not chosen:
    raise ValueError(f'denoisers={denoisers} has none of positive weight')
  tasks = [
    PrefixLM(
      layout, d.density, eos_id if end_prefix else None, mode_ids[d.mode]
    )
    if d.mode == 'S'
    else SpanCorruption(
      layout,
      sentinels,
      eos_id,
      density=d.density,
      mean_span=d.mean_span,
      final_sentinel=final_sentinel,
      mode_id=mode_ids[d.mode],
    )
    for d in chosen
  ]
  return Mixture(tuple(tasks), tuple(d.weight for d in chosen))


def _denoiser(fields: Sequence[Any]) -> Denoiser:
  if len(fields) != len(Denoiser._fields):
    raise ValueError(f'denoiser {fields} is not {Denoiser._fields}')
  mode, *numbers = fields
  denoiser = Denoiser(mode, *map(float, numbers))
  if denoiser.mode not in MODES:
    raise unknown('mode of a denoiser', denoiser.mode, MODES)
  if denoiser.weight < 0:
    raise ValueError(f'{denoiser} has a negative weight')
  return denoiser
