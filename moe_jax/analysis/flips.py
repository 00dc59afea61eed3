"""Compares a recorded routing with ours, and says why choices differ.

    python -m moe_jax.analysis.flips traces/server traces/ours --dtype=bfloat16

The first trace is of a server, or of a pass in another type or code; the second
is of our pass over the same batches, in float32 with logits. A token of a layer
has flipped if its experts differ. Of these causes the first that fits counts:

- capacity: one side left out a choice, and has no experts that the other lacks
- tie: our logits of the exchanged experts are equal
- rounding: their margin is at most what rounding may change
- after another flip: an earlier layer differs for a token that this one sees
- other weights: none of these

What rounding may change is an estimate and no certainty: 16 u rms sqrt(l + 1),
with the unit roundoff u, the root mean square of the token's logits, and the
layer l. Once a token has flipped, other weights in later layers may pass for a
consequence. Where our pass had the recorded routing imposed, --imposed takes no
flip for the consequence of another. Gates are our own even then: of layers with
other weights, the first tells where they begin.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from moe_jax import cli
from moe_jax.analysis import traces
from moe_jax.analysis.routing_report import ValueTable, wide_console
from moe_jax.analysis.traces import LayerChoices, Record
from moe_jax.config import unknown
from moe_jax.errors import InputError

CAUSES = ['capacity', 'tie', 'rounding', 'after another flip', 'other weights']
COUNTS = ['tokens', 'same', *CAUSES]
UNIT_ROUNDOFF = {'bfloat16': 2**-8, 'float16': 2**-11, 'float32': 2**-24}
UNKNOWN, SAME, CAUSE = range(3)  # an outcome from CAUSE on is a cause
_FACTOR, _EXAMPLES = 16, 2


class LayerFlips(NamedTuple):
  """The comparison of one layer's choices in a batch.

  Attributes:
    outcome: int [B, T], `UNKNOWN` in padding and where a side has no choice of
      the token, `SAME` where the experts are the same, or else `CAUSE` plus the
      index of the cause in `CAUSES`.
    margin: float [B, T], the largest of our logits of the experts that ours
      alone chose, less the smallest of those that theirs alone chose; 0 where
      no experts are exchanged.
    limit: float [B, T], the margin that rounding may change.
    served: bool [B, T, E], whether an expert of our choice serves the token.
  """

  outcome: Int[np.ndarray, 'B T']
  margin: Float[np.ndarray, 'B T']
  limit: Float[np.ndarray, 'B T']
  served: Bool[np.ndarray, 'B T E']

  @property
  def counts(self) -> dict[str, int]:
    """Number of compared tokens, of the same choices, and of each cause."""
    counts = np.bincount(self.outcome.flat, minlength=CAUSE + len(CAUSES))
    return dict(zip(COUNTS, map(int, [counts[SAME:].sum(), *counts[SAME:]])))


def compare(
  theirs: Record, ours: Record, dtype: str = 'bfloat16', imposed: bool = False
) -> dict[int, LayerFlips]:
  """Compares the choices of a decoder's tokens, by layer.

  For tokens that see it, a token that a side did not record may have flipped.

  Args:
    theirs: The recorded choices. Gates and logits are not read.
    ours: Our choices for the same tokens, with logits in float32.
    dtype: The coarsest type in which either side computes.
    imposed: Whether `theirs` was imposed on our pass. Then our choices are the
      largest of our logits, drops are equal, and a router that chooses by more
      than its logits is not noticed.

  Raises:
    ValueError: The records are of other tokens, layers or sizes, or ours lacks
      logits or has other choices than those of its largest logits, or than
      those that were imposed.
  """
  if dtype not in UNIT_ROUNDOFF:
    raise unknown('dtype', dtype, UNIT_ROUNDOFF)
  _check(theirs, ours)
  layers, differed = {}, np.zeros(ours.tokens.shape, bool)
  for n, here in sorted(ours.layers.items()):
    states = _states(n, theirs.layers[n], here, imposed)
    unit = _FACTOR * UNIT_ROUNDOFF[dtype] * (n + 1) ** 0.5
    seen = _seen(differed, ours.documents) & (not imposed)
    layers[n] = _flips(*states, np.asarray(here.logits), unit, seen)
    differed |= layers[n].outcome != SAME
  return layers


def _check(theirs: Record, ours: Record) -> None:
  """Raises ValueError unless both records are of a decoder's same tokens."""
  there, here = (
    {n: x.expert.shape for n, x in r.layers.items()} for r in (theirs, ours)
  )
  if there != here or ours.sequence:
    raise InputError(
      f'shapes [B, T, K] of choices by layer: {there} there, {here} here; only '
      f'layers of decoders are compared, these are of {ours.sequence!r}'
    )
  a, b = (np.where(r.documents > 0, r.tokens, -1) for r in (theirs, ours))
  for row, token in np.argwhere(a != b)[:1]:
    raise InputError(
      f'batch {ours.batch} of step {ours.step}, row {row}, token {token}: id '
      f'{a[row, token]} there, {b[row, token]} here (-1: padding)'
    )


def _states(
  n: int, theirs: LayerChoices, ours: LayerChoices, imposed: bool
) -> tuple[np.ndarray, np.ndarray]:
  """Their and our choices, int8 [B, T, E], ours by our logits.

  A number is 0 if the token did not choose the expert, 1 if the choice was
  dropped, 2 if it was served.
  """
  if (logits := ours.logits) is None or theirs.expert.max() >= logits.shape[-1]:
    raise InputError(f'layer {n}: some experts there have no logits here')
  there, here = np.zeros((2, *logits.shape[:2], logits.shape[2] + 1), np.int8)
  for states, choices in ((there, theirs), (here, ours)):
    np.put_along_axis(states, choices.expert, 1 + choices.kept, -1)
  there, here = there[..., :-1], here[..., :-1]  # without expert -1
  if imposed:
    wrong = there.any(-1) & ((there > 0) != (here > 0)).any(-1)
    here, largest = 0 * here, np.argsort(-logits, -1, kind='stable')
    np.put_along_axis(here, largest[..., : ours.expert.shape[-1]], 2, -1)
    here -= (here > 0) & (there == 1)  # drops were imposed, too
  else:
    least = np.where(here > 0, logits, np.inf).min(-1)
    wrong = ~(least >= np.where(here > 0, -np.inf, logits).max(-1))
  if wrong.any():
    raise InputError(
      f'layer {n}: {wrong.sum()} of {wrong.size} tokens have other experts '
      'here than were to be imposed, or, if none were, than the largest logits '
      'give: did a bias, groups or noise decide, or was a routing imposed?'
    )
  return there, here


def _flips(there, here, logits, unit, seen) -> LayerFlips:
  """Compares a layer's choices, as `_states` gives them.

  Rounding explains margins up to `unit` times the root mean square of a token's
  logits [B, T, E]; `seen`, bool [B, T], is True where the input differs.
  """
  lost, gained = (here > 0) & (there == 0), (there > 0) & (here == 0)
  exchanged = lost.any(-1) & gained.any(-1)
  least = np.where(gained, logits, np.inf).min(-1)
  margin = np.where(lost, logits, -np.inf).max(-1) - least
  limit = unit * np.sqrt(np.square(logits).mean(-1))
  outcomes = {
    UNKNOWN: ~(there.any(-1) & here.any(-1)),
    SAME: ~exchanged & ((there == 2) == (here == 2)).all(-1),
    CAUSE: ~exchanged,
    CAUSE + 1: margin == 0,
    CAUSE + 2: margin <= limit,
    CAUSE + 3: seen,
  }
  outcome = np.select([*outcomes.values()], [*outcomes], CAUSE + 4)
  return LayerFlips(outcome, np.where(exchanged, margin, 0), limit, here == 2)


def _seen(differed: np.ndarray, documents: np.ndarray) -> np.ndarray:
  """Whether any token so far in the document, itself included, differed."""
  is_first = np.diff(documents, axis=1, prepend=-1) != 0
  start = np.maximum.accumulate(is_first * np.arange(differed.shape[1]), 1)
  count = np.cumsum(differed, 1)
  return count > np.take_along_axis(count - differed, start, 1)


def run(options: argparse.Namespace, _: list[str]) -> None:
  """Prints a table by layer, and the first flips of each cause.

  Raises:
    ValueError: A trace cannot be read, or they cannot be compared.
  """
  theirs, ours = traces.read(options.theirs), traces.read(options.ours)
  header, counts, texts = ours.header, defaultdict(Counter), defaultdict(list)
  others = [n for n, info in header.layers.items() if not info.by_logits]
  if others or not header.has_logits or header.dtype != 'float32':
    raise InputError(
      f'{options.ours}: logits={header.has_logits}, dtype={header.dtype!r}; '
      f'layers {others} have a bias or groups; float32 logits alone must decide'
    )
  for there, here in zip_longest(theirs.records(), ours.records()):
    if there is None or here is None:
      raise InputError(f'{options.ours} has another number of batches')
    layers = compare(there, here, options.dtype, options.imposed)
    for n, layer in layers.items():
      counts[n].update(layer.counts)
      for row, token in np.argwhere(layer.outcome >= CAUSE):
        outcome, margin, limit, served = (x[row, token] for x in layer)
        if len(lines := texts[CAUSES[outcome - CAUSE]]) < _EXAMPLES:
          lines.append(
            f'  layer {n}, step {here.step}, batch {here.batch}, row {row}, '
            f'token {token}: {there.layers[n].expert[row, token]} there, '
            f'{served.nonzero()[0]} here; margin {margin:.2g} of {limit:.2g}'
          )
  note = 'A token counts once in a layer; what rounding explains is estimated.'
  rows = [
    {'layer': n, 'agreement': c['same'] / max(1, c['tokens']), **c}
    for n, c in counts.items()
  ]
  ValueTable('Flips', note, rows, {'agreement': '.2%'}).show(wide_console())
  cli.say(line for cause in texts for line in [cause, *texts[cause]])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """Parses the command line."""
  parser = cli.parser('moe_jax.analysis.flips', __doc__)
  add = parser.add_argument
  add('theirs', metavar='THEIRS', help='folder of the recorded trace')
  add('ours', metavar='OURS', help='folder of our trace, with float32 logits')
  text = 'the coarsest type in which either side computes'
  add('--dtype', choices=[*UNIT_ROUNDOFF], default='bfloat16', help=text)
  add('--imposed', action='store_true', help='THEIRS was imposed on OURS')
  cli.add_traceback(parser)
  parser.set_defaults(run=run)
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command."""
  cli.run_command(parse(argv), [])


if __name__ == '__main__':
  main()
