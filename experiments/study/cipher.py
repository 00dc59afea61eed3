"""CIPHER-K, a synthetic task: one text in K substitution ciphers.

A text is cut into pieces, and every piece is written in one of K alphabets. The
domains share all structure but no spelling, so what a model knows of one is of
no use in another: at equal FLOPs, a model with room for all of them, such as
one with experts, is better. Rows of up to a piece's length mostly belong to one
domain, so experts that specialise in domains run out of slots in groups of few
rows (`moe.group_size`).
"""

import dataclasses
import functools
import hashlib
import itertools
import string
from collections.abc import Iterable, Iterator

from moe_jax.config import option
from moe_jax.data.contracts import Selection, SourceOptions, Texts
from moe_jax.data.sources.python_stdlib import PythonStdlibSource

# The printable characters of ASCII; line ends are not enciphered.
ALPHABET = ''.join(chr(code) for code in range(ord(' '), ord('~') + 1))
# MARKS[d] is the mark of domain d.
MARKS = string.digits + string.ascii_letters + string.punctuation
PIECE = 256  # characters; four rows of 64
# Version of the enciphered form, a part of the source's identity.
FORMAT = 1

_KEEP = ALPHABET + '\n'


@dataclasses.dataclass(frozen=True)
class CipherSource(SourceOptions):
  """Pieces of Python's library, each in one of K substitution ciphers."""

  num_ciphers: int = option(
    8,
    'Number K of substitution ciphers; the alphabet of a cipher does not '
    'depend on K.',
    minimum=1,
    maximum=len(MARKS),
  )
  marked: bool = option(
    False,
    'Whether each enciphered piece begins with a character that marks its '
    'cipher; rows that begin within a piece do not have the mark.',
  )
  modules: str = option(
    '', 'Modules whose text is enciphered, as those of `python_stdlib`.'
  )
  train_bytes: int = option(
    0,
    'Number of bytes of text of the training split, as that of '
    '`python_stdlib`; 0 takes all.',
    minimum=0,
  )

  def texts(self, selection: Selection = Selection()) -> Texts:
    """The enciphered pieces, each as a document."""
    plain = PythonStdlibSource(self.modules, self.train_bytes)
    plain = plain.texts(selection)
    marked = ', marked,' * self.marked
    return Texts(
      f'synthetic: {self.num_ciphers} ciphers{marked} of {plain.name}',
      f'cipher {FORMAT} {self.num_ciphers} {self.marked} {PIECE} '
      f'{plain.identity}',
      lambda split: documents(
        plain.texts(split), self.num_ciphers, marked=self.marked
      ),
    )


def documents(
  texts: Iterable[str], num_domains: int, *, marked: bool
) -> Iterator[str]:
  """Every piece of `texts` in the alphabet of a domain, each as a document.

  The domains take turns, so that a batch of neighbouring pieces, as in an
  evaluation, has all domains.
  """
  turns = itertools.cycle(range(num_domains))
  for text in texts:
    # Pieces come first, so that `zip` takes no turn after the last.
    for piece, domain in zip(pieces(text), turns):
      mark = MARKS[domain] if marked else ''
      yield mark + encipher(piece, domain)


def pieces(text: str) -> Iterator[str]:
  """The text cut every `PIECE` characters; the last may be shorter.

  Characters other than printable ASCII and line ends are left out.
  """
  printable = ''.join(filter(_KEEP.__contains__, text))
  return (printable[i : i + PIECE] for i in range(0, len(printable), PIECE))


def encipher(text: str, domain: int) -> str:
  """The text in the domain's alphabet, of the same length.

  The alphabet of domain 0 is mixed, too.
  """
  return text.translate(_table(domain))


@functools.lru_cache(maxsize=len(MARKS))
def _table(domain: int) -> dict[int, int]:
  # A hash sorts the letters, as numpy may change the draws of generators.
  def rank(letter):
    return hashlib.sha256(f'cipher {domain} {letter}'.encode()).digest()

  return str.maketrans(ALPHABET, ''.join(sorted(ALPHABET, key=rank)))
