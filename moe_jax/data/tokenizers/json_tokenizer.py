"""A Hugging Face `tokenizers` model, with the special tokens of its folder."""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.data.plain_files import plain, read_text
from moe_jax.data.tokenizers import chat
from moe_jax.data.tokenizers.contract import (
  Ids,
  Token,
  Tokenizer,
  TokenizerOptions,
  digest,
)
from moe_jax.data.tokenizers.special_tokens import (
  SENTENCEPIECE,
  SpecialTokens,
  from_folder,
)
from moe_jax.data.tokenizers.tokenizers_library import (
  encoded,
  read_model,
  vocabulary_of,
)
from moe_jax.errors import InputError
from moe_jax.options import NOT_EMPTY, option, unknown

# Names of the EOS in well-known vocabularies; the first that exists is taken.
EOS_NAMES = ('<eos>', '</s>', '<|endoftext|>', '<|end_of_text|>', '[EOS]')
_SENTINEL = re.compile(r'<extra_id_(\d+)>')
_LANGUAGE = re.compile(r'[a-z]{3}_[A-Z][a-z]{3}')


class Json(Tokenizer, kind='json'):
  """A Hugging Face `tokenizers` model.

  `encode` leaves out the special tokens that the post-processor would add, and
  encodes text that spells a special token as text, so that no document can
  forge an EOS. Truncation and padding are off. A model with neither an unknown
  token nor all bytes in its vocabulary drops unknown text.

  Args:
    text: Content of a `tokenizer.json`.
    special: Special tokens of the model; with None, for a file without a
      folder, the EOS is the first of `EOS_NAMES` in the vocabulary, and there
      are no other special tokens.

  Attributes:
    num_tokens: One more than the largest id that has a token; `vocab_size` is
      that of the model, which may be larger.

  Raises:
    ValueError: The text is no such file, it has no token or an id that is too
      large, or a special token has no possible id.
  """

  def __init__(self, text: str, special: SpecialTokens | None = None):
    self._model = read_model(text)
    self._model.encode_special_tokens = True
    # Prompts need a copy, as the flag above is a setting of the model.
    self._prompts = read_model(text)
    self._vocabulary = vocabulary_of(self._model)
    self.vocab_size = max(self._vocabulary.values()) + 1
    self._saved_special = special
    if special is None:
      ids = [self._vocabulary.get(name) for name in EOS_NAMES]
      special = SpecialTokens(eos=tuple(i for i in ids if i is not None)[:1])
    if problems := list(special.problems(self.vocab_size)):
      raise InputError('special tokens: ' + '; '.join(problems))
    self.special = special
    self.num_tokens = self.vocab_size
    self.vocab_size = max(self.vocab_size, special.vocab_size)
    self.eos_id = special.eos[0] if special.eos else None
    self.bos_id = special.bos
    self.pad_id = special.pad
    self.forced_bos_id = special.forced_bos
    self.sentinel_ids = _sentinels(self._vocabulary)
    self.identity = f'json:{digest(self._model.to_str() + self._roles())}'

  def _roles(self) -> str:
    if self._saved_special is None:
      return ''
    roles = {**self._saved_special.to_json(), 'chat_template': '', 'names': {}}
    return json.dumps(roles, sort_keys=True)

  @classmethod
  def from_folder(cls, folder: pathlib.Path) -> 'Json':
    """The tokenizer of a model's folder, with its special tokens.

    Raises:
      ValueError: There is no `tokenizer.json`, or a file is damaged.
    """
    path = plain(folder, 'tokenizer.json')
    if path is None:
      models = [name for name in SENTENCEPIECE if plain(folder, name)]
      note = f', only {models[0]}' if models else ''
      advice = ''
      if models:
        advice = (
          '; or name it, --config.data.tokenizer.kind=file '
          f'--config.data.tokenizer.file.path={folder / models[0]}'
        )
      raise InputError(
        f'{folder} has no tokenizer.json{note}. Make one where transformers '
        'and sentencepiece are installed: AutoTokenizer.from_pretrained('
        f'{str(folder)!r}).save_pretrained({str(folder)!r}){advice}'
      )
    try:
      text = read_text(path)
      return cls(text, from_folder(folder, vocabulary_of(read_model(text))))
    except InputError as error:
      if str(folder) in str(error):
        raise
      raise InputError(f'{folder}: {error}') from None

  @property
  def start_id(self) -> int | None:
    """The start id of the decoder, or else the EOS."""
    return self.eos_id if self.special.start is None else self.special.start

  @property
  def eos_ids(self) -> tuple[int, ...]:
    """The ids that end generation."""
    return self.special.eos

  def encode(self, text: str) -> np.ndarray:
    """The model's ids, int32 [N], without special tokens."""
    encoding = encoded(self._model, text, add_special_tokens=False)
    return np.asarray(encoding.ids, np.int32)

  def encode_inputs(self, text: str, language: str = '') -> np.ndarray:
    """The ids of a prompt, int32 [N], as in `transformers`.

    The post-processor adds its tokens (T5 an EOS, NLLB a language and an EOS),
    and names of special tokens in the text become those tokens.

    Args:
      text: Text of the prompt.
      language: Language code that replaces the one that the post-processor
        adds; '' keeps that one.

    Raises:
      ValueError: The language is no token, or the post-processor adds no
        language code.
    """
    encoding = encoded(self._prompts, text)
    ids = np.asarray(encoding.ids, np.int32)
    if not language:
      return ids
    tokens = zip(encoding.tokens, encoding.sequence_ids)
    added = [
      i
      for i, (token, source) in enumerate(tokens)
      if source is None and _LANGUAGE.fullmatch(token)
    ]
    if not added:
      raise InputError(
        f'language={language!r}: the tokenizer adds no language code'
      )
    ids[added] = self.token_id(language)
    return ids

  def encode_spelled(self, text: str) -> np.ndarray:
    """The ids of a part of a prompt, int32 [N]; the post-processor adds none.

    Names of special tokens in the text become those tokens.
    """
    encoding = encoded(self._prompts, text, add_special_tokens=False)
    return np.asarray(encoding.ids, np.int32)

  def encode_chat(
    self, messages: Sequence[chat.Message], **variables: Any
  ) -> np.ndarray:
    """The ids of a conversation, int32 [N]; see `chat.render`.

    Raises:
      ValueError: There is no chat template, or it refuses the messages.
    """
    if not self.special.chat_template:
      raise InputError('the tokenizer came without a chat template')
    text = chat.render(
      self.special.chat_template,
      messages,
      names=self.special.names,
      **variables,
    )
    return self.encode_spelled(text)

  def token_id(self, token: str) -> int:
    """The id of a token by its name in the vocabulary: 'fra_Latn'.

    Raises:
      ValueError: There is no such token.
    """
    if token not in self._vocabulary:
      special = [
        added.content
        for added in self._model.get_added_tokens_decoder().values()
      ]
      raise unknown('token', token, special)
    return self._vocabulary[token]

  def decode(self, ids: Ids) -> str:
    """The text of `ids`; special tokens are left out."""
    return self._model.decode(self._in_vocabulary(ids).tolist())

  def token_name(self, token: Token) -> str:
    """The token's quoted text; its name if it is part of a character."""
    (token,) = self._in_vocabulary([token]).tolist()
    if token == self.eos_id:
      return '<eos>'
    text = self._model.decode([int(token)])
    if text and '\ufffd' not in text:
      return repr(text)
    return self._model.id_to_token(int(token)) or f'<{token}>'

  def state(self) -> dict[str, Any]:
    """The whole model and, where they were given, the special tokens."""
    saved = {'model': json.loads(self._model.to_str())}
    if self._saved_special is not None:
      saved['special'] = self._saved_special.to_json()
    return saved

  @classmethod
  def from_state(cls, state: Mapping[str, Any]) -> 'Json':
    """See `Tokenizer.from_state`."""
    special = state.get('special')
    special = None if special is None else SpecialTokens.from_json(special)
    return cls(json.dumps(state['model']), special)

  def vocabulary_name(self, token: Token) -> str:
    """The name of a token in the vocabulary; '' if no token has the id."""
    return self._model.id_to_token(int(token)) or ''

  def model_json(self) -> str:
    """The model as the content of a `tokenizer.json`."""
    return self._model.to_str(pretty=True)


@dataclasses.dataclass(frozen=True)
class JsonOptions(TokenizerOptions):
  """Options of a `tokenizers` model in a file or folder."""

  path: str = option(
    dataclasses.MISSING,
    'Path of a tokenizer.json file, or of the folder of a Hugging Face model, '
    'whose special tokens and chat template are then read, too.',
    NOT_EMPTY,
  )

  def identity(self) -> str:
    """See `TokenizerOptions.identity`; the file is read for it."""
    return self._tokenizer().identity

  def fit(self, texts: Iterable[str]) -> Json:
    """The tokenizer of the file; it does not depend on the texts."""
    del texts
    return self._tokenizer()

  def known_vocab_size(self) -> int:
    """V of the tokenizer in the file."""
    return self._tokenizer().vocab_size

  def _tokenizer(self) -> Json:
    path = pathlib.Path(self.path).expanduser()
    if path.is_dir():
      return Json.from_folder(path)
    if not path.is_file():
      raise InputError(f'tokenizer json: no file {path} in {os.getcwd()}')
    try:
      return Json(read_text(path))
    except InputError as error:
      raise InputError(
        f"tokenizer json: {path}: {error}; tokenizer.kind='file' reads a run's "
        'file or a SentencePiece model'
      ) from None


def _sentinels(vocabulary: dict[str, int]) -> tuple[int, ...]:
  """The ids of T5's sentinels, in the order of their numbers."""
  by_number = {}
  for token, i in vocabulary.items():
    if match := _SENTINEL.fullmatch(token):
      by_number[int(match[1])] = i
  return tuple(by_number[n] for n in sorted(by_number))
