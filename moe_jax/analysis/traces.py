"""Routing traces: what each sparse layer chose, batch by batch.

A trace is a folder with `header.json`, the fields of `Header`, and a NumPy file
for each batch, `<kind>/<step>_<batch>.npz`. The inputs of an encoder-decoder
have a file of their own, whose name ends in `_encoder`. The kind is 'train',
'generate' or the name of an evaluation.

    arrays = np.load('runs/tiny/trace/train/00000000_00000.npz')
    expert = arrays['expert_1']  # of layer 1
    load = np.bincount(expert[expert >= 0])

A file has arrays for B rows of T tokens, and for each layer i of E experts:

    tokens     int32 [B, T]        token ids
    positions  int32 [B, T]        index of each token in its document
    documents  int32 [B, T]        document in the row, from 1; 0 is padding
    sources    int32 [B, T]        index into the header's `sources`, if known
    expert_i   int8/int16 [B, T, K']  chosen expert, -1 for none
    gate_i     float16/float32 [B, T, K']  its weight, 0 where it is not kept
    kept_i     bool [B, T, K']     whether the choice was served
    logits_i   float16/float32 [B, T, E]  logits of the router, if recorded

K' is K, or where experts choose tokens, the most choices of any token; the
largest gate then comes first.
"""

import dataclasses
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from moe_jax.data.cache_folders import whole_folder
from moe_jax.data.plain_files import read_json
from moe_jax.errors import InputError, writing
from moe_jax.models.recorded import LayerChoices, expert_type

FORMAT = 2
HEADER = 'header.json'
_NAME = re.compile(r'(\d{8,})_(\d{5,})(?:_(\w+))?\.npz')
Folder = str | os.PathLike[str]
_IDS = ('tokens', 'positions', 'documents', 'sources')


class Record(NamedTuple):
  """The choices of experts in a batch, or in a batch's encoder or decoder.

  Attributes:
    kind: 'train', the name of an evaluation, or 'generate'.
    step: The number of optimizer steps that were taken before the batch.
    batch: The index of the batch among those of the same kind and step.
    tokens: int32 [B, T], token ids.
    positions: int32 [B, T], the position of each token in its document.
    documents: int32 [B, T], the number of the token's document in the row, from
      1; 0 is padding.
    layers: The choices of each sparse layer, by the index of the layer. The
      indices of experts are int32, the gates and logits are float32 that were
      rounded to the header's dtype.
    sources: int32 [B, T], the index of each token's source in `Header.sources`;
      None where the data does not tell its sources.
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
  """The description of one sparse layer, whose choices a trace has.

  Attributes:
    num_experts: The number E of experts that choices go to.
    num_selected: The number K of experts that a token chooses.
    capacity: The slots of an expert in a group in training; None if there is no
      bound.
    group_size: The number of tokens in a group in training; 0 if unknown.
    by_expert: Whether experts choose tokens.
    sequence: '' or 'encoder', the sequence whose tokens the layer sees.
    by_logits: Whether tokens choose the experts of their largest logits, so
      that no bias and no groups of experts matter. Older traces do not tell.
  """

  num_experts: int
  num_selected: int
  capacity: int | None = None
  group_size: int = 0
  by_expert: bool = False
  sequence: str = ''
  by_logits: bool = True


@dataclasses.dataclass(frozen=True)
class Header:
  """The description of a run that all records of a trace share.

  Attributes:
    layers: The sparse layers, by their index in the model, an encoder's first.
    batch_size: The number B of rows of a batch of training and evaluation.
    seq_len: The number T of tokens of a row of such a batch.
    vocab_size: The number V of token ids.
    data_digest: The sha256 of the data; '' if the data has no digest.
    model_digest: The sha256 of the model's options.
    seed: The seed of the run.
    sources: The names of the sources of data that `Record.sources` points to.
    tokenizer: A description of the tokenizer.
    has_logits: Whether records have the logits of routers.
    dtype: The type that gates and logits are stored in, 'float16' or 'float32'.
    note: A note for readers of the choices, such as that generation drops no
      token.
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


class Trace:
  """A trace, whose files are read as records are asked for.

  Attributes:
    header: The header of the trace.
  """

  def __init__(self, folder: pathlib.Path, header: Header):
    self.header = header
    # (step, kind, batch, sequence) -> file
    self._paths = dict(sorted(_files(folder)))

  @property
  def kinds(self) -> tuple[str, ...]:
    """The kinds of the trace's records, in alphabetical order."""
    return tuple(sorted({kind for _, kind, *_ in self._paths}))

  def steps_of(self, kind: str) -> tuple[int, ...]:
    """The steps at which the trace has records of a kind, ascending."""
    return tuple(dict.fromkeys(n for n, k, *_ in self._paths if k == kind))

  def records(
    self, kind: str | None = None, steps: Container[int] | None = None
  ) -> Iterator[Record]:
    """The records, in the order of step, kind, batch and sequence.

    Args:
      kind: The kind of the records; None takes all kinds.
      steps: The steps of the records, such as a range; None takes all steps.

    Raises:
      ValueError: The trace has no such kind, or a file is damaged.
    """
    if kind is not None and kind not in self.kinds:
      raise InputError(f'unknown kind {kind!r}; have {[*self.kinds]}')
    for (step, own_kind, batch, sequence), path in self._paths.items():
      if kind in (None, own_kind) and (steps is None or step in steps):
        yield Record(own_kind, step, batch, **_load(path), sequence=sequence)


def begin(folder: Folder, header: Header, step: int = 0) -> None:
  """Makes the folder of a trace with its header, or goes on with a trace.

  If the folder has a trace, those of its records are deleted that a run makes
  again when it goes on from `step`: the records of training at `step` and
  later, and those of evaluations after `step`. Evaluations at `step` itself are
  still valid; if such an evaluation is repeated, its records are overwritten.
  """
  folder = pathlib.Path(folder).expanduser()
  folder.mkdir(parents=True, exist_ok=True)
  if not (folder / HEADER).exists():
    values = {'format': FORMAT, **dataclasses.asdict(header)}
    text = json.dumps(values, indent=1)
    (folder / HEADER).write_text(text, encoding='utf-8')
  for (at, kind, *_), path in [*_files(folder)]:
    if at > step or (kind == 'train' and at == step):
      path.unlink()


def check(folder: Folder, header: Header) -> None:
  """Checks that a folder has no trace, or one that this header continues.

  Raises:
    ValueError: The folder has another trace; what differs is listed.
  """
  if not (pathlib.Path(folder).expanduser() / HEADER).exists():
    return
  names = {field.name for field in dataclasses.fields(header)} - {'note'}
  if lines := [*differences(read(folder).header, header, sorted(names))]:
    title = f'{folder} has the trace of something else:'
    hint = 'move this folder away to record anew'
    raise InputError('\n  '.join([title, *lines, hint]))


def differences(there: Any, here: Any, names: Iterable[str]) -> Iterator[str]:
  """Yields a line for each attribute that differs between two objects.

  Args:
    there: A header, or the description of a layer, from a trace.
    here: The header or description to compare with it.
    names: The names of the attributes that are compared.
  """
  for name in names:
    if (a := getattr(there, name)) != (b := getattr(here, name)):
      yield f'{name}: {a!r} there, {b!r} here'


def check_new(folder: Folder) -> None:
  """Raises ValueError for a folder that has a trace."""
  if (pathlib.Path(folder).expanduser() / HEADER).exists():
    raise InputError(f'{folder} has a trace already; give a new folder')


def save(folder: pathlib.Path, header: Header, record: Record) -> None:
  """Writes a record; the file gets its name only when it is complete.

  Raises:
    ValueError: The record does not fit the header.
    OSError: The file cannot be written.
  """
  given = {name: getattr(record, name) for name in _IDS}
  arrays = {
    k: np.asarray(x, np.int32) for k, x in given.items() if x is not None
  }
  for number, choices in record.layers.items():
    if (layer := header.layers.get(number)) is None:
      raise InputError(f'layer {number} not in {sorted(header.layers)}')
    largest = int(np.max(choices.expert, initial=-1))
    if largest >= layer.num_experts:
      raise InputError(f'expert {largest} not below {layer.num_experts}')
    dtype = header.dtype
    types = expert_type(layer.num_experts), dtype, bool, dtype
    for name, values, dtype in zip(LayerChoices._fields, choices, types):
      if values is not None:
        arrays[f'{name}_{number}'] = np.asarray(values, dtype)
  for name, values in arrays.items():
    if values.shape[:2] != record.tokens.shape:
      raise InputError(
        f'{name} has shape {values.shape}, tokens {record.tokens.shape}'
      )
  suffix = f'_{record.sequence}' if record.sequence else ''
  name = f'{record.step:08d}_{record.batch:05d}{suffix}.npz'
  path = folder / record.kind / name
  path.parent.mkdir(exist_ok=True)
  unfinished = path.with_suffix('.tmp')
  with writing(path):
    with unfinished.open('wb') as file:
      np.savez(file, allow_pickle=False, **arrays)
    unfinished.replace(path)


def write(folder: Folder, header: Header, records: Iterable[Record]) -> None:
  """Writes a complete trace to an empty folder; only one process calls this.

  Raises:
    ValueError: The folder is not empty.
  """
  with whole_folder(pathlib.Path(folder).expanduser()) as unfinished:
    begin(unfinished, header)
    for record in records:
      save(unfinished, header, record)


def read(folder: Folder) -> Trace:
  """Reads the header of a trace, and the names of its files.

  Raises:
    ValueError: The folder has no trace, or its header is of another format.
  """
  folder = pathlib.Path(folder).expanduser()
  path = folder / HEADER
  if not (values := read_json(path)):
    raise InputError(
      f'{folder} has no trace, as moe_jax.analysis.record_evaluation or a run '
      f'with config.trace writes it: no {HEADER}'
    )
  if (version := values.pop('format', None)) != FORMAT:
    raise InputError(
      f'{path}: a trace of format {version}; this version reads {FORMAT} alone'
    )
  try:
    layers = values.pop('layers').items()
    values['layers'] = {int(i): LayerInfo(**info) for i, info in layers}
    values['sources'] = tuple(values['sources'])
    return Trace(folder, Header(**values))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise InputError(f'{path}: no header of a trace: {error!r}') from None


def _files(
  folder: pathlib.Path,
) -> Iterator[tuple[tuple[int, str, int, str], pathlib.Path]]:
  for path in folder.glob('*/*.npz'):
    if match := _NAME.fullmatch(path.name):
      step, batch, sequence = match.groups()
      key = int(step), path.parent.name, int(batch), sequence or ''
      yield key, path


def _load(path: pathlib.Path) -> dict[str, Any]:
  """The fields `_IDS` and `layers` of a record, by name, from its file.

  Raises ValueError if the file is damaged.
  """
  try:
    with np.load(path, allow_pickle=False) as file:
      arrays = dict(file)
  except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
    raise InputError(f'{path} cannot be read: {error!r}') from None
  types = np.int32, np.float32, bool, np.float32
  fields: dict[int, list[np.ndarray]] = {}
  for field, dtype in zip(LayerChoices._fields, types):
    for name in arrays:
      if name.startswith(f'{field}_'):
        number = int(name.removeprefix(f'{field}_'))
        fields.setdefault(number, []).append(arrays[name].astype(dtype))
  layers = {number: LayerChoices(*fields[number]) for number in sorted(fields)}
  return {**{name: arrays.get(name) for name in _IDS}, 'layers': layers}
