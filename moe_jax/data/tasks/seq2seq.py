"""Rows of pairs of texts: given the inputs, a model predicts the targets."""

import dataclasses
from typing import cast

import numpy as np
from jaxtyping import Integer

from moe_jax.config import option
from moe_jax.data.contracts import TaskOptions
from moe_jax.data.layouts import Example, Layout, RowShape
from moe_jax.data.packing import ExampleRows
from moe_jax.data.store import Stream
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.data.tokenizers.extra_ids import extend


@dataclasses.dataclass(frozen=True)
class Seq2SeqTask(TaskOptions):
  """Options of the task on pairs of texts: to predict targets from inputs."""

  label = 'seq2seq'
  reads = 'pairs'
  generates = True

  input_prefix: str = option(
    '', "Text that is put before all inputs, such as 'summarize: '."
  )
  keep_end: bool = option(
    False,
    'Whether inputs that are too long for a row lose their beginning instead '
    'of their end, as a conversation needs, whose end is what is asked.',
  )

  def vocabulary(self, base: Tokenizer, shape: RowShape) -> Tokenizer:
    """The tokenizer with an EOS, in which inputs and targets end."""
    return extend(base, end_inputs=True)

  def rows(
    self, stream: tuple[Stream, Stream], tokenizer: Tokenizer, shape: RowShape
  ) -> 'PairRows':
    """Rows of examples, one example of each pair."""
    layout, eos_id = shape.layout(tokenizer.start_id), tokenizer.eos_id
    how = {'pack': shape.pack, 'keep_end': self.keep_end}
    return PairRows(*stream, layout, cast(int, eos_id), **how)


class PairRows(ExampleRows):
  """Random access to rows of pairs, every pair once.

  Both sides end in the EOS. Inputs that are too long lose their end (or with
  `keep_end` their beginning) but keep the EOS, after which a decoder-only model
  begins its answer; targets that are too long lose their end with the EOS, so
  that no false end is learned.

  Attributes:
    truncated: Number of pairs that were cut.
  """

  def __init__(
    self,
    inputs: Stream,
    targets: Stream,
    layout: Layout,
    eos_id: int,
    *,
    pack: bool = True,
    keep_end: bool = False,
  ):
    """Wraps two streams without copying them.

    Args:
      inputs: Stream of inputs, a text for each pair, none empty, without EOS.
      targets: Stream of targets in the same order.
      layout: Layout of the rows.
      eos_id: Id that ends both sides.
      pack: Whether short pairs share a row.
      keep_end: Whether inputs that are too long lose their beginning.
    """
    self._inputs, self._targets, self._eos_id = inputs, targets, eos_id
    self._keep_end = keep_end
    # The lengths that inputs and targets with their EOS would have uncut.
    uncut = [np.diff(s, append=len(t)) + 1 for t, s in (inputs, targets)]
    self._lengths = lengths = layout.cut(*uncut)
    is_cut = (lengths.inputs < uncut[0]) | (lengths.targets < uncut[1])
    self.truncated = int(is_cut.sum())
    super().__init__(lengths, layout, pack=pack)

  def counts(self) -> dict[str, int]:
    """The number of pairs that were cut."""
    return {'truncated': self.truncated}

  def example(self, index: int, generator: np.random.Generator) -> Example:
    """The example of pair `index`; it has no noise."""
    n_inputs = int(self._lengths.inputs[index])
    n_targets = int(self._lengths.targets[index])
    inputs = _text(self._inputs, index)
    inputs = cut_inputs(inputs, n_inputs - 1, keep_end=self._keep_end)
    inputs = np.append(inputs, self._eos_id)
    targets = np.append(_text(self._targets, index), self._eos_id)[:n_targets]
    return Example(inputs.astype(np.int32), targets.astype(np.int32))


def cut_inputs(
  ids: Integer[np.ndarray, ' N'], length: int, *, keep_end: bool
) -> Integer[np.ndarray, ' n']:
  """At most `length` of the ids: the first or, with `keep_end`, the last."""
  return ids[max(len(ids) - length, 0) :] if keep_end else ids[:length]


def _text(stream: Stream, index: int) -> np.ndarray:
  """The tokens of the text with this index in the stream."""
  tokens, starts = stream
  end = starts[index + 1] if index + 1 < len(starts) else len(tokens)
  return tokens[starts[index] : end]
