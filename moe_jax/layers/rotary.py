"""The angles of rotary positions, and their changes for long texts.

Rotary positions turn pairs of dimensions of queries and keys. Where texts are
longer than those that the model was first trained on, pairs turn by other
angles: YaRN (https://arxiv.org/abs/2309.00071) or LongRoPE
(https://arxiv.org/abs/2402.13753).
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moe_jax.config import Kinds, Options, option


class Turns(NamedTuple):
  """The rotations of the P pairs of dimensions of a head.

  Attributes:
    frequency: float32 [P], the radians by which each pair turns from one
      position to the next.
    factor: The number that the rotated pairs are multiplied by.
  """

  frequency: np.ndarray
  factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class RotaryScaling(Options):
  """The base of kinds of scaling, which change the angles for long texts."""

  def problems_with(self, theta: float, width: int) -> Iterator[str]:
    """The reasons, as texts, why theta or the rotated width does not fit.

    `theta` is the base of the wavelengths of rotary positions, and `width` the
    number of dimensions of a head that rotate.
    """
    return iter(())

  def turns(self, theta: float, width: int, long: bool = False) -> Turns:
    """The rotations of the pairs in the first `width` dimensions of each head.

    Args:
      theta: The base of the wavelengths.
      width: The number of dimensions that turn.
      long: Whether the document reaches the position `changes_at`.
    """
    return Turns(frequencies(theta, width))

  @property
  def changes_at(self) -> int | None:
    """The position at which a document is long, if its last token reaches it.

    In long documents the pairs turn by other angles. None: no document is long.
    """

  @property
  def latent_factor(self) -> float:
    """Factor of latent attention's scores besides D^-0.5; 1 except in YaRN."""
    return 1.0


@dataclasses.dataclass(frozen=True)
class Unscaled(RotaryScaling):
  """No scaling: pairs turn by the same angles in texts of any length."""


@dataclasses.dataclass(frozen=True)
class Yarn(RotaryScaling):
  """Slow pairs turn `factor` times slower, and fast pairs as without scaling.

  Source: section 3 of arXiv:2309.00071, with the options of transformers 5.24.
  """

  factor: float = option(
    1.0,
    'Number of times that texts are longer than `original_len`, by which the '
    'turns of slow pairs are divided.',
    above=0,
  )
  original_len: int = option(
    4096, 'Length in tokens of the texts of the first training.', minimum=1
  )
  beta_fast: float = option(
    32.0,
    'Number of turns in `original_len` tokens from which on a pair turns as '
    'fast as before.',
    above=0,
  )
  beta_slow: float = option(
    1.0,
    'Number of turns in `original_len` tokens up to which a pair turns '
    '`factor` times slower; pairs between the two are mixed.',
    above=0,
  )
  truncate: bool = option(
    True,
    'Whether the pairs between which turns are mixed are whole numbers: the '
    'first rounded down, the last up; gpt-oss does not round.',
  )
  attention_factor: float = option(
    0.0,
    'Factor of queries and keys as they turn; 0.0: 0.1 ln(factor) + 1, or, '
    'where both are set, (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim '
    'ln(factor) + 1).',
    minimum=0,
  )
  mscale: float = option(
    0.0,
    'Multiple of ln(factor) in the numerator of the ratio that '
    'attention_factor=0.0 stands for (DeepSeek-V2); 0.0, or '
    'mscale_all_dim=0.0: there is no ratio.',
    minimum=0,
  )
  mscale_all_dim: float = option(
    0.0,
    'Multiple of ln(factor) in the denominator of the ratio that '
    'attention_factor=0.0 stands for; multi-head latent attention also '
    'multiplies its scores by the square of 0.1 mscale_all_dim ln(factor) + 1 '
    '(DeepSeek-V2); 0.0: by 1.',
    minimum=0,
  )

  def problems(self) -> Iterator[str]:
    """Yields a text if `beta_fast` is not above `beta_slow`."""
    if self.beta_fast <= self.beta_slow:
      fast, slow = self.beta_fast, self.beta_slow
      yield f'beta_fast={fast} must be above beta_slow={slow}'

  def problems_with(self, theta, width):
    """Yields a text unless `theta`, the base of the wavelengths, is above 1.

    Up to 1, no pair of dimensions turns slower than the first one, so that
    slow pairs cannot be told from fast ones. `width` is not read.
    """
    if theta <= 1:
      yield f'theta={theta} must be above 1 with scaling'

  def turns(self, theta, width, long=False):
    low = self._pair(theta, width, self.beta_fast)
    high = self._pair(theta, width, self.beta_slow)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high += 0.001 if low == high else 0
    pair = np.arange(width // 2, dtype=np.float32)
    slow = np.clip((pair - low) / np.float32(high - low), 0, 1)
    frequency = frequencies(theta, width)
    mixed = frequency / np.float32(self.factor) * slow + frequency * (1 - slow)
    return Turns(mixed.astype(np.float32), self._factor())

  def _pair(self, theta: float, width: int, num_turns: float) -> float:
    """The index of the pair that turns `num_turns` times in `original_len`.

    It lies between two pairs where it is no whole number. `theta` is the base
    of the wavelengths, and `width` the number of rotated dimensions of a head.
    """
    wavelength = self.original_len / (num_turns * 2 * math.pi)
    return width * math.log(wavelength) / (2 * math.log(theta))

  def _factor(self) -> float:
    if self.attention_factor:
      return self.attention_factor
    if self.mscale and self.mscale_all_dim:
      return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
    return self._mscale(1.0)

  def _mscale(self, multiple: float) -> float:
    """The number 0.1 * multiple * ln(factor) + 1; 1 if `factor` is below 1."""
    return 0.1 * multiple * math.log(max(self.factor, 1.0)) + 1.0

  @property
  def latent_factor(self) -> float:
    return self._mscale(self.mscale_all_dim) ** 2


@dataclasses.dataclass(frozen=True)
class LongRope(RotaryScaling):
  """Each pair turns slower by a factor of its own, another in long documents.

  Long documents are segments with a token at a position of `original_len` or
  more. `long_factor` lists the factors of their pairs, and `short_factor` those
  of the pairs in other documents.

  Source: arXiv:2402.13753. Unlike transformers 5.24, which lets the longest row
  of a batch decide, no document here depends on another. transformers'
  Phi-3.5-MoE never uses the list for long documents; see
  `interop.quirks.ShortTurns`.
  """

  short_factor: tuple[float, ...] = option(
    (),
    'Numbers by which the turns of each pair are divided in short documents.',
    above=0,
  )
  long_factor: tuple[float, ...] = option(
    (),
    'Numbers by which the turns of each pair are divided in long documents.',
    above=0,
  )
  original_len: int = option(
    4096, 'Length in tokens up to which documents are short.', minimum=2
  )
  factor: float = option(
    1.0,
    'Number of times that texts are longer than `original_len`, which decides '
    'the attention factor.',
    above=0,
  )
  short_mscale: float = option(
    0.0,
    'Factor of queries and keys as they turn in short documents; 0.0: the root '
    'of 1 + ln(factor) / ln(original_len).',
    minimum=0,
  )
  long_mscale: float = option(
    0.0,
    'Factor of queries and keys as they turn in long documents; 0.0: the root '
    'of 1 + ln(factor) / ln(original_len).',
    minimum=0,
  )

  @property
  def changes_at(self) -> int:
    return self.original_len

  def problems_with(self, theta, width):
    """Yields a text for each list whose length is not the number of pairs.

    There are `width` / 2 pairs of dimensions that turn; `theta` is not read.
    """
    pairs = width // 2
    for name in ('short_factor', 'long_factor'):
      count = len(getattr(self, name))
      if count != pairs:
        yield f'{name} has {count} numbers for the {pairs} pairs of a head'

  def shrunk(self) -> RotaryScaling:
    """No scaling, as the lists have a factor for each pair of larger heads."""
    return Unscaled()

  def turns(self, theta, width, long=False):
    factors, mscale = self.short_factor, self.short_mscale
    if long:
      factors, mscale = self.long_factor, self.long_mscale
    divisors = np.asarray(factors, np.float32)
    log_ratio = math.log(max(self.factor, 1.0)) / math.log(self.original_len)
    frequency = frequencies(theta, width) / divisors
    return Turns(frequency, mscale or math.sqrt(1 + log_ratio))


SCALINGS = Kinds(
  'scaling of rotary positions',
  RotaryScaling,
  {'none': Unscaled, 'yarn': Yarn, 'longrope': LongRope},
)


def frequencies(theta: float, width: int) -> np.ndarray:
  """Radians, float32, that pair i turns per position: theta^(-2 i / width)."""
  return theta ** (-np.arange(0, width, 2, dtype=np.float32) / width)
