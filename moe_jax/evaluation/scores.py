"""Scores of outputs by targets: BLEU, chrF, ROUGE-L, exact match.

All scores are in percent, as papers print them. BLEU
(https://aclanthology.org/P02-1040) and chrF (https://aclanthology.org/W15-3049)
are sacrebleu's (https://arxiv.org/abs/1804.08771); ROUGE-L is of
https://aclanthology.org/W04-1013.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moe_jax.config import unknown
from moe_jax.errors import InputError, from_extra

Texts = Sequence[str]
METRICS = ('bleu', 'chrf', 'rouge_l', 'exact_match')


@dataclasses.dataclass(frozen=True)
class Score:
  """A score that compares generated outputs with targets.

  Attributes:
    compute: Function from outputs, at least one, and as many targets to the
      score in percent.
    signature: Function that returns a text, for printing, on how the score is
      computed; it must not be called before `compute`.
  """

  compute: Callable[[Texts, Texts], float]
  signature: Callable[[], str]


def names_of(names: str) -> list[str]:
  """The names in a list that is separated by commas."""
  return [name.strip() for name in names.split(',')]


def make_scores(names: str, bleu_tokenizer: str = '13a') -> dict[str, Score]:
  """The named scores, in the order of their names.

  Args:
    names: Some of `METRICS`, separated by commas. 'bleu' and 'chrf' are of the
      whole corpus, 'rouge_l' and 'exact_match' are means over examples.
    bleu_tokenizer: sacrebleu's name of the way in which BLEU splits words.

  Raises:
    ValueError: A name is unknown, or sacrebleu has no such tokenizer here.
  """
  makers = {
    'bleu': lambda: _sacrebleu_score('BLEU', tokenize=bleu_tokenizer),
    'chrf': lambda: _sacrebleu_score('CHRF'),
    'rouge_l': lambda: Score(rouge_l, lambda: 'F1, lower case, no stemming'),
    'exact_match': lambda: Score(exact_match, lambda: 'but for outer spaces'),
  }
  scores = {}
  for name in names_of(names):
    if name not in makers:
      raise unknown('metric', name, METRICS)
    scores[name] = makers[name]()
  return scores


def _sacrebleu_score(kind: str, **options: Any) -> Score:
  # sacrebleu is imported only here, since few runs score texts, and an import
  # at the top of the file would delay all runs.
  metrics = from_extra('sacrebleu.metrics', 'scores', f'the score {kind}')
  tokenizers = metrics.BLEU.TOKENIZERS
  if options.get('tokenize', '13a') not in tokenizers:
    raise unknown('bleu_tokenizer', options['tokenize'], tokenizers)
  try:
    metric = getattr(metrics, kind)(**options)
  except Exception as error:  # a package or a download that is missing
    raise InputError(f'sacrebleu, {kind} with {options}: {error}') from error
  return Score(
    lambda outputs, targets: metric.corpus_score(outputs, [targets]).score,
    lambda: str(metric.get_signature()),
  )


def exact_match(outputs: Texts, targets: Texts) -> float:
  """Percentage of outputs that equal their targets, apart from outer spaces."""
  pairs = zip(outputs, targets, strict=True)
  return 100 * float(np.mean([o.strip() == t.strip() for o, t in pairs]))


def rouge_l(outputs: Texts, targets: Texts) -> float:
  """The mean F1 of longest common subsequences of words, in percent.

  Words are runs of letters and digits in lower case. On ASCII text the score is
  the `rougeL` of PyPI's rouge-score, without its stemmer; a text is one
  sequence, whatever its lines (`rougeLsum` is another score).
  """
  pairs = zip(outputs, targets, strict=True)
  return 100 * float(np.mean([_f1(_words(o), _words(t)) for o, t in pairs]))


def _words(text: str) -> list[str]:
  return re.findall(r'[^\W_]+', text.lower())


def _f1(output: list[str], target: list[str]) -> float:
  """The F1, from 0 to 1, of the longest common subsequence of words."""
  if not output or not target:
    return 0.0
  return 2 * _longest_common(output, target) / (len(output) + len(target))


def _longest_common(a: list[str], b: list[str]) -> int:
  """The length of the longest common subsequence of two lists of words."""
  ids = {word: i for i, word in enumerate(dict.fromkeys(a + b))}
  # row[j] is the longest common length of a's words so far and b[:j].
  row = np.zeros(len(b) + 1, np.int32)
  words = np.array([ids[word] for word in b])
  for word in a:
    extended = np.append(0, row[:-1] + (words == ids[word]))
    row = np.maximum.accumulate(np.maximum(row, extended))
  return int(row[-1])
