"""Replay: a recorded routing imposed on another pass over the same tokens.

    batch = replay.imposed(model, batch, record)
    logits, aux = model.apply(variables, **model.inputs(batch))

Experts and drops are those of the record; gates, losses and gradients come from
the running model's own routers. So two stacks, or two precisions, are compared
with the routing held fixed. Not here: whole runs (`replaying.py`), how a router
takes choices (`layers/routers/contract.py`), and how choices are recorded
(`traces.py`).
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moe_jax.analysis.traces import Header, Record, Trace
from moe_jax.models import Model
from moe_jax.models.text_model import REPLAYED
from moe_jax.routing.given_choice_rule import NO_CHOICE, OPEN

TRAIN = 'train'
# The keys of a batch, and the fields of a record, that have to be the same.
_SAME = {'tokens': 'tokens', 'segment_ids': 'documents'}


def imposed(
  model: Model, batch: Mapping[str, Any], *records: Record
) -> dict[str, Any]:
  """A batch with which the model makes the choices of records.

  Without records its routers choose for themselves. A program compiled for such
  batches serves both, so that a pass that is recorded and one that is replayed
  are equal to the last bit; two programs may round differently.

  Args:
    model: The model, in training or not.
    batch: The batch.
    *records: The record of the batch; of an encoder-decoder, those of its two
      sequences.

  Raises:
    ValueError: The records are of other tokens, documents or layers.
  """
  wanted = ids(records)
  differ = [
    f'{key}: {_difference(np.asarray(batch[key]), value)}'
    for key, value in wanted.items()
    if not np.array_equal(batch[key], value)
  ]
  if differ:
    raise ValueError('\n'.join(['the record is of another batch:', *differ]))
  given = arrays(model, records) if records else no_choices(model, batch)
  return {**batch, **given}


def _difference(own: np.ndarray, recorded: np.ndarray) -> str:
  if own.shape != recorded.shape:
    return f'{recorded.shape} there, {own.shape} here'
  count = int((own != recorded).sum())
  return f'{count} of {own.size} are others there'


def ids(records: Sequence[Record]) -> dict[str, np.ndarray]:
  """The arrays of a batch that have to be those of the records, by key."""
  return {
    f'{_prefix(record.sequence)}{key}': getattr(record, field)
    for record in records
    for key, field in _SAME.items()
  }


def _prefix(sequence: str) -> str:
  """The prefix of batch keys of a record's sequence."""
  return f'{sequence}_' if sequence else ''


def arrays(model: Model, records: Sequence[Record]) -> dict[str, np.ndarray]:
  """The arrays of a batch that impose the choices of records, by key.

  They are experts, int8 or int16 [B, T, L, K], and whether choices are served,
  bool, for each sequence; see `TextModel.inputs`.

  Raises:
    ValueError: The records do not have the model's sparse layers, or there is a
      choice more than the layers take.
  """
  layers, given = _layers(model), {}
  for record in records:
    prefix = _prefix(record.sequence)
    own = layers.pop(prefix, [])
    if own != sorted(record.layers):
      raise ValueError(
        f'the record of the sequence {record.sequence!r} has layers '
        f'{sorted(record.layers)}; the sparse layers of the model are {own}'
      )
    both = zip(*(_choices(model, layer, record) for layer in own))
    for key, values in zip(REPLAYED, both):
      given[f'{prefix}{key}'] = np.stack(values, axis=2)
  if missing := [*itertools.chain(*layers.values())]:
    raise ValueError(f'no record has the layers {missing}')
  return given


def no_choices(model: Model, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The arrays of a batch that leave all choices to the routers, by key."""
  given = {}
  for prefix, layers in _layers(model).items():
    if layers:
      lengths = len(layers), max(_length(model, layer) for layer in layers)
      shape = (*batch[f'{prefix}tokens'].shape, *lengths)
      expert = np.full(shape, OPEN, _expert_type(model))
      both = expert, np.zeros(shape, bool)
      given |= zip((f'{prefix}{key}' for key in REPLAYED), both)
  return given


def _expert_type(model: Model) -> type[np.integer]:
  """The type of numbers of experts, and of the signs that stand for none."""
  most = max(model.moe_of(layer).num_experts for layer in model.sparse_layers)
  return np.int8 if most <= np.iinfo(np.int8).max else np.int16


def _layers(model: Model) -> dict[str, list[int]]:
  """The sparse layers of each sequence, by the prefix of its keys."""
  layers = {prefix: [] for prefix in model.sequences}
  for layer in model.sparse_layers:
    layers[model.sequence_of(layer)].append(layer)
  return layers


def _length(model: Model, layer: int) -> int:
  """The number of choices of a token for which a layer has room."""
  moe = model.moe_of(layer)
  return moe.num_experts if moe.router.by_expert else moe.num_selected


def _choices(
  model: Model, layer: int, record: Record
) -> tuple[np.ndarray, np.ndarray]:
  """The experts and the served choices of a layer, [B, T, K] each."""
  E, K = model.moe_of(layer).num_experts, _length(model, layer)
  expert, kept = record.layers[layer].expert, record.layers[layer].kept
  missing, largest = K - expert.shape[-1], int(expert.max(initial=NO_CHOICE))
  if missing < 0 or largest >= E:
    raise ValueError(
      f'layer {layer}: the record has {expert.shape[-1]} choices of a token '
      f'and expert {largest}; the model has {K} choices among {E} experts'
    )
  wide = [(0, 0)] * (expert.ndim - 1) + [(0, missing)]
  kind = _expert_type(model)
  return (
    np.pad(expert.astype(kind), wide, constant_values=NO_CHOICE),
    np.pad(kept, wide),
  )


def check(trace: Trace, own: Header, total_steps: int, name: str) -> None:
  """Checks that a trace is of the batches and the layers of a run.

  Args:
    trace: The trace.
    own: The header that a trace of the run would have.
    total_steps: The number of steps of the run.
    name: The option that names the trace, with its value, for the error.

  Raises:
    ValueError: Something differs; all differences are listed.
  """
  differ = [*_differences(trace.header, own)]
  steps = set(range(total_steps)) - {*trace.steps_of(TRAIN)}
  if steps:
    differ.append(
      f'{len(steps)} of {total_steps} steps have no record, the first after '
      f'{min(steps)} steps; record with trace.every_steps=1'
    )
  if differ:
    raise ValueError('\n'.join([f'{name} does not fit:', *differ]))


def _differences(there: Header, here: Header) -> Iterator[str]:
  """A line for each field that has to be the same and is not."""
  for name in ('batch_size', 'seq_len', 'vocab_size', 'data_digest', 'seed'):
    yield from _unequal(name, getattr(there, name), getattr(here, name))
  layers = sorted(there.layers), sorted(here.layers)
  yield from _unequal('sparse layers', *layers)
  for layer in sorted({*layers[0]} & {*layers[1]}):
    a, b = there.layers[layer], here.layers[layer]
    names = ['num_experts', 'by_expert', 'sequence']
    names += [] if a.by_expert else ['num_selected']
    names += ['group_size'] if a.group_size else []
    for name in names:
      said = f'layer {layer}: {name}'
      yield from _unequal(said, getattr(a, name), getattr(b, name))
    slots = [math.inf if x.capacity is None else x.capacity for x in (a, b)]
    if slots[0] > slots[1]:
      yield (
        f'layer {layer}: capacity: {a.capacity} there, {b.capacity} here, '
        'which must not be less'
      )


def _unequal(name: str, there: Any, here: Any) -> Iterator[str]:
  if there != here:
    yield f'{name}: {there!r} there, {here!r} here'
