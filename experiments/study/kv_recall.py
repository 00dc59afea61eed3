"""KV-RECALL, a synthetic task: N random pairs of a key and a value to memorise.

Nothing can be inferred, so a model knows as much as it has room for, as in
closed-book question answering. Both splits have the same pairs, in different
orders, since memory is measured.

A value's letters are equally likely: the loss per letter begins at log(16) =
2.77 nats and ends at 0. In tasks where values end in an EOS, that is one more
token, which is soon learned, so the loss per token begins at 4/5 of that.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator

from moe_jax.config import option
from moe_jax.data.contracts import Pair, Pairs, Selection, SourceOptions

LETTERS = 'abcdefghijklmnop'
KEY_LETTERS = 6
VALUE_LETTERS = 4
# Largest number of pairs: one in 16 of all keys, so that keys seldom repeat.
MOST_PAIRS = len(LETTERS) ** KEY_LETTERS // 16
# Version of the pairs, a part of the source's identity.
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class KvRecallSource(SourceOptions):
  """Random keys and their values, which a model has to memorise."""

  num_pairs: int = option(
    2048,
    'Number of random pairs of a key and a value; a larger number adds pairs '
    'to those of a smaller one.',
    minimum=1,
    maximum=MOST_PAIRS,
  )

  def pairs(self, selection: Selection = Selection()) -> Pairs:
    """The same pairs in both splits, in different orders.

    Raises:
      ValueError: A split is neither of our two.
    """
    selection.check_splits('kv_recall')
    count = self.num_pairs
    return Pairs(
      f'synthetic: {count} random keys and values, the same in both splits',
      f'kv_recall {FORMAT} {count} {selection.splits}',
      lambda split: iter(pairs(count, selection.name_of(split))),
    )


def pairs(count: int, split: str) -> list[Pair]:
  """The first `count` (key, value) pairs, in the order of a split.

  Args:
    count: Number of pairs; all keys differ.
    split: Any text, which decides the order.
  """
  values = distinct(_draws(), count)
  return sorted(values.items(), key=lambda pair: _hash(split, *pair))


def distinct(drawn: Iterable[Pair], count: int) -> dict[str, str]:
  """The first `count` keys of `drawn`, each with its first value."""
  values = {}
  drawn = iter(drawn)
  while len(values) < count:
    key, value = next(drawn)
    values.setdefault(key, value)
  return values


def _draws() -> Iterator[Pair]:
  for number in itertools.count():
    # One byte for each letter; 16 letters are then equally likely.
    text = ''.join(LETTERS[b % len(LETTERS)] for b in _hash(str(number)))
    yield text[:KEY_LETTERS], text[KEY_LETTERS : KEY_LETTERS + VALUE_LETTERS]


def _hash(*words: str) -> bytes:
  return hashlib.sha256('\0'.join(('kv_recall', *words)).encode()).digest()
