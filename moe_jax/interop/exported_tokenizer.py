"""A run's tokenizer as files from which transformers encodes texts equally."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any, cast

import tokenizers as library

from moe_jax.data import tokenizers
from moe_jax.data.tokenizers import Tokenizer

_CONFIG, _JSON, _MODEL = (
  'tokenizer_config.json',
  'tokenizer.json',
  'tokenizer.model',
)
_EOS = '<eos>'
_ROLES = 'bos', 'eos', 'pad'


def write(tokenizer: Tokenizer | None, output: pathlib.Path) -> str:
  """Writes a tokenizer into an exported folder; returns a line about it.

  Bytes and characters become a `tokenizer.json` with the same ids, in which the
  name of a special token in a text is text, as here; unless a task added ids,
  whose names transformers reads as these ids, as inputs here do.
  """
  base, names, ends_in_eos = _without_task_ids(tokenizer)
  if isinstance(base, tokenizers.SentencePiece):
    (output / _MODEL).write_bytes(base.file_content())
    return (
      f'{_MODEL} is the SentencePiece model; transformers converts it by rules '
      'of its own: compare its ids'
      + ', and it is without the ids that the task added' * bool(names)
      + '; inputs here end in an EOS' * ends_in_eos
    )
  model = _model(base)
  if model is None:
    return 'transformers has no such tokenizer; the folder has none'
  has_names = _add_names(model, tokenizer, names)
  roles = {
    f'{role}_token': token
    for role in _ROLES
    if (token_id := getattr(tokenizer, f'{role}_id')) is not None
    and (token := model.id_to_token(token_id)) is not None  # one of the task's
  }
  if ends_in_eos and has_names and model.post_processor is None:
    eos_id = cast(Any, tokenizer).eos_id
    eos = model.id_to_token(eos_id)
    model.post_processor = library.processors.TemplateProcessing(
      single=f'$A {eos}',
      pair=f'$A {eos} $B {eos}',
      special_tokens=[(eos, eos_id)],
    )
  (output / _JSON).write_text(model.to_str(pretty=True), encoding='utf-8')
  config: dict[str, Any] = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    **roles,
  }
  config['clean_up_tokenization_spaces'] = False
  if not isinstance(base, tokenizers.Json) and not names:
    config['split_special_tokens'] = True
  (output / _CONFIG).write_text(json.dumps(config, indent=2) + '\n')
  if not has_names:
    return 'the tokenizer is there too, without the ids that the task added'
  return 'the tokenizer is there too'


def _without_task_ids(
  tokenizer: Tokenizer | None,
) -> tuple[Tokenizer | None, tuple[str, ...], bool]:
  """The tokenizer below the ids of a task, their names, and inputs' ending."""
  if isinstance(tokenizer, tokenizers.Extended):
    return tokenizer.base, tokenizer.names, tokenizer.end_inputs
  return tokenizer, (), False


def _model(tokenizer: Tokenizer | None) -> library.Tokenizer | None:
  """The tokenizer as the `tokenizers` library has it; None if it has none."""
  if isinstance(tokenizer, tokenizers.Json):
    return library.Tokenizer.from_str(tokenizer.model_json())
  if isinstance(tokenizer, tokenizers.Bytes):
    return _byte_model()
  if isinstance(tokenizer, tokenizers.Chars):
    return _character_model(tokenizer.characters)
  return None


def _byte_model() -> library.Tokenizer:
  """A byte-level model without merges; the id of a token is its byte."""
  alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
  # Printable bytes stand for themselves; the others, in order, for the
  # characters from U+0100 on.
  other_characters = iter(
    character for character in alphabet if ord(character) > 0xFF
  )
  vocabulary = {
    chr(byte) if chr(byte) in alphabet else next(other_characters): byte
    for byte in range(256)
  }
  model = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=[]))
  model.pre_tokenizer = library.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  model.decoder = library.decoders.ByteLevel()
  model.add_special_tokens([_EOS])
  return model


def _character_model(characters: str) -> library.Tokenizer:
  """A model of characters, which refuses unknown characters."""
  vocabulary = {character: i for i, character in enumerate(characters)}
  model = library.Tokenizer(library.models.WordLevel(vocabulary, _EOS))
  model.pre_tokenizer = library.pre_tokenizers.Split(
    library.Regex(r'[\s\S]'), 'isolated'
  )
  model.decoder = library.decoders.Fuse()
  return model


def _add_names(
  model: library.Tokenizer, tokenizer: Tokenizer | None, names: Sequence[str]
) -> bool:
  """Adds the names of a task's ids to a model whose next ids they are.

  Returns whether the model has them all.
  """
  size = model.get_vocab_size(with_added_tokens=True)
  if names and cast(Any, tokenizer).token_id(names[0]) != size:
    return False
  model.add_special_tokens(list(names))
  return True
