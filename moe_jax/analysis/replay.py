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
from moe_jax.errors import InputError
from moe_jax.models import Model
from moe_jax.models.text_model import REPLAYED
from moe_jax.routing.given_choice_rule import NO_CHOICE, OPEN

TRAIN = 'train'
# The keys of a batch, and the fields of a record, that have to be the same.
_COMPARED = {'tokens': 'tokens', 'segment_ids': 'documents'}


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
  expected = ids(records)
  lines = [
    f'{key}: {_difference(np.asarray(batch[key]), value)}'
    for key, value in expected.items()
    if not np.array_equal(batch[key], value)
  ]
  if lines:
    raise InputError('\n'.join(['the record is of another batch:', *lines]))
  choices = arrays(model, records) if records else no_choices(model, batch)
  return {**batch, **choices}


def _difference(in_batch: np.ndarray, in_record: np.ndarray) -> str:
  if in_batch.shape != in_record.shape:
    return f'{in_record.shape} there, {in_batch.shape} here'
  count = int((in_batch != in_record).sum())
  return f'{count} of {in_batch.size} are others there'


def ids(records: Sequence[Record]) -> dict[str, np.ndarray]:
  """The arrays of a batch that have to be those of the records, by key."""
  return {
    f'{_prefix(record.sequence)}{key}': getattr(record, field)
    for record in records
    for key, field in _COMPARED.items()
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
  layers, choices = _layers(model), {}
  for record in records:
    prefix = _prefix(record.sequence)
    numbers = layers.pop(prefix, [])
    if numbers != sorted(record.layers):
      raise InputError(
        f'the record of the sequence {record.sequence!r} has layers '
        f'{sorted(record.layers)}; the sparse layers of the model are {numbers}'
      )
    per_key = zip(*(_choices(model, layer, record) for layer in numbers))
    for key, values in zip(REPLAYED, per_key):
      choices[f'{prefix}{key}'] = np.stack(values, axis=2)
  if missing := [*itertools.chain(*layers.values())]:
    raise InputError(f'no record has the layers {missing}')
  return choices


def no_choices(model: Model, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The arrays of a batch that leave all choices to the routers, by key."""
  choices = {}
  for prefix, layers in _layers(model).items():
    if layers:
      lengths = len(layers), max(_num_choices(model, layer) for layer in layers)
      shape = (*batch[f'{prefix}tokens'].shape, *lengths)
      expert = np.full(shape, OPEN, _expert_type(model))
      values = expert, np.zeros(shape, bool)
      choices |= zip((f'{prefix}{key}' for key in REPLAYED), values)
  return choices


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


def _num_choices(model: Model, layer: int) -> int:
  """The number of choices of a token for which a layer has room."""
  moe = model.moe_of(layer)
  return moe.num_experts if moe.router.by_expert else moe.num_selected


def _choices(
  model: Model, layer: int, record: Record
) -> tuple[np.ndarray, np.ndarray]:
  """The experts and the served choices of a layer, [B, T, K] each."""
  E, K = model.moe_of(layer).num_experts, _num_choices(model, layer)
  expert, kept = record.layers[layer].expert, record.layers[layer].kept
  missing, largest = K - expert.shape[-1], int(expert.max(initial=NO_CHOICE))
  if missing < 0 or largest >= E:
    raise InputError(
      f'layer {layer}: the record has {expert.shape[-1]} choices of a token '
      f'and expert {largest}; the model has {K} choices among {E} experts'
    )
  padding = [(0, 0)] * (expert.ndim - 1) + [(0, missing)]
  dtype = _expert_type(model)
  return (
    np.pad(expert.astype(dtype), padding, constant_values=NO_CHOICE),
    np.pad(kept, padding),
  )


def check(trace: Trace, header: Header, total_steps: int, name: str) -> None:
  """Checks that a trace is of the batches and the layers of a run.

  Args:
    trace: The trace.
    header: The header that a trace of the run would have.
    total_steps: The number of steps of the run.
    name: The option that names the trace, with its value, for the error.

  Raises:
    ValueError: Something differs; all differences are listed.
  """
  lines = [*_differences(trace.header, header)]
  missing = set(range(total_steps)) - {*trace.steps_of(TRAIN)}
  if missing:
    lines.append(
      f'{len(missing)} of {total_steps} steps have no record, the first after '
      f'{min(missing)} steps; record with trace.every_steps=1'
    )
  if lines:
    raise InputError('\n'.join([f'{name} does not fit:', *lines]))


def _differences(in_trace: Header, in_run: Header) -> Iterator[str]:
  """A line for each field that has to be the same and is not."""
  for name in ('batch_size', 'seq_len', 'vocab_size', 'data_digest', 'seed'):
    yield from _unequal(name, getattr(in_trace, name), getattr(in_run, name))
  layers = sorted(in_trace.layers), sorted(in_run.layers)
  yield from _unequal('sparse layers', *layers)
  for layer in sorted({*layers[0]} & {*layers[1]}):
    a, b = in_trace.layers[layer], in_run.layers[layer]
    names = ['num_experts', 'by_expert', 'sequence']
    names += [] if a.by_expert else ['num_selected']
    names += ['group_size'] if a.group_size else []
    for name in names:
      label = f'layer {layer}: {name}'
      yield from _unequal(label, getattr(a, name), getattr(b, name))
    slots = [math.inf if x.capacity is None else x.capacity for x in (a, b)]
    if slots[0] > slots[1]:
      yield (
        f'layer {layer}: capacity: {a.capacity} there, {b.capacity} here, '
        'which must not be less'
      )


def _unequal(name: str, in_trace: Any, in_run: Any) -> Iterator[str]:
  if in_trace != in_run:
    yield f'{name}: {in_trace!r} there, {in_run!r} here'
