"""A Hugging Face `tokenizers` model, with the special tokens of its folder."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from moe_jax.config import unknown
from moe_jax.data.contracts import Ids, Token, Tokenizer, digest
from moe_jax.data.plain_files import first_line, plain, read_json, read_text
from moe_jax.data.tokenizers import chat
from moe_jax.errors import InputError

# Files of tokenizers that have to be converted before they can be read.
SENTENCEPIECE_FILES = (
  'spiece.model',
  'tokenizer.model',
  'sentencepiece.bpe.model',
)
_NAMES = ('bos', 'eos', 'pad', 'unk')
# Fields of `SpecialTokens` that are a single id; files name them with
# '_token_id' at the end.
_ROLES = ('bos', 'pad', 'start', 'forced_bos')
_LARGEST_ID = 2**31 - 1
# Names of the EOS in well-known vocabularies; the first that exists is taken.
EOS_NAMES = ('<eos>', '</s>', '<|endoftext|>', '<|end_of_text|>', '[EOS]')
_SENTINEL = re.compile(r'<extra_id_(\d+)>')
_LANGUAGE = re.compile(r'[a-z]{3}_[A-Z][a-z]{3}')


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
  """Ids of special tokens; None or empty if there is none.

  Attributes:
    bos: Id that begins a document.
    eos: Ids that end generation; a document ends with the first.
    pad: Id of padding.
    start: Id that begins a decoder's input.
    forced_bos: Id that generation always emits first.
    vocab_size: V of the model, which may be above the number of tokens; 0 if no
      config gives it.
    names: Spellings of tokens by role, 'bos', 'eos', 'pad' or 'unk', for chat
      templates: {'bos': '<s>'}.
    chat_template: Jinja template of conversations; '' if there is none.
  """

  bos: int | None = None
  eos: tuple[int, ...] = ()
  pad: int | None = None
  start: int | None = None
  forced_bos: int | None = None
  vocab_size: int = 0
  names: Mapping[str, str] = dataclasses.field(default_factory=dict)
  chat_template: str = ''

  def problems(self, num_tokens: int) -> Iterator[str]:
    """Yields a text for each field whose value is impossible.

    Args:
      num_tokens: The number of ids of the tokenizer; a model may have more.
    """
    if type(self.vocab_size) is not int or self.vocab_size < 0:
      yield f'vocab_size={self.vocab_size!r} is no number of tokens'
      return
    size = max(num_tokens, self.vocab_size)
    ids = [(role, getattr(self, role)) for role in _ROLES]
    ids = [(role, i) for role, i in ids if i is not None]
    for role, i in [*ids, *(('eos', i) for i in self.eos)]:
      if type(i) is not int or not 0 <= i < size:
        yield f'{role}_token_id={i!r} is no token id: an integer in [0, {size})'
    for name in ('chat_template', *self.names):
      value = self.names.get(name, self.chat_template)
      if not isinstance(value, str):
        yield f'{name} is {value!r:.80}, not a text'


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
    model: The library's object; its text is a `tokenizer.json`.
    num_tokens: One more than the largest id that has a token; `vocab_size` is
      the size of the model's vocabulary, which may be larger.

  Raises:
    ValueError: The text is no `tokenizer.json`, it has no token or an id that
      is too large, or a special token has no possible id.
  """

  def __init__(self, text: str, special: SpecialTokens | None = None):
    self.model, self._vocabulary = _read(text)
    self.model.encode_special_tokens = True
    # Prompts need a library object of their own, without the flag set above.
    self._prompts, _ = _read(text)
    self.num_tokens = max(self._vocabulary.values()) + 1
    self._saved_special = special
    if special is None:
      ids = [self._vocabulary.get(name) for name in EOS_NAMES]
      special = SpecialTokens(eos=tuple(i for i in ids if i is not None)[:1])
    if problems := list(special.problems(self.num_tokens)):
      raise InputError('special tokens: ' + '; '.join(problems))
    self.special = special
    self.vocab_size = max(self.num_tokens, special.vocab_size)
    self.eos_ids = special.eos
    self.eos_id = special.eos[0] if special.eos else None
    self.start_id = self.eos_id if special.start is None else special.start
    self.bos_id, self.pad_id = special.bos, special.pad
    self.forced_bos_id = special.forced_bos
    matches = map(_SENTINEL.fullmatch, self._vocabulary)
    by_number = {int(m[1]): self._vocabulary[m[0]] for m in matches if m}
    self.sentinel_ids = tuple(by_number[n] for n in sorted(by_number))
    content = self.model.to_str()
    if self._saved_special is not None:
      roles = dataclasses.replace(special, chat_template='', names={})
      content += json.dumps(dataclasses.asdict(roles), sort_keys=True)
    self.identity = f'json:{digest(content)}'

  @classmethod
  def from_folder(cls, folder: pathlib.Path) -> 'Json':
    """The tokenizer of a model's folder, with its special tokens.

    Raises:
      ValueError: There is no `tokenizer.json`, or a file is damaged.
    """
    path = plain(folder, 'tokenizer.json')
    if path is None:
      models = [name for name in SENTENCEPIECE_FILES if plain(folder, name)]
      model = folder / next(iter(models), 'tokenizer.model')
      raise InputError(
        f'{folder} has no tokenizer.json. Make one where transformers and '
        'sentencepiece are installed: AutoTokenizer.from_pretrained('
        f'{str(folder)!r}).save_pretrained({str(folder)!r}); or name a '
        'SentencePiece model, --config.data.tokenizer.kind=file '
        f'--config.data.tokenizer.file.path={model}'
      )
    try:
      text = read_text(path)
      _, vocabulary = _read(text)
      return cls(text, _special_tokens(folder, vocabulary))
    except InputError as error:
      if str(folder) in str(error):
        raise
      raise InputError(f'{folder}: {error}') from None

  def encode(self, text: str) -> np.ndarray:
    """The ids of a document's text, int32 [N], without special tokens."""
    encoding = _encoded(self.model.encode, text, add_special_tokens=False)
    return np.asarray(encoding.ids, np.int32)

  def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
    """The ids of each document's text, int32, by the library's own threads.

    The variable TOKENIZERS_PARALLELISM=false leaves one thread.
    """
    texts, encode = [*texts], self.model.encode_batch_fast
    try:
      encodings = _encoded(encode, texts, add_special_tokens=False)
    except InputError:  # The message of a single text names that text.
      return [self.encode(text) for text in texts]
    return [np.array(encoding.ids, np.int32) for encoding in encodings]

  def encode_inputs(
    self, text: str, language: str = '', *, added: bool = True
  ) -> np.ndarray:
    """The ids of a prompt, int32 [N], as in `transformers`.

    Names of special tokens in the text become those tokens.

    Args:
      text: Text of the prompt.
      language: Language code that replaces the code that the post-processor
        adds; '' keeps the added code.
      added: Whether the post-processor adds its tokens (T5 an EOS, NLLB a
        language and an EOS), as a whole prompt has them.

    Raises:
      ValueError: The language is no token, or the post-processor adds no
        language code.
    """
    encoding = _encoded(self._prompts.encode, text, add_special_tokens=added)
    ids = np.asarray(encoding.ids, np.int32)
    if language:
      tokens = zip(encoding.tokens, encoding.sequence_ids)
      is_added = [s is None and bool(_LANGUAGE.fullmatch(t)) for t, s in tokens]
      if not any(is_added):
        raise InputError(
          f'language={language!r}: the tokenizer adds no language code'
        )
      ids[is_added] = self.token_id(language)
    return ids

  def encode_chat(
    self, messages: Sequence[chat.Message], **variables: Any
  ) -> np.ndarray:
    """The ids of a conversation, int32 [N], whose text `chat.render` makes.

    Messages have 'role' and 'content'; `variables` are arguments of `render`,
    among them variables that the template reads.

    Raises:
      ValueError: There is no chat template, or it refuses the messages.
    """
    if not self.special.chat_template:
      raise InputError('the tokenizer came without a chat template')
    template, names = self.special.chat_template, self.special.names
    text = chat.render(template, messages, names=names, **variables)
    return self.encode_inputs(text, added=False)

  def token_id(self, token: str) -> int:
    """The id of a token by its name in the vocabulary: 'fra_Latn'.

    Raises:
      ValueError: There is no such token.
    """
    if token not in self._vocabulary:
      special = self.model.get_added_tokens_decoder().values()
      raise unknown('token', token, [added.content for added in special])
    return self._vocabulary[token]

  def decode(self, ids: Ids) -> str:
    """The text of `ids`; special tokens are left out."""
    return self.model.decode(self._in_vocabulary(ids).tolist())

  def token_name(self, token: Token) -> str:
    """The token's quoted text, or its name if it is a part of a character."""
    (token,) = self._in_vocabulary([token]).tolist()
    if token == self.eos_id:
      return '<eos>'
    text = self.model.decode([int(token)])
    if text and '\ufffd' not in text:
      return repr(text)
    return self.model.id_to_token(int(token)) or f'<{token}>'

  def state(self) -> dict[str, Any]:
    """A dict with the model and, if they were given, the special tokens."""
    saved = {'model': json.loads(self.model.to_str())}
    if self._saved_special is not None:
      saved['special'] = dataclasses.asdict(self._saved_special)
    return saved

  @classmethod
  def from_state(cls, state: Mapping[str, Any]) -> 'Json':
    """The tokenizer that `state` describes, with its special tokens."""
    special = state.get('special')
    if special is not None:
      special = SpecialTokens(**{**special, 'eos': tuple(special['eos'])})
    return cls(json.dumps(state['model']), special)

  def vocabulary_name(self, token: Token) -> str:
    """The name of a token in the vocabulary; '' if no token has the id."""
    return self.model.id_to_token(int(token)) or ''


def _special_tokens(
  folder: pathlib.Path, vocabulary: Mapping[str, int]
) -> SpecialTokens:
  """The special tokens of a model's folder; `vocabulary` has ids by name.

  Ids of `generation_config.json` take precedence over those of `config.json`,
  and both over names in the tokenizer's own files.
  """
  tokens_config = read_json(folder / 'tokenizer_config.json')
  tokens_map = read_json(folder / 'special_tokens_map.json')
  config = read_json(folder / 'config.json')
  generation = read_json(folder / 'generation_config.json')
  ids = config | {k: v for k, v in generation.items() if v is not None}
  names = {}
  for role in _NAMES:
    key = f'{role}_token'
    name = _content(tokens_config.get(key)) or _content(tokens_map.get(key))
    if name:
      names[role] = name
      if ids.get(f'{key}_id') is None and isinstance(name, str):
        ids[f'{key}_id'] = vocabulary.get(name)
  eos = ids.get('eos_token_id')
  eos = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
  return SpecialTokens(
    bos=ids.get('bos_token_id'),
    eos=eos,
    pad=ids.get('pad_token_id'),
    start=ids.get('decoder_start_token_id'),
    forced_bos=ids.get('forced_bos_token_id'),
    vocab_size=config.get('vocab_size', 0),
    names=names,
    chat_template=_chat_template(folder, tokens_config.get('chat_template')),
  )


def _content(token: Any) -> Any:
  """A token's text, which files have in a string or an object; '' for None."""
  return token.get('content', '') if isinstance(token, dict) else token or ''


def _chat_template(folder: pathlib.Path, template: Any) -> Any:
  """The chat template in a file of its own, or else `template`; '' for none.

  Args:
    folder: The model's folder.
    template: The value of 'chat_template' in `tokenizer_config.json`: a text, a
      list of objects with name and template, or None. Of a list the template
      named 'default' is taken.
  """
  path = plain(folder, 'chat_template.jinja')
  if path is not None:
    return read_text(path)
  if isinstance(template, list):  # several templates, each with a name
    templates = [t for t in template if isinstance(t, dict)]
    named = {str(t.get('name')): t.get('template') for t in templates}
    return named.get('default', '')
  return template or ''


def _read(text: str) -> tuple[tokenizers.Tokenizer, dict[str, int]]:
  """The model of a `tokenizer.json`, and the ids of its tokens, each an int32.

  The model neither truncates nor pads. A text that is no `tokenizer.json`, has
  no token or has an id that is too large raises a ValueError.
  """
  try:
    model = tokenizers.Tokenizer.from_str(text)
    model.no_truncation()
    model.no_padding()
  except BaseException as error:
    raise _value_error('not a tokenizers JSON file', error) from None
  vocabulary = model.get_vocab(with_added_tokens=True)
  if not vocabulary:
    raise InputError('the tokenizer has no tokens')
  largest = max(vocabulary, key=lambda name: vocabulary[name])
  if vocabulary[largest] > _LARGEST_ID:
    raise InputError(
      f'token {largest!r:.80} has the id {vocabulary[largest]}, above the '
      f'largest int32, {_LARGEST_ID}'
    )
  return model, vocabulary


def _encoded(encode: Callable, given: Any, *, add_special_tokens: bool) -> Any:
  try:
    return encode(given, add_special_tokens=add_special_tokens)
  except BaseException as error:
    problem = f'the tokenizer cannot encode {given!r:.80}'
    raise _value_error(problem, error) from None


def _value_error(problem: str, error: BaseException) -> BaseException:
  """The error to raise in place of one that came out of `tokenizers`.

  An exception or a panic of the library becomes a ValueError, whose message is
  `problem` and the first line of `error`. Any other error, such as the
  KeyboardInterrupt of a Ctrl-C, is returned as it is.
  """
  if isinstance(error, Exception) or type(error).__name__ == 'PanicException':
    return InputError(f'{problem}: {first_line(error)}')
  return error  # Ctrl-C
