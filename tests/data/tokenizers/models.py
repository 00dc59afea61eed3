"""Small models of SentencePiece and of `tokenizers`, trained for tests."""

import functools
import io

import sentencepiece
import tokenizers

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
def model_bytes(**options: str | int | bool) -> bytes:
  """Trains a model; returns the content of its file."""
  model_file = io.BytesIO()
  options |= dict(hard_vocab_limit=False, minloglevel=2, num_threads=1)
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(WORDS * 4), model_writer=model_file, **options
  )
  return model_file.getvalue()


def unigram() -> bytes:
  """Trains a model like T5's: NFKC, a first space, an unknown id, padding."""
  return model_bytes(
    model_type='unigram', vocab_size=60, pad_id=0, eos_id=1, unk_id=2, bos_id=-1
  )


def bpe() -> bytes:
  """Trains a model like Mixtral's: text as it is, bytes, a user's symbol."""
  return model_bytes(
    model_type='bpe',
    vocab_size=320,
    byte_fallback=True,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    user_defined_symbols='<sep>',
  )


def byte_level(*special: str, unknown: str | None = None):
  """Trains a model of `tokenizers` like GPT-2's: letters for bytes, and merges.

  The ids of the special tokens come first.
  """
  byte_level = tokenizers.pre_tokenizers.ByteLevel
  model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=unknown))
  model.pre_tokenizer = byte_level(add_prefix_space=False)
  model.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=list(special or ['</s>']),
    initial_alphabet=byte_level.alphabet(),
    show_progress=False,
  )
  model.train_from_iterator(['the cat and the hat, the end'] * 3, trainer)
  return model
