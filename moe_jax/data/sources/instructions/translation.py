"""The cluster 'translation': messages of an interface in other languages.

It reads the catalogues of PyPI's django, and can be used where that is
installed.
"""

import collections
import dataclasses
import functools

from moe_jax.data.sources import django_gettext
from moe_jax.data.sources.instructions.contract import Dice, Drawn, cluster_of

NAMES = {'de': 'German', 'es': 'Spanish', 'fr': 'French'}
# Characters of the longest message or translation.
_LONGEST = 80

version = django_gettext.version


@functools.cache
def _pairs() -> tuple[django_gettext.Pair, ...]:
  root = django_gettext.locate()
  return tuple(
    pair
    for pair in django_gettext.pairs([*NAMES], root)
    if len(pair.message) <= _LONGEST and len(pair.translation) <= _LONGEST
  )


@functools.cache
def _of(language: str) -> tuple[django_gettext.Pair, ...]:
  return tuple(pair for pair in _pairs() if pair.language == language)


def _into(dice: Dice, language: str) -> Drawn:
  pair = dice.one(_of(language))
  return Drawn(pair.message, pair.translation)


def _into_english(dice: Dice) -> Drawn:
  pair = dice.one(_pairs())
  return Drawn(pair.translation, pair.message, key=pair.message)


@functools.cache
def _of_one_language() -> tuple[django_gettext.Pair, ...]:
  """The pairs whose translation is in one language alone, not English."""
  count = collections.Counter(pair.translation for pair in _pairs())
  count.update({pair.message for pair in _pairs()})
  return tuple(pair for pair in _pairs() if count[pair.translation] == 1)


def _language(dice: Dice) -> Drawn:
  pair = dice.one(_of_one_language())
  return Drawn(
    pair.translation,
    NAMES[pair.language],
    tuple(NAMES.values()),
    key=pair.message,
  )


_EVERY = cluster_of(
  'translation',
  **{
    f'into_{name.lower()}': (
      functools.partial(_into, language=language),
      (
        f'{name}: {{question}}',
        f'Translate into {name}.\n{{question}}',
        f'{{question}}\nIn {name}:',
      ),
    )
    for language, name in NAMES.items()
  },
  into_english=(
    _into_english,
    (
      'English: {question}',
      'Translate into English.\n{question}',
      '{question}\nIn English:',
    ),
  ),
  language=(
    _language,
    (
      'Language: {question}',
      'Which language is this?\n{question}',
      '{question}\nThis is',
    ),
  ),
)
TASKS = tuple(
  dataclasses.replace(task, metric='chrf', needs='django') for task in _EVERY
)
