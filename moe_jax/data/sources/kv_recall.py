"""KV-RECALL, a synthetic task: N random pairs of a key and a value, by heart.

Nothing can be inferred, so a model knows as much as it has room for: the
closed-book question answering of a small machine. Both splits hold the same
pairs, each in an order of its own, for memory is what is measured.

A value's letters are equally likely: the loss per letter begins at log(16) =
2.77 nats and ends at 0. In tasks where values end in an EOS, it is a token
like the others and soon costs nothing: per token the loss begins at 4/5 of
that.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator

LETTERS = 'abcdefghijklmnop'
KEY_LETTERS = 6
VALUE_LETTERS = 4
# One in 16 of all keys, so that a key is seldom drawn twice.
MOST_PAIRS = len(LETTERS) ** KEY_LETTERS // 16
FORMAT = 1  # of what is made of N; part of every source's identity

Pair = tuple[str, str]  # a key and its value


def parse(argument: str) -> int:
  """The N of 'kv_recall:<N>'.

  Raises:
    ValueError: It is no number in [1, MOST_PAIRS].
  """
  if not re.fullmatch('-?[0-9]+', argument):
    raise ValueError(f"source 'kv_recall:{argument}' is not 'kv_recall:<N>'")
  if not 1 <= int(argument) <= MOST_PAIRS:
    raise ValueError(
      f'N={argument} pairs of kv_recall not in [1, {MOST_PAIRS}]; a key has '
      f'{KEY_LETTERS} of {len(LETTERS)} letters'
    )
  return int(argument)


def pairs(count: int, split: str) -> list[Pair]:
  """The same (key, value) pairs in each split's own order; keys differ.

  The pairs of a smaller count are among those of a larger one.

  Args:
    count: N.
    split: Any name.
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
