"""Tokenizers that are trained on the texts of the data.

Byte-level BPE (https://arxiv.org/abs/1508.07909, on bytes as in GPT-2) is
trained by the `tokenizers` library, and unigram models
(https://arxiv.org/abs/1804.10959) by `sentencepiece`, as each of the two gives
equal models for equal texts; the unigram trainer of `tokenizers` does not.
"""

import dataclasses
import io
from collections.abc import Iterable, Iterator

import tokenizers

from moe_jax.config import option
from moe_jax.data.contracts import Tokenizer, TokenizerOptions
from moe_jax.data.plain_files import first_line
from moe_jax.data.tokenizers.extra_ids import EOS
from moe_jax.data.tokenizers.json_tokenizer import Json
from moe_jax.data.tokenizers.sentencepiece_tokenizer import (
  SentencePiece,
  library,
)
from moe_jax.errors import InputError

# The least size of a vocabulary, which has the 256 bytes and the EOS, and for
# unigram models an unknown id, a tab and a newline. With these ids every text
# can be encoded, and decoded again.
_FEWEST = 260
_LINE = 2000  # characters of a line that a unigram model is trained on
# Largest number of characters that a tokenizer is trained on. A unigram model
# takes about 2.5 s and 21 MiB for each million, BPE a quarter of a second.
MOST = 2**26


@dataclasses.dataclass(frozen=True)
class TrainedOptions(TokenizerOptions):
  """Options of a tokenizer that is trained on the texts of both splits.

  If the texts have more than `MOST` characters, only every second, fourth, ...
  document is taken.
  """

  model: str = option(
    'bpe',
    "Model of the tokenizer: 'bpe' merges pairs of bytes that are frequent, "
    "'unigram' chooses pieces by their probabilities. Both know every text; of "
    'more than 67 million characters they are trained on an even part.',
    choices=('bpe', 'unigram'),
  )
  vocab_size: int = option(
    8192,
    'Number of tokens, with the EOS and the 256 bytes; few texts may give '
    'fewer.',
    minimum=_FEWEST,
  )

  def identity(self) -> str:
    """The kind and size of the tokenizer, not the texts it is trained on.

    The identity of the data covers the texts.
    """
    return f'trained {self.model} {self.vocab_size}'

  def fit(self, texts: Iterable[str]) -> Tokenizer:
    """A tokenizer trained on a sample of the texts.

    Equal texts give equal tokenizers.

    Raises:
      ValueError: The texts are empty.
    """
    train = {'bpe': _bpe, 'unigram': _unigram}[self.model]
    return train(spread(texts, MOST), self.vocab_size)


def spread(texts: Iterable[str], most: int) -> list[str]:
  """Chooses every document, or every second, fourth, ..., up to a size.

  Args:
    texts: The documents, which need not fit into memory.
    most: Number of characters that the chosen documents have at most together;
      a single document may have more.
  """
  chosen: list[str] = []
  step, size = 1, 0
  for number, text in enumerate(texts):
    if number % step:
      continue
    chosen.append(text)
    size += len(text)
    while size > most and len(chosen) > 1:
      chosen, step = chosen[::2], 2 * step
      size = sum(map(len, chosen))
  return chosen


def _bpe(texts: Iterable[str], vocab_size: int) -> Json:
  byte_level = tokenizers.pre_tokenizers.ByteLevel
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = byte_level(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[EOS],
    initial_alphabet=sorted(byte_level.alphabet()),
    show_progress=False,
  )
  model.train_from_iterator(texts, trainer)
  return Json(model.to_str())


def _unigram(texts: Iterable[str], vocab_size: int) -> SentencePiece:
  written, trainer = io.BytesIO(), library().SentencePieceTrainer
  try:
    trainer.train(
      sentence_iterator=_lines(texts),
      model_writer=written,
      model_type='unigram',
      vocab_size=vocab_size,
      hard_vocab_limit=False,
      num_threads=1,  # for a fixed order of sums
      minloglevel=2,
      # With the next options a text loses no character, space or line.
      byte_fallback=True,
      normalization_rule_name='identity',
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True,
      user_defined_symbols=['\n', '\t'],
      unk_id=0,
      eos_id=1,
      eos_piece=EOS,
      bos_id=-1,
    )
  except (RuntimeError, ValueError) as error:
    raise InputError(
      f'no unigram model of vocab_size={vocab_size} can be trained on these '
      f'texts: {first_line(error)}'
    ) from None
  return SentencePiece(written.getvalue())


def _lines(texts: Iterable[str]) -> Iterator[str]:
  """The lines of the texts, cut where a line is too long for the trainer."""
  for text in texts:
    for line in text.split('\n'):
      for start in range(0, len(line), _LINE):
        yield line[start : start + _LINE]
