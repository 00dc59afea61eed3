"""The arrays of a record of a routing trace, packed into the fewest bytes.

Experts take 8 or 16 bits, gates and logits the header's dtype, served choices a
bit each, and ids the fewest bytes that hold them. Where experts choose tokens,
only the choices that exist are stored.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from moe_jax.analysis.trace_records import (
  Header,
  LayerChoices,
  LayerInfo,
  Record,
)
from moe_jax.errors import InputError

IDS = ('tokens', 'positions', 'documents', 'sources')

Arrays = dict[str, np.ndarray]


class Entry(NamedTuple):
  """The description of a record in a chunk.

  Attributes:
    kind, step, batch, sequence: See `Record`.
    rows: The numbers of the rows of the batch that this process has.
    batch_size: The number of rows of the whole batch.
    layers: The numbers of the layers.
  """

  kind: str
  step: int
  batch: int
  sequence: str
  rows: tuple[int, ...]
  batch_size: int
  layers: tuple[int, ...]

  @classmethod
  def of(cls, values: Sequence[Any]) -> 'Entry':
    """The entry from its list in JSON."""
    return cls._make(tuple(v) if isinstance(v, list) else v for v in values)


def pack(record: Record, header: Header) -> Arrays:
  """The arrays of a record as they are stored, by name.

  Raises:
    ValueError: The record does not fit the header.
  """
  shape = record.tokens.shape
  arrays = {}
  for name in IDS:
    if (values := getattr(record, name)) is not None:
      arrays[name] = _smallest(_checked_shape(name, values, shape))
  for number, choices in record.layers.items():
    if (info := header.layers.get(number)) is None:
      raise InputError(f'layer {number} not in {sorted(header.layers)}')
    _checked_shape(f'expert of layer {number}', choices.expert[..., 0], shape)
    packed = _pack_layer(choices, info, np.dtype(header.dtype))
    arrays |= {f'{number}/{name}': value for name, value in packed.items()}
  return arrays


def unpack(arrays: Arrays, entry: Entry, header: Header) -> Record:
  """The record of arrays that `pack` returned; see `Record` for types."""
  ids: dict[str, Any] = {
    name: arrays[name].astype(np.int32) if name in arrays else None
    for name in IDS
  }
  shape = ids['tokens'].shape
  layers = {}
  for number in entry.layers:
    prefix = f'{number}/'
    layer_arrays = {
      name.removeprefix(prefix): value
      for name, value in arrays.items()
      if name.startswith(prefix)
    }
    layers[number] = _unpack_layer(layer_arrays, shape, header.layers[number])
  kind, step, batch, sequence = entry[:4]
  return Record(kind, step, batch, **ids, layers=layers, sequence=sequence)


def _checked_shape(name: str, values: np.ndarray, shape: tuple[int, ...]):
  if np.shape(values) != shape:
    raise InputError(f'{name} has shape {np.shape(values)}, tokens {shape}')
  return values


def _smallest(values: np.ndarray) -> np.ndarray:
  """The integers in the smallest type that holds them."""
  values = np.asarray(values)
  low, high = (values.min(), values.max()) if values.size else (0, 0)
  types = [np.min_scalar_type(int(bound)) for bound in (low, high)]
  return np.ascontiguousarray(values, functools.reduce(np.promote_types, types))


def _expert_type(info: LayerInfo) -> np.dtype:
  """The type of numbers of experts, whose largest one stands for none."""
  return np.min_scalar_type(info.num_experts)


def _pack_layer(
  choices: LayerChoices, info: LayerInfo, dtype: np.dtype
) -> Arrays:
  expert, kept = np.asarray(choices.expert), np.asarray(choices.kept)
  gate = np.where(kept, choices.gate, 0).astype(dtype)
  is_choice = expert >= 0
  if (largest := int(expert.max(initial=-1))) >= info.num_experts:
    raise InputError(f'expert {largest} not below {info.num_experts}')
  packed = {}
  if info.by_expert:  # tokens have any number of choices, most of them few
    packed['count'] = _smallest(is_choice.sum(-1))
    expert, gate, kept = expert[is_choice], gate[is_choice], kept[is_choice]
  else:
    expert = np.where(is_choice, expert, np.iinfo(_expert_type(info)).max)
  packed['expert'] = np.ascontiguousarray(expert, _expert_type(info))
  packed['gate'] = np.ascontiguousarray(gate)
  packed['kept'] = np.packbits(kept)
  if choices.logits is not None:
    packed['logits'] = np.ascontiguousarray(choices.logits, dtype)
  return packed


def _unpack_layer(
  arrays: Arrays, shape: tuple[int, ...], info: LayerInfo
) -> LayerChoices:
  expert = arrays['expert'].astype(np.int32)
  gate = arrays['gate'].astype(np.float32)
  kept = np.unpackbits(arrays['kept'], count=expert.size).astype(bool)
  kept = kept.reshape(expert.shape)
  if info.by_expert:
    count = arrays['count'].astype(np.int32)
    is_choice = np.arange(max(int(count.max(initial=0)), 1)) < count[..., None]
    expert, gate, kept = (
      _spread(values, is_choice, filler)
      for values, filler in ((expert, -1), (gate, 0), (kept, False))
    )
  else:
    expert[arrays['expert'] == np.iinfo(_expert_type(info)).max] = -1
  logits = arrays.get('logits')
  if logits is not None:
    logits = logits.astype(np.float32)
  return LayerChoices(expert, gate, kept, logits)


def _spread(values: np.ndarray, mask: np.ndarray, filler: Any) -> np.ndarray:
  """An array of the values where `mask` is True, and of `filler` elsewhere."""
  spread = np.full(mask.shape, filler, values.dtype)
  spread[mask] = values
  return spread
