"""Special tokens and chat template of a model's folder.

The files are those that Hugging Face libraries write beside `tokenizer.json`.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from moe_jax.data.plain_files import plain, read_json, read_text

# Files of tokenizers that have to be converted before they can be read.
SENTENCEPIECE = ('spiece.model', 'tokenizer.model', 'sentencepiece.bpe.model')
_NAMES = ('bos', 'eos', 'pad', 'unk')
# Roles of a single id, in our fields; files have '_token_id' after them.
_ROLES = ('bos', 'pad', 'start', 'forced_bos')


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
    names: Names of the tokens 'bos', 'eos', 'pad' and 'unk', for chat
      templates.
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
    """A text for each field that has no possible value.

    Args:
      num_tokens: The number of ids of the tokenizer; a model may have more.
    """
    if not _is_count(self.vocab_size):
      yield f'vocab_size={self.vocab_size!r} is no number of tokens'
      return
    size = max(num_tokens, self.vocab_size)
    ids = {f'{role}_token_id': getattr(self, role) for role in _ROLES}
    ids = {name: [i] for name, i in ids.items() if i is not None}
    for name, values in {**ids, 'eos_token_id': self.eos}.items():
      for i in values:
        if not _is_count(i) or i >= size:
          yield f'{name}={i!r} is no token id: an integer in [0, {size})'
    for name in ('chat_template', *self.names):
      value = self.names.get(name, self.chat_template)
      if not isinstance(value, str):
        yield f'{name} is {value!r:.80}, not a text'

  def to_json(self) -> dict[str, Any]:
    """The fields as JSON, for `from_json`."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, saved: Mapping[str, Any]) -> 'SpecialTokens':
    """The special tokens whose `to_json` is `saved`."""
    return cls(**{**saved, 'eos': tuple(saved['eos'])})


def from_folder(
  folder: pathlib.Path, vocabulary: Mapping[str, int]
) -> SpecialTokens:
  """The special tokens of a model's folder.

  Ids of `generation_config.json` take precedence over those of `config.json`,
  and both over names in the tokenizer's own files.

  Args:
    folder: Folder that may hold `tokenizer_config.json`,
      `special_tokens_map.json`, `config.json`, `generation_config.json` and
      `chat_template.jinja`.
    vocabulary: Ids by token.

  Raises:
    ValueError: A file is no plain file or no JSON object.
  """
  tokens_config = read_json(folder / 'tokenizer_config.json')
  tokens_map = read_json(folder / 'special_tokens_map.json')
  config = read_json(folder / 'config.json')
  ids = {**config, **_not_none(read_json(folder / 'generation_config.json'))}
  names = {}
  for role in _NAMES:
    key = f'{role}_token'
    name = _content(tokens_config.get(key)) or _content(tokens_map.get(key))
    if name:
      names[role] = name

  def token_id(role):
    config_id = ids.get(f'{role}_token_id')
    if config_id is not None:
      return config_id
    name = names.get(role)
    return vocabulary.get(name) if isinstance(name, str) else None

  eos = token_id('eos')
  eos = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
  return SpecialTokens(
    bos=token_id('bos'),
    eos=eos,
    pad=token_id('pad'),
    start=ids.get('decoder_start_token_id'),
    forced_bos=ids.get('forced_bos_token_id'),
    vocab_size=config.get('vocab_size', 0),
    names=names,
    chat_template=_chat_template(folder, tokens_config.get('chat_template')),
  )


def _not_none(values: dict[str, Any]) -> dict[str, Any]:
  return {key: value for key, value in values.items() if value is not None}


def _is_count(value: Any) -> bool:
  return type(value) is int and value >= 0


def _content(token: Any) -> Any:
  """A token's text, which files have as a string or within an object."""
  return token.get('content', '') if isinstance(token, dict) else token or ''


def _chat_template(folder: pathlib.Path, template: Any) -> Any:
  """The template in its own file, or else in `tokenizer_config.json`."""
  path = plain(folder, 'chat_template.jinja')
  if path is not None:
    return read_text(path)
  if isinstance(template, list):  # several templates, each with a name
    templates = [t for t in template if isinstance(t, dict)]
    return {str(t.get('name')): t.get('template') for t in templates}.get(
      'default', ''
    )
  return template or ''
