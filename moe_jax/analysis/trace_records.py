"""The contract of routing traces: what a record and its header hold.

It is numpy alone. Not here: the files (`trace_files.py`), and how they are read
(`traces.py`).
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from moe_jax.errors import InputError

FORMAT = 1
DTYPES = ('float16', 'float32')
# Fields of a header that may differ between two parts of one run's trace.
_VARYING = ('config', 'note')


class LayerChoices(NamedTuple):
  """The choices of one sparse layer in one batch.

  Attributes:
    expert: int32 [B, T, K'], the number of the expert; -1 where there is no
      choice: in padding, and where experts choose, beyond a token's last one.
    gate: float32 [B, T, K'], the weight of the expert's output before output
      masking, rounded to the header's dtype; 0 where the choice is not kept.
    kept: bool [B, T, K'], whether the router's queues served the choice. Rows
      for which an exchange had no room count as served.
    logits: float32 [B, T, E], the logits that the router's losses are computed
      from, without noise, rounded in the same way; None where they were not
      recorded or the router has none. E counts columns, where experts share
      them.
  """

  expert: np.ndarray
  gate: np.ndarray
  kept: np.ndarray
  logits: np.ndarray | None = None


class Record(NamedTuple):
  """The choices in one batch, or in one of the two sequences of its rows.

  Attributes:
    kind: 'train', the name of an evaluation, or 'generate'.
    step: The number of optimizer steps that were taken before.
    batch: The number of the batch within the same kind and step, from 0.
    tokens: int32 [B, T], token ids.
    positions: int32 [B, T], the position of each token in its document.
    documents: int32 [B, T], the number of the document in its row; 0 is
      padding.
    layers: The choices of each sparse layer, by the number of the layer.
    sources: int32 [B, T], the source of each token by number into
      `Header.sources`; None where the data has no such numbers.
    sequence: '' or, for the inputs of an encoder-decoder, 'encoder'.
  """

  kind: str
  step: int
  batch: int
  tokens: np.ndarray
  positions: np.ndarray
  documents: np.ndarray
  layers: dict[int, LayerChoices]
  sources: np.ndarray | None = None
  sequence: str = ''


@dataclasses.dataclass(frozen=True)
class LayerInfo:
  """One sparse layer of the model.

  Attributes:
    num_experts: The number E of experts that choices go to.
    num_selected: The number K of experts that a token chooses.
    capacity: The slots of an expert in a group in training; None: no bound.
    group_size: The number of tokens in a group in training; 0 is not known.
    by_expert: Whether experts choose tokens.
    sequence: '' or 'encoder', the sequence whose tokens the layer sees.
    second_policy: The rule by which training sends choices after a token's
      first one; with another one than 'all', choices that were not sent are
      among those that are not kept.
  """

  num_experts: int
  num_selected: int
  capacity: int | None = None
  group_size: int = 0
  by_expert: bool = False
  sequence: str = ''
  second_policy: str = 'all'


@dataclasses.dataclass(frozen=True)
class Header:
  """The description of a run that all records of a trace share.

  Attributes:
    layers: The sparse layers, by their number in the model, an encoder's first.
    batch_size: The number B of rows of a batch of training and evaluation.
    seq_len: The number T of tokens of its rows.
    vocab_size: The number V of token ids.
    data_digest: The sha256 of the data; '' if there is none.
    model_digest: The sha256 of the model's options.
    seed: The seed of the run.
    sources: The names of the sources that `Record.sources` numbers.
    tokenizer: A description of the tokenizer.
    has_logits: Whether records have the logits of routers.
    dtype: The type that gates and logits are stored in, 'float16' or 'float32'.
    note: A note for readers of the choices, such as that generation drops no
      token.
    config: The config of the run as JSON; '' if it is not known.
  """

  layers: Mapping[int, LayerInfo]
  batch_size: int = 0
  seq_len: int = 0
  vocab_size: int = 0
  data_digest: str = ''
  model_digest: str = ''
  seed: int = 0
  sources: tuple[str, ...] = ()
  tokenizer: str = ''
  has_logits: bool = False
  dtype: str = 'float16'
  note: str = ''
  config: str = ''

  def __post_init__(self):
    if self.dtype not in DTYPES:
      raise InputError(f'dtype={self.dtype!r} not in {list(DTYPES)}')

  def to_json(self) -> str:
    """The header as text."""
    values = dataclasses.asdict(self)
    values['layers'] = {str(i): v for i, v in sorted(values['layers'].items())}
    return json.dumps({'format': FORMAT, **values}, sort_keys=True, indent=1)

  @classmethod
  def from_json(cls, text: str) -> 'Header':
    """The header that `to_json` wrote.

    Raises:
      ValueError: The text is no header of this format.
    """
    try:
      values: dict[str, Any] = json.loads(text)
      version = values.pop('format')
      if version == FORMAT:
        layers = values.pop('layers')
        values['layers'] = {int(i): LayerInfo(**v) for i, v in layers.items()}
        values['sources'] = tuple(values['sources'])
        return cls(**values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise InputError(f'no header of a trace: {error!r}') from None
    raise InputError(
      f'a trace of format {version}; this version reads {FORMAT} alone'
    )

  def check_same(self, other: 'Header', where: str) -> None:
    """Checks that another header is of the same run.

    Args:
      other: The other header.
      where: The place of the other one, for the error.

    Raises:
      ValueError: Fields differ; each is listed with both values.
    """
    names = [f.name for f in dataclasses.fields(self) if f.name not in _VARYING]
    pairs = ((n, getattr(self, n), getattr(other, n)) for n in names)
    lines = [f'  {n}: {a!r} here, {b!r} there' for n, a, b in pairs if a != b]
    if lines:
      raise InputError(
        '\n'.join([f'{where} has the trace of something else:', *lines])
      )
