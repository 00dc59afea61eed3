"""Layouts of examples, each of inputs and targets, in the rows of a batch."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
from jaxtyping import Integer

from moe_jax.errors import InputError
from moe_jax.shapes import Bool, Int

Counts = Int[np.ndarray, ' P']  # numbers of tokens of P examples
Window = Integer[np.ndarray, ' N']  # tokens of a stretch of a text


class Example(NamedTuple):
  """Ids of an example of N input and M target tokens, at least one of each.

  Attributes:
    inputs: int32 [N], the tokens that a model is given.
    targets: int32 [M], the tokens that it learns to predict.
  """

  inputs: Int[np.ndarray, ' N']
  targets: Int[np.ndarray, ' M']


class Lengths(NamedTuple):
  """The largest numbers of tokens that each of P examples can have.

  Attributes:
    inputs: int [P], the largest number of input tokens.
    targets: int [P], the largest number of target tokens.
    total: int [P], the largest number of input and target tokens together,
      which may be below the sum of `inputs` and `targets`.
  """

  inputs: Counts
  targets: Counts
  total: Counts


class Layout(abc.ABC):
  """Contract of a layout: which arrays a batch has, and what fits into a row.

  Attributes:
    capacity: Room of a row in each of the D dimensions of `sizes`: tokens of
      the encoder and of the decoder, or of a decoder alone.
    max_inputs: Largest number of input tokens that an example can have.
    max_targets: Largest number of target tokens that an example can have.
    longest_text: Largest number of tokens of a text that a task splits, at a
      position that it draws, into the inputs and targets of an example.
  """

  capacity: tuple[int, ...]
  max_inputs: int
  max_targets: int
  longest_text: int

  @abc.abstractmethod
  def sizes(self, lengths: Lengths) -> Int[np.ndarray, 'P D']:
    """The part of a row's `capacity` that each example takes."""

  @abc.abstractmethod
  def cut(self, inputs: Counts, targets: Counts) -> Lengths:
    """The lengths to which examples are cut, so that each fits a row.

    Args:
      inputs: Number of input tokens of each example, uncut.
      targets: Number of target tokens of each example, uncut.
    """

  @abc.abstractmethod
  def assemble(self, rows: Sequence[Sequence[Example]]) -> dict:
    """The batch of these rows: the arrays that the class lists, by name.

    A row without examples is padding. The segment id of an example's tokens is
    the example's number in the row, from 1.
    """

  @abc.abstractmethod
  def describe(self) -> str:
    """A text on the shape of a row, for messages."""

  def fits(self, lengths: Lengths) -> Bool[np.ndarray, ' P']:
    """Whether each example fits a row of its own."""
    return np.all(self.sizes(lengths) <= np.array([self.capacity]), axis=1)


class EncoderDecoderLayout(Layout):
  """Rows of inputs for an encoder, and of targets for a decoder.

  A batch has `encoder_tokens`, `encoder_segment_ids` and `encoder_positions`
  int32 [B, T_enc]; `tokens`, `targets`, `segment_ids`, `positions` int32 and
  `loss_weights` float32 [B, T_dec]. `tokens` are the targets of each segment,
  shifted right by one, with the start id in front.
  """

  def __init__(self, encoder_len: int, decoder_len: int, start_id: int):
    self.max_inputs, self.max_targets = encoder_len, decoder_len
    self.capacity, self.start_id = (encoder_len, decoder_len), start_id
    # A text that fills both sides has only one possible split.
    self.longest_text = max(self.capacity)

  def sizes(self, lengths: Lengths) -> Int[np.ndarray, 'P 2']:
    """The number of each example's tokens in the encoder and in the decoder."""
    return np.stack([lengths.inputs, lengths.targets], axis=1)

  def cut(self, inputs: Counts, targets: Counts) -> Lengths:
    """Cuts inputs to the length of an encoder's row, targets to a decoder's."""
    inputs = np.minimum(inputs, self.max_inputs)
    targets = np.minimum(targets, self.max_targets)
    return Lengths(inputs, targets, inputs + targets)

  def assemble(self, rows: Sequence[Sequence[Example]]) -> dict:
    def decoder_segment(targets):
      return np.append(self.start_id, targets[:-1]), targets, 1.0

    inputs = [[(example.inputs,) for example in row] for row in rows]
    targets = [[decoder_segment(e.targets) for e in row] for row in rows]
    encoder = _batch(inputs, self.max_inputs, _ENCODER)
    decoder = _batch(targets, self.max_targets, _DECODER)
    return decoder | {f'encoder_{name}': v for name, v in encoder.items()}

  def describe(self) -> str:
    """The lengths of a row: `T_enc=8 and T_dec=4`."""
    return f'T_enc={self.max_inputs} and T_dec={self.max_targets}'


class DecoderLayout(Layout):
  """Rows of inputs followed by targets, for a decoder-only model.

  A batch has `tokens`, `targets` (the next tokens), `segment_ids`, `positions`
  int32 and `loss_weights` float32 [B, T], which are 1 where the next token
  belongs to the targets of an example.
  """

  def __init__(self, seq_len: int):
    # A row has room for an example of T + 1 tokens, as the last target is not
    # among its `tokens`. Each side can have T, as the other has one at least.
    self.seq_len = self.max_inputs = self.max_targets = seq_len
    self.capacity, self.longest_text = (seq_len,), seq_len + 1

  def sizes(self, lengths: Lengths) -> Int[np.ndarray, 'P 1']:
    """Each example's length without its last token, which is only a target."""
    return lengths.total[:, None] - 1

  def cut(self, inputs: Counts, targets: Counts) -> Lengths:
    """Cuts inputs first, to no less than half of a row, and then targets."""
    room = self.seq_len + 1
    min_inputs = np.minimum(inputs, room // 2)
    targets = np.minimum(targets, room - min_inputs)
    inputs = np.minimum(inputs, room - targets)
    return Lengths(inputs, targets, inputs + targets)

  def assemble(self, rows: Sequence[Sequence[Example]]) -> dict:
    def segment(inputs, targets):
      text = np.concatenate([inputs, targets])
      learned = np.arange(1, len(text)) >= len(inputs)
      return text[:-1], text[1:], learned

    segments = [[segment(*example) for example in row] for row in rows]
    return _batch(segments, self.seq_len, _DECODER)

  def describe(self) -> str:
    """The length of a row: `T=8`."""
    return f'T={self.seq_len}'


_ENCODER = dict.fromkeys(('tokens', 'segment_ids', 'positions'), np.int32)
_DECODER = {**_ENCODER, 'targets': np.int32, 'loss_weights': np.float32}


def _batch(rows, T: int, dtypes: Mapping) -> dict[str, np.ndarray]:
  """Arrays [B, T] of rows, which are lists of segments, by name.

  `dtypes` has the type of each array by its name. A segment is a tuple of its
  tokens and, for a decoder, of its targets and loss weights. More than T tokens
  in a row raise a ValueError.
  """
  batch = {k: np.zeros((len(rows), T), dtype) for k, dtype in dtypes.items()}
  for b, row in enumerate(rows):
    end = 0
    for number, (tokens, *learned) in enumerate(row, 1):
      begin, end = end, end + len(tokens)
      if end > T:  # numpy would drop a lone token
        raise InputError(
          f'{len(tokens)} tokens do not fit from {begin} on in a row of {T}'
        )
      values = tokens, number, np.arange(len(tokens)), *learned
      for array, segment_values in zip(batch.values(), values):
        array[b, begin:end] = segment_values
  return batch


@dataclasses.dataclass(frozen=True)
class RowShape:
  """Lengths of a batch's rows, and whether short examples share a row.

  Attributes:
    seq_len: T, or T_enc of an encoder-decoder model.
    target_len: T_dec of an encoder-decoder model; 0 for a decoder-only model,
      whose rows have the inputs before the targets.
    pack: Whether short examples share a row.
  """

  seq_len: int
  target_len: int = 0
  pack: bool = True

  @property
  def encoder_decoder(self) -> bool:
    """Whether the rows have an encoder's side."""
    return self.target_len > 0

  def layout(self, start_id: int | None) -> Layout:
    """The layout of examples.

    Only an encoder-decoder needs `start_id`, the first id of a decoder's input.
    """
    if self.encoder_decoder:
      # The tokenizer has a start id, as a task of examples gives it an EOS.
      start = cast(int, start_id)
      return EncoderDecoderLayout(self.seq_len, self.target_len, start)
    return DecoderLayout(self.seq_len)
