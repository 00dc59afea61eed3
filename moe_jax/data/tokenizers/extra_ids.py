"""Ids that a task adds to a tokenizer's own: EOS, sentinels, mode tokens."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from moe_jax.data.contracts import Ids, Token, Tokenizer, digest, from_json
from moe_jax.errors import InputError

EOS = '<eos>'
_SENTINEL = '<extra_id_'  # begin of a sentinel's name, as in T5's vocabulary


class Extended(Tokenizer, kind='extended'):
  """A tokenizer with additional ids after its last id, each with a name.

  The text of a document is never encoded to these ids. Their names can be used
  in a model's inputs: `[S] def f(`, `a <extra_id_0> c`.

  Attributes:
    sentinel_ids: Ids of the tokenizer's own sentinels, then of the added ones.
  """

  def __init__(
    self, base: Tokenizer, names: Sequence[str], *, end_inputs: bool
  ):
    """Extends a tokenizer.

    Args:
      base: Tokenizer that is extended.
      names: Names of the ids after the last id of `base`; the id named `EOS`
        is the EOS if `base` has none.
      end_inputs: Whether inputs end in an EOS; otherwise the EOS that `base`
        adds to inputs is left out.
    """
    self.base, self.names, self.end_inputs = base, tuple(names), end_inputs
    self.vocab_size = base.vocab_size + len(self.names)
    self.eos_id = base.eos_id
    if self.eos_id is None and EOS in self.names:
      self.eos_id = self.token_id(EOS)
    self.eos_ids = base.eos_ids or self.eos_ids
    self.start_id = self.eos_id if base.start_id is None else base.start_id
    self.bos_id, self.pad_id = base.bos_id, base.pad_id
    self.forced_bos_id = base.forced_bos_id
    appended = [n for n in self.names if n.startswith(_SENTINEL)]
    self.sentinel_ids = base.sentinel_ids + tuple(map(self.token_id, appended))
    added = digest(repr((self.names, end_inputs)))
    self.identity = f'{base.identity} and {added}'
    self.ids_identity, self.label = base.ids_identity, base.label
    if self.names:
      self.ids_identity += f' and {digest(repr(self.names))}'
      self.label += f', {len(self.names):,} ids added'
    if end_inputs:
      self.label += ', inputs end in an EOS'

  def token_id(self, name: str) -> int:
    """The id of an added name, or else of a token of `base`.

    Raises:
      ValueError: There is no such name.
    """
    if name in self.names:
      return self.base.vocab_size + self.names.index(name)
    if hasattr(self.base, 'token_id'):
      return cast(Any, self.base).token_id(name)
    raise InputError(f'{name!r} is none of {len(self.names)} added tokens')

  def encode_chat(
    self, messages: Sequence[Any], **variables: Any
  ) -> np.ndarray:
    """The ids that `base` gives to a conversation, int32 [N].

    Messages have 'role' and 'content'; `variables` are for the chat template.

    Raises:
      ValueError: `base` has no chat template.
    """
    if not hasattr(self.base, 'encode_chat'):
      raise InputError(f'tokenizer {self.identity} has no chat template')
    return cast(Any, self.base).encode_chat(messages, **variables)

  def encode(self, text: str) -> np.ndarray:
    """The ids that `base` gives to `text`, int32 [N]."""
    return self.base.encode(text)

  def encode_batch(self, texts: Iterable[str]) -> list[np.ndarray]:
    """The ids that `base` gives to each text."""
    return self.base.encode_batch(texts)

  def encode_inputs(self, text: str, **options: Any) -> np.ndarray:
    """The ids of an input, int32 [N], with an EOS if `end_inputs`.

    An added name in the text becomes its id. With `added=False` the ids are
    those of rows of training: they have no special token that `base` adds to
    inputs, such as a BOS, but the EOS if `end_inputs`.

    Args:
      text: Text of the input.
      **options: Arguments of `encode_inputs` of `base`.
    """
    name_pattern = '|'.join(map(re.escape, self.names))
    pieces = re.split(f'({name_pattern})', text) if name_pattern else [text]
    ids: list[Any] = []
    for piece in filter(None, pieces):
      if piece in self.names:
        ids.append([self.token_id(piece)])
      else:
        own = self.base.encode_inputs(piece, **options)
        ids.append(own[:-1] if own.size and own[-1] == self.eos_id else own)
    ends: Any = [self.eos_id] if self.end_inputs else []
    return np.concatenate([*ids, ends]).astype(np.int32)

  def decode(self, ids: Ids) -> str:
    """The text of `ids`; the text of an added id is its name.

    Raises:
      ValueError: An id is outside [0, vocab_size).
    """
    ids = self._in_vocabulary(ids).tolist()
    text_ids = [i for i in ids if i != self.eos_id]
    runs = itertools.groupby(text_ids, lambda i: i >= self.base.vocab_size)
    return ''.join(
      ''.join(map(self.token_name, run)) if added else self.base.decode([*run])
      for added, run in runs
    )

  def token_name(self, token: Token) -> str:
    """The name that `base` gives to the token, or the name that was added."""
    (token,) = self._in_vocabulary([token]).tolist()
    if token < self.base.vocab_size:
      return self.base.token_name(token)
    return self.names[token - self.base.vocab_size]

  def state(self) -> dict[str, Any]:
    """A dict of `base`, the added names, and whether inputs end in an EOS."""
    return {
      'base': self.base.to_json(),
      'names': list(self.names),
      'end_inputs': self.end_inputs,
    }

  @classmethod
  def from_state(cls, state: Mapping[str, Any]) -> 'Extended':
    base = from_json(state['base'])
    return cls(base, state['names'], end_inputs=state['end_inputs'])


def extend(
  base: Tokenizer,
  *,
  num_sentinels: int = 0,
  modes: Sequence[str] = (),
  end_inputs: bool,
) -> Extended:
  """The tokenizer of a task, with an EOS, sentinels and mode tokens.

  Sentinels that `base` has, such as T5's `<extra_id_0>`, come first; sentinels
  that `base` lacks are added after its last id. Ids that another task added
  stay, and no id is added twice. Each mode of UL2 gets a token. The result has
  at least `num_sentinels` sentinels; with `end_inputs` inputs end in an EOS.
  """
  num_own = len(base.sentinel_ids)
  root, added = base, ()
  if isinstance(base, Extended):
    root, added = base.base, base.names
  names = [] if base.eos_id is not None else [EOS]
  names += [f'{_SENTINEL}{i}>' for i in range(num_own, num_sentinels)]
  names += [name for name in map(mode_name, modes) if name not in added]
  return Extended(root, [*added, *names], end_inputs=end_inputs)


def without_endings(tokenizer: Tokenizer) -> Tokenizer:
  """The tokenizer with the ids that a task added, but no EOS after inputs.

  The next task that extends the tokenizer decides anew whether inputs end in an
  EOS.
  """
  if not isinstance(tokenizer, Extended):
    return tokenizer
  if not tokenizer.names:
    return tokenizer.base
  return Extended(tokenizer.base, tokenizer.names, end_inputs=False)


def mode_name(mode: str) -> str:
  """The name of the token of a UL2 mode: `[S]`."""
  return f'[{mode}]'
