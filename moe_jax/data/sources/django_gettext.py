"""Translations of an interface: the gettext catalogues inside PyPI's django.

No code of django is imported or run.
"""

import dataclasses
import functools
import gettext
import hashlib
import importlib.metadata
import importlib.util
import io
import pathlib
import struct
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

from moe_jax.config import option, unknown
from moe_jax.data.contracts import Pairs, Selection, SourceOptions
from moe_jax.data.sources.python_stdlib import split_of
from moe_jax.data.store import Digest
from moe_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class GettextSource(SourceOptions):
  """Messages of django's interface and their translations."""

  languages: str = option(
    '',
    'Languages of the translations, by the names of django, separated by '
    "commas: 'de,pt_BR'; '' is all languages.",
  )
  metric: ClassVar[str] = 'chrf'

  def pairs(self, selection: Selection = Selection()) -> Pairs:
    """Pairs whose inputs are `de: Save`, a language and a message in English.

    The targets are the translation into that language. A message is in the same
    split in every language.

    Raises:
      ValueError: The package django is missing or has no such language, or a
        split is neither 'train' nor 'validation'.
    """
    selection.check_splits('django_gettext')
    languages = self.languages.split(',') if self.languages else []
    messages = pairs(languages, locate())
    digest = Digest()
    for pair in messages:
      digest.text(pair.inputs.encode())
      digest.text(pair.translation.encode())

    def of_split(split: str) -> Iterator[tuple[str, str]]:
      for pair in messages:
        if split_of(pair.message) == selection.name_of(split):
          yield pair.inputs, pair.translation

    version = importlib.metadata.version('django')
    part = f':{self.languages}' * bool(self.languages)
    count = len({pair.language for pair in messages})
    return Pairs(
      f'django_gettext{part} of django {version} ({count} languages)',
      f'gettext {digest.hexdigest()} {selection.splits}',
      of_split,
    )


class Pair(NamedTuple):
  """A message and its translation.

  Attributes:
    language: django's name of the language, such as 'pt_BR'.
    message: The English message.
    translation: The translation; for a message with plurals, the translation
      of the singular.
  """

  language: str
  message: str
  translation: str

  @property
  def inputs(self) -> str:
    """The inputs of a model of several languages: `de: Save`."""
    return f'{self.language}: {self.message}'


def locate() -> pathlib.Path:
  """The folder of the installed django.

  Raises:
    ValueError: django is not installed.
  """
  spec = importlib.util.find_spec('django')
  if spec is None or not spec.submodule_search_locations:
    raise InputError(
      'source django_gettext reads catalogues of django, which is not '
      "installed: pip install -e '.[experiments]', or django alone"
    )
  return pathlib.Path(spec.submodule_search_locations[0])


@functools.cache
def _catalogues(root: pathlib.Path) -> dict[str, list[pathlib.Path]]:
  """The paths of the catalogues by language.

  The result is cached, as the search goes through many folders.
  """
  by_language = {}
  for path in sorted(root.rglob('locale/*/LC_MESSAGES/*.mo')):
    by_language.setdefault(path.parts[-3], []).append(path)
  return by_language


def pairs(languages: Sequence[str], root: pathlib.Path) -> list[Pair]:
  """The pairs of some languages, in the order of a hash.

  A message has one translation in each language: the first that belongs to no
  gettext context, or else the first of all.

  Args:
    languages: Names such as 'de', 'pt_BR'; an empty list is all languages.
    root: A folder with `.../locale/<language>/LC_MESSAGES/*.mo`.

  Raises:
    ValueError: There is no catalogue of a language.
  """
  catalogues = _catalogues(root)
  for language in languages:
    if language not in catalogues:
      raise unknown('language of django_gettext', language, catalogues)
  every = {
    Pair(language, message, translation)
    for language in languages or catalogues
    for message, translation in _merged(catalogues[language]).items()
    if translation.strip()
  }
  # A hash orders the pairs, so that neighbouring pairs, which may share a row
  # of tokens, have nothing in common.
  return sorted(every, key=lambda p: hashlib.sha256(p.inputs.encode()).digest())


def _merged(paths: Sequence[pathlib.Path]) -> dict[str, str]:
  plain, in_context = {}, {}
  for path in paths:
    for key, translation in read_catalogue(path.read_bytes()):
      _, separator, message = key.rpartition('\x04')
      (in_context if separator else plain).setdefault(message, translation)
  return in_context | plain


def read_catalogue(content: bytes) -> Iterator[tuple[str, str]]:
  r"""Yields (message, translation) for every message of a compiled catalogue.

  A message with a context is preceded by the context and `\x04`. The entry of
  the empty message, which describes the catalogue, is left out.
  """
  catalogue = gettext.GNUTranslations(io.BytesIO(content))
  # A catalogue begins with 0x950412de, in the order of its bytes.
  order = '<' if content[:4] == b'\xde\x12\x04\x95' else '>'
  # The module gettext can look up a message, but does not list all messages.
  count, table = struct.unpack(f'{order}2I', content[8:16])
  for i in range(count):
    length, offset = struct.unpack_from(f'{order}2I', content, table + 8 * i)
    # A plural may follow the singular after a zero byte.
    message = content[offset : offset + length].split(b'\0')[0].decode()
    if message:
      yield message, catalogue.gettext(message)
