"""Small SentencePiece models, trained for tests."""

import functools
import io

import sentencepiece

WORDS = ['the cat and the hat', 'Größe, größer', '日本 の 猫', 'x = [1, 2]\n']
TEXTS = [
  'the cat',
  '',
  ' ',
  '  two  spaces and an end ',
  'tab\there,\nline\r\n\n',
  'Größe 日本の猫 👍🏽 مرحبا',
  'e\u0301 \u00bd \ufb01 \uff21 \u200b\u00a0',  # composed and wide forms
  'a<sep>b </s> <unk> \u2581',
  'zq\x00\x7f',
]


@functools.cache
def trained(**options: str | int | bool) -> bytes:
  """The content of a model's file."""
  written = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(WORDS * 4),
    model_writer=written,
    hard_vocab_limit=False,
    minloglevel=2,
    num_threads=1,
    **options,
  )
  return written.getvalue()


def unigram() -> bytes:
  """A model as that of T5: NFKC, a space before, an unknown id, padding."""
  return trained(
    model_type='unigram', vocab_size=60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1
  )


def bpe() -> bytes:
  """A model as that of Mixtral: as written, bytes, and a symbol of a user."""
  return trained(
    model_type='bpe',
    vocab_size=320,
    byte_fallback=True,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    user_defined_symbols='<sep>',
  )
