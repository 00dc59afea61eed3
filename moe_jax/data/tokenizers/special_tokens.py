"""Special tokens and chat template of a model's folder.

The files are those that Hugging Face libraries write beside `tokenizer.json`.
Not here: the tokenizer itself (`json_tokenizer.py`).
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

# Files of tokenizers that have to be converted before they can be read.
SENTENCEPIECE = ('spiece.model', 'tokenizer.model', 'sentencepiece.bpe.model')
_NAMES = ('bos', 'eos', 'pad', 'unk')


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
    ValueError: A file is no JSON object.
  """
  ours = read_json(folder / 'tokenizer_config.json')
  older = read_json(folder / 'special_tokens_map.json')
  config = read_json(folder / 'config.json')
  ids = {**config, **_set(read_json(folder / 'generation_config.json'))}
  names = {}
  for role in _NAMES:
    key = f'{role}_token'
    name = _content(ours.get(key)) or _content(older.get(key))
    if name:
      names[role] = name

  def one(role):
    given = ids.get(f'{role}_token_id')
    return vocabulary.get(names.get(role, '')) if given is None else given

  eos = one('eos')
  eos = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
  return SpecialTokens(
    bos=one('bos'),
    eos=eos,
    pad=one('pad'),
    start=ids.get('decoder_start_token_id'),
    forced_bos=ids.get('forced_bos_token_id'),
    vocab_size=config.get('vocab_size', 0),
    names=names,
    chat_template=_chat_template(folder, ours.get('chat_template')),
  )


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file; an empty dict if there is no file.

  Raises:
    ValueError: The file is not JSON, or not an object.
  """
  if not path.is_file():
    return {}
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path} is no JSON: {error}') from None
  if not isinstance(value, dict):
    raise ValueError(f'{path} holds a {type(value).__name__}, not an object')
  return value


def _set(values: dict[str, Any]) -> dict[str, Any]:
  return {key: value for key, value in values.items() if value is not None}


def _content(token: Any) -> str:
  """A token's text, which files have as a string or within an object."""
  return token.get('content', '') if isinstance(token, dict) else token or ''


def _chat_template(folder: pathlib.Path, given: Any) -> str:
  """The template in its own file, or else in `tokenizer_config.json`."""
  path = folder / 'chat_template.jinja'
  if path.is_file():
    return path.read_text(encoding='utf-8')
  if isinstance(given, list):  # several templates, each with a name
    return {t['name']: t['template'] for t in given}.get('default', '')
  return given or ''
