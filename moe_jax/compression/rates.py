"""The bits that a ternary weight takes, measured and predicted by counting.

    python -m moe_jax.compression rates --widths=768

Weights are independent, zero with a given probability. Their codes follow the
static table of https://arxiv.org/abs/2310.16795, whatever that probability is.
"""

import argparse
from typing import Any, NamedTuple

import numpy as np

from moe_jax import cli
from moe_jax.kernels import ternary
from moe_jax.kernels.ternary import MOST_PAIRS, MOST_WEIGHTS, dictionary

# The default probabilities of a zero and widths of rows, from the widest of
# arXiv:2310.16795 to the narrowest of models in tests.
ZEROS, WIDTHS = (0.80, 0.857, 0.885, 0.95), (6144, 3072, 768, 64)
# The number of weights, at most, that a rate is measured on.
_SAMPLE = 1 << 21
# Bits of a row besides codes: an int32 offset, and two bfloat16 values.
_ROW_BITS, _OFFSET_BITS, _CODE_BITS = 64, 32, 16


class Bits(NamedTuple):
  """The mean bits that are stored for a weight.

  Attributes:
    codes: The bits of the rows' codes.
    metadata: The bits of all else that is stored: the offset and the two values
      of each row, and the end of the last row.
  """

  codes: float
  metadata: float


def measured(width: int, zeros: float, seed: int = 0) -> Bits:
  """The bits per weight of one random matrix of about two million weights.

  `width` is the number of weights of a row, and `zeros` the probability of a
  zero.
  """
  rows = max(_SAMPLE // width, 1)
  draw = np.random.default_rng(seed).random((rows, width), np.float32)
  half = (1 - zeros) / 2
  weights = (draw < half).astype(np.int8) - (draw >= 1 - half)
  count = ternary.encode(weights).codes.size
  return Bits(
    _CODE_BITS * count / weights.size,
    (rows * _ROW_BITS + _OFFSET_BITS) / weights.size,
  )


def predicted(width: int, zeros: float) -> float:
  """The expected bits per weight of the codes of one row, without sampling.

  A code stands for a sequence of pairs of weights. It ends before the first
  pair that the dictionary cannot add to the sequence, and the next code begins
  with that pair. So the pairs at which codes begin are a Markov renewal
  process; its expected number of codes is summed over the row.

  Args:
    width: The number of weights of a row.
    zeros: The probability of a zero; 1 and -1 share the rest.
  """
  weight = np.array([zeros, (1 - zeros) / 2, 0, (1 - zeros) / 2])  # by low bits
  pair = np.outer(weight, weight).reshape(-1)
  # In a row of odd width, a zero is appended to complete the last pair.
  last = np.outer(weight, [1, 0, 0, 0]).reshape(-1) if width % 2 else pair
  ends = _ends(weight)
  steps = -(-width // 2)
  # begins[MOST_PAIRS + t, a] is the probability that a code begins at pair t of
  # the row and that this pair has the index a. The first MOST_PAIRS rows stay
  # zeros, since no code begins before the row.
  begins = np.zeros((MOST_PAIRS + steps, 16))
  for t in range(steps):
    before = begins[t : t + MOST_PAIRS][::-1]  # by length of the ended code
    ended = before.reshape(-1) @ ends if t else 1.0
    begins[MOST_PAIRS + t] = ended * (last if t == steps - 1 else pair)
  return 16 * begins.sum() / width


def _ends(weight: np.ndarray) -> np.ndarray:
  """The probability that a code that begins with pair a ends before pair b.

  `weight`, [4], has the probability of each weight w, which is -1, 0 or 1, at
  the index w & 3. The pair of weights (v, w) has the index 4 (v & 3) + (w & 3).

  Returns:
    [14 * 16, 16], indexed by (16 d + a, b): the probability that d pairs, of at
    most 13, follow pair a such that the dictionary has the sequence, but not
    the sequence with pair b appended.
  """
  table = dictionary()
  bits = table.weights & 3
  first = MOST_WEIGHTS - table.lengths  # the index of the first weight
  follows = np.arange(MOST_WEIGHTS) >= first[:, None] + 2
  chance = np.where(follows, weight[bits], 1).prod(1)
  codes = np.arange(len(bits))
  first = 4 * bits[codes, first] + bits[codes, first + 1]
  state = (table.lengths // 2 - 1) * 16 + first
  lacks = table.steps == table.pairs
  ends = [
    np.bincount(state, chance * lacks[:, b], MOST_PAIRS * 16) for b in range(16)
  ]
  return np.stack(ends, axis=1)


def add(commands: Any) -> None:
  """Adds the command `rates` to the commands of a parser."""
  text = 'prints the bits of ternary weights'
  command = commands.add_parser('rates', help=text, **cli.about(__doc__))
  share = cli.number(float, minimum=0, maximum=1)
  command.add_argument('--zeros', type=share, nargs='+', default=ZEROS)
  command.add_argument('--widths', type=cli.POSITIVE, nargs='+', default=WIDTHS)
  command.set_defaults(run=_run)


def _run(options: argparse.Namespace, _: list[str]) -> str:
  lines = [
    'Bits a weight; zeros are independent.',
    f'{"width":>6} {"zeros":>6} {"codes":>7} {"predicted":>10} '
    f'{"metadata":>9} {"in all":>7}',
  ]
  for width in options.widths:
    for zeros in options.zeros:
      bits = measured(width, zeros)
      by_formula = predicted(width, zeros)
      lines.append(
        f'{width:>6} {zeros:>6g} {bits.codes:>7.3f} {by_formula:>10.3f} '
        f'{bits.metadata:>9.3f} {sum(bits):>7.3f}'
      )
  return '\n'.join(lines)
