"""Rows of pairs: given the inputs, learn the targets.

Not here: where pairs come from (`data/sources/pairs.py`).
"""

import numpy as np
from jaxtyping import Integer

from moe_jax.data.examples import ExampleRows
from moe_jax.data.layouts import Example, Layout

# Tokens, and where each text begins among them.
Stream = tuple[Integer[np.ndarray, '_'], Integer[np.ndarray, '_']]


class PairRows(ExampleRows):
  """Random access to rows of pairs, every pair once.

  Both sides end in the EOS. Inputs that are too long lose their end but not
  their EOS, which tells a decoder-only model where to begin; targets that are
  too long lose their end and its EOS, so that no false end is learned.

  Attributes:
    truncated: How many pairs lost a token.
  """

  def __init__(
    self,
    inputs: Stream,
    targets: Stream,
    layout: Layout,
    eos_id: int,
    *,
    pack: bool = True,
  ):
    """Wraps two streams without copying them.

    Args:
      inputs: One text a pair, none empty, without EOS.
      targets: Likewise, in the same order.
      layout: Of the rows.
      eos_id: Ends both sides.
      pack: Whether short pairs share a row.

    Raises:
      ValueError: There are not as many inputs as targets.
    """
    if len(inputs[1]) != len(targets[1]):
      raise ValueError(f'{len(inputs[1])} inputs of {len(targets[1])} targets')
    self._inputs, self._targets, self._eos_id = inputs, targets, eos_id
    # With the EOS.
    wanted = [np.diff(s, append=len(t)) + 1 for t, s in (inputs, targets)]
    lengths = layout.cut(*wanted)
    self._lengths = lengths
    lost = (lengths.inputs < wanted[0]) | (lengths.targets < wanted[1])
    self.truncated = int(lost.sum())
    super().__init__(lengths, layout, pack=pack)

  def example(self, index: int, generator: np.random.Generator) -> Example:
    """Pair `index`; there is no noise."""
    del generator
    n_inputs = int(self._lengths.inputs[index])
    n_targets = int(self._lengths.targets[index])
    inputs = _text(self._inputs, index, n_inputs - 1)
    targets = _text(self._targets, index, n_targets)
    return Example(
      np.append(inputs, self._eos_id).astype(np.int32),
      np.append(targets, self._eos_id)[:n_targets].astype(np.int32),
    )


def _text(stream: Stream, index: int, most: int) -> np.ndarray:
  """At most so many tokens of one text."""
  tokens, starts = stream
  begin = starts[index]
  end = starts[index + 1] if index + 1 < len(starts) else len(tokens)
  return tokens[begin : min(end, begin + most)]
