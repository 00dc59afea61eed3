"""The header of a trace, from a model and options.

Not here: the header's fields (`trace_records.py`).
"""

import hashlib
from typing import Any

from moe_jax.analysis.trace_records import Header, LayerInfo
from moe_jax.data import DataOptions
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.models import Model, ModelOptions


def make_header(
  model: Model,
  options: ModelOptions,
  data: DataOptions,
  tokenizer: Tokenizer,
  *,
  batch_size: int,
  microbatches: int = 1,
  note: str = '',
  **fields: Any,
) -> Header:
  """The header of a trace of a model.

  Args:
    model: The model.
    options: The options that built it.
    data: The options of its data.
    tokenizer: Its tokenizer.
    batch_size: The number of rows of a batch.
    microbatches: The number of parts that a batch is computed in.
    note: A note for readers, to which one on forced choices is added.
    **fields: Further fields of the header.
  """
  lengths = dict.fromkeys(model.sequences, data.seq_len)
  if model.has_encoder:
    lengths[''] = data.target_len
  rows = batch_size // microbatches
  layers = {
    layer: _layer_info(model, layer, rows, lengths[model.sequence_of(layer)])
    for layer in model.sparse_layers
  }
  return Header(
    layers=layers,
    batch_size=batch_size,
    seq_len=lengths[''],
    vocab_size=model.vocab_size,
    model_digest=hashlib.sha256(repr(options).encode()).hexdigest(),
    sources=tuple(data.tasks),
    tokenizer=tokenizer.identity,
    note='; '.join(filter(None, (note, model.forced_balance))),
    **fields,
  )


def _layer_info(model: Model, layer: int, rows: int, length: int) -> LayerInfo:
  moe = model.moe_of(layer)
  S = rows * length if moe.group_size == -1 else moe.group_size or length
  is_bounded = moe.router.by_expert or moe.router.drops(moe.sizes)
  return LayerInfo(
    num_experts=moe.sizes.num_retained,
    num_selected=moe.num_selected,
    capacity=moe.router.training_slots(moe.sizes, S) if is_bounded else None,
    group_size=S,
    by_expert=moe.router.by_expert,
    sequence=model.sequence_of(layer).rstrip('_'),
    second_policy=moe.router.second_policy,
  )
