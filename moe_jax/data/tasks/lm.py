"""Language modelling: predict each next token of a stream of documents."""

import dataclasses

from moe_jax.data.layouts import RowShape
from moe_jax.data.packing import PackedRows
from moe_jax.data.store import Stream
from moe_jax.data.tasks.contract import TextTask
from moe_jax.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class LmTask(TextTask):
  """Rows of documents one after another, for a decoder-only model."""

  label = ''
  makes_examples = False
  answers_go_on = True

  def rows(
    self, stream: Stream, tokenizer: Tokenizer, shape: RowShape
  ) -> PackedRows:
    """See `TokenTask.rows`."""
    del tokenizer
    return PackedRows(*stream, shape.seq_len)
