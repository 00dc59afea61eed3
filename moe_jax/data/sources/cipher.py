"""CIPHER-K, a synthetic task: one text in K substitution ciphers.

A text is cut into pieces and every piece is written in one of K alphabets. The
domains have all structure in common and no spelling, so that what a model
knows of one is of no use in another: a model with room for all of them, such
as one with experts, is better at equal FLOPs. Rows of up to a piece's length
are mostly of one domain, so that experts which divide the domains among them
have no slots left in groups of few rows (`moe.group_size`).

Not here: where the text comes from (`texts.py`).
"""

import functools
import hashlib
import itertools
import re
import string
from collections.abc import Iterable, Iterator
from typing import NamedTuple

# The printable characters of ASCII. A line's end stays one.
ALPHABET = ''.join(chr(code) for code in range(ord(' '), ord('~') + 1))
# Domain d's is MARKS[d].
MARKS = string.digits + string.ascii_letters + string.punctuation
PIECE = 256  # characters; four rows of 64
FORMAT = 1  # of what is made from a text; part of every source's identity

_KEEP = ALPHABET + '\n'


class Cipher(NamedTuple):
  """What follows 'cipher:' in a source's name.

  Attributes:
    num_domains: K; domain d has the same alphabet whatever K is.
    marked: Whether a piece begins with its domain's mark. Rows that begin
      within a piece do not see it.
    text: The source of the text.
  """

  num_domains: int
  marked: bool
  text: str


def parse(argument: str) -> Cipher:
  """The cipher of `<K>`, `<K>,marked`, either with `:<source>` after it.

  Raises:
    ValueError: It is not of that form, or K is not in [1, 94].
  """
  found = re.fullmatch(r'(-?[0-9]+)(,marked)?(?::(.+))?', argument)
  if not found:
    raise ValueError(
      f"source 'cipher:{argument}' is none of 'cipher:<K>', "
      "'cipher:<K>,marked', either with ':<source>' after it"
    )
  number, marked, text = found.groups()
  if not 1 <= int(number) <= len(MARKS):
    raise ValueError(
      f'K={number} domains of cipher not in [1, {len(MARKS)}], as many as '
      'there are marks'
    )
  return Cipher(int(number), bool(marked), text or 'python_stdlib')


def documents(texts: Iterable[str], cipher: Cipher) -> Iterator[str]:
  """Every piece of `texts` in a domain's alphabet, a document each.

  The domains take turns, so that even a batch of neighbouring pieces, as an
  evaluation has them, is of all domains.
  """
  turns = itertools.cycle(range(cipher.num_domains))
  for text in texts:
    # Pieces first: `zip` then takes no turn where there is none left.
    for piece, domain in zip(pieces(text), turns):
      mark = MARKS[domain] if cipher.marked else ''
      yield mark + encipher(piece, domain)


def pieces(text: str) -> Iterator[str]:
  """The text cut every `PIECE` characters; the last may be shorter.

  What is neither printable ASCII nor a line's end is left out.
  """
  kept = ''.join(filter(_KEEP.__contains__, text))
  return (kept[i : i + PIECE] for i in range(0, len(kept), PIECE))


def encipher(text: str, domain: int) -> str:
  """The text in the domain's alphabet, length for length.

  Domain 0 is no exception: its alphabet is mixed as well.
  """
  return text.translate(_table(domain))


@functools.lru_cache(maxsize=len(MARKS))
def _table(domain: int) -> dict[int, int]:
  # Sorted by a hash: numpy may change what its generators draw.
  def rank(letter):
    return hashlib.sha256(f'cipher {domain} {letter}'.encode()).digest()

  return str.maketrans(ALPHABET, ''.join(sorted(ALPHABET, key=rank)))
