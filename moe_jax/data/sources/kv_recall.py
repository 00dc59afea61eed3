"""KV-RECALL, a synthetic task: N random pairs of a key and a value, by heart.

Nothing can be inferred, so a model knows as much as it has room for: the
closed-book question answering of a small machine. Both splits hold the same
pairs, each in an order of its own, for memory is what is measured.

A value's letters are equally likely: the loss per letter begins at log(16) =
2.77 nats and ends at 0. In tasks where values end in an EOS, it is a token
like the others and soon costs nothing: per token the loss begins at 4/5 of
that.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator

from moe_jax.data.sources.contract import (
  Pair,
  Pairs,
  Selection,
  SourceOptions,
)
from moe_jax.options import option, within

LETTERS = 'abcdefghijklmnop'
KEY_LETTERS = 6
VALUE_LETTERS = 4
# The most pairs are one in 16 of all keys, so that a key is seldom drawn twice.
MOST_PAIRS = len(LETTERS) ** KEY_LETTERS // 16
# Version of the pairs that a number makes, a part of every source's identity.
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class KvRecallSource(SourceOptions):
  """Random keys and their values, to be learned by heart."""

  num_pairs: int = option(
    2048,
    'Number of pairs of a key and a value; the pairs of a smaller number are '
    'among those of a larger one.',
    within(f'[1, {MOST_PAIRS}]'),
  )

  def pairs(self, selection: Selection = Selection()) -> Pairs:
    """The same pairs in both splits, in another order.

    Raises:
      ValueError: A split is neither of our two.
    """
    selection.check_splits('kv_recall')
    count = self.num_pairs
    return Pairs(
      f'synthetic: {count} random keys and values, the same in both splits',
      f'kv_recall {FORMAT} {count} {selection.splits}',
      lambda split: iter(pairs(count, selection.own(split))),
    )


def pairs(count: int, split: str) -> list[Pair]:
  """The same (key, value) pairs in each split's own order; keys differ.

  The pairs of a smaller count are among those of a larger one.

  Args:
    count: Number of pairs.
    split: Name that orders the pairs; any text will do.
  """
  found = distinct(_draws(), count)
  return sorted(found.items(), key=lambda pair: _hash(split, *pair))


def distinct(drawn: Iterable[Pair], count: int) -> dict[str, str]:
  """The first `count` keys of `drawn`, each with its first value."""
  found = {}
  drawn = iter(drawn)
  while len(found) < count:
    key, value = next(drawn)
    found.setdefault(key, value)
  return found


def _draws() -> Iterator[Pair]:
  for number in itertools.count():
    # A byte a letter: 16 letters are equally likely.
    text = ''.join(LETTERS[b % len(LETTERS)] for b in _hash(str(number)))
    yield text[:KEY_LETTERS], text[KEY_LETTERS : KEY_LETTERS + VALUE_LETTERS]


def _hash(*words: str) -> bytes:
  return hashlib.sha256('\0'.join(('kv_recall', *words)).encode()).digest()
