"""Replay: a recorded routing imposed on another pass over the same tokens.

    batch = replay.imposed(model, batch, record)
    logits, aux = model.apply(variables, **model.inputs(batch))

Experts and drops are those of the record; gates, losses and gradients come from
the running model's own routers. So two stacks, or two precisions, are compared
with the routing held fixed.

The hook `Replaying` gives each training step of a run the record of the same
step of `config.model.moe.replay`. It also gives steps that are recorded the
same arrays, which then leave all choices to the routers: a recorded run and a
replayed one execute the same program, and are equal to the last bit.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import partitioning
from moe_jax.analysis import traces
from moe_jax.analysis.recording import header_of
from moe_jax.analysis.traces import Header, Record, Trace
from moe_jax.errors import InputError
from moe_jax.models import Model, Stacks
from moe_jax.models.base import REPLAYED
from moe_jax.models.recorded import expert_type
from moe_jax.routing.given_choice_rule import NO_CHOICE, OPEN
from moe_jax.training.setup import Hook, Run

TRAIN = 'train'
Batch = dict[str, Any]


def imposed(model: Model, batch: Mapping[str, Any], *records: Record) -> Batch:
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
  lines = []
  for key, value in ids(records).items():
    own = np.asarray(batch[key])
    if own.shape != value.shape:
      lines.append(f'{key}: {value.shape} there, {own.shape} here')
    elif count := int((own != value).sum()):
      lines.append(f'{key}: {count} of {own.size} are others there')
  if lines:
    raise InputError('\n'.join(['the record is of another batch:', *lines]))
  choices = arrays(model, records) if records else no_choices(model, batch)
  return {**batch, **choices}


def ids(records: Sequence[Record]) -> dict[str, np.ndarray]:
  """The arrays of a batch that have to be those of the records, by key."""
  arrays = {}
  for record in records:
    prefix = _prefix(record.sequence)
    arrays[f'{prefix}tokens'] = record.tokens
    arrays[f'{prefix}segment_ids'] = record.documents
  return arrays


def _prefix(sequence: str) -> str:
  """The prefix of batch keys of a record's sequence."""
  return f'{sequence}_' if sequence else ''


def arrays(model: Model, records: Sequence[Record]) -> dict[str, np.ndarray]:
  """The arrays of a batch that impose the choices of records, by key.

  They are experts, int8 or int16 [B, T, L, K], and whether choices are served,
  bool, for each sequence; see `Model.inputs`.

  Raises:
    ValueError: The records do not have the model's sparse layers, or there is a
      choice more than the layers take.
  """
  stacks, choices = model.stacks, {}
  layers = _layers(stacks)
  for record in records:
    prefix = _prefix(record.sequence)
    numbers = layers.pop(prefix, [])
    if numbers != sorted(record.layers):
      raise InputError(
        f'the record of the sequence {record.sequence!r} has layers '
        f'{sorted(record.layers)}; the sparse layers of the model are {numbers}'
      )
    per_key = zip(*(_choices(stacks, layer, record) for layer in numbers))
    for key, values in zip(REPLAYED, per_key):
      choices[f'{prefix}{key}'] = np.stack(values, axis=2)
  if missing := [*itertools.chain(*layers.values())]:
    raise InputError(f'no record has the layers {missing}')
  return choices


def no_choices(model: Model, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The arrays of a batch that leave all choices to the routers, by key."""
  stacks, choices = model.stacks, {}
  for prefix, layers in _layers(stacks).items():
    if layers:
      lengths = (
        len(layers),
        max(_num_choices(stacks, layer) for layer in layers),
      )
      shape = (*batch[f'{prefix}tokens'].shape, *lengths)
      values = np.full(shape, OPEN, _expert_type(stacks)), np.zeros(shape, bool)
      choices |= zip((f'{prefix}{key}' for key in REPLAYED), values)
  return choices


def _expert_type(stacks: Stacks) -> type[np.integer]:
  """The type of numbers of experts, and of the signs that stand for none."""
  sizes = (moe.num_experts for moe in stacks.mixtures)
  return expert_type(max(sizes))


def _layers(stacks: Stacks) -> dict[str, list[int]]:
  """The sparse layers of each sequence, by the prefix of its keys."""
  layers = {prefix: [] for prefix in stacks.sequences}
  for layer in stacks.sparse_layers:
    layers[stacks.sequence_of(layer)].append(layer)
  return layers


def _num_choices(stacks: Stacks, layer: int) -> int:
  """The number of choices of a token for which a layer has room."""
  moe = stacks.moe_of(layer)
  return moe.num_experts if moe.router.by_expert else moe.num_selected


def _choices(
  stacks: Stacks, layer: int, record: Record
) -> tuple[np.ndarray, np.ndarray]:
  """The experts and the served choices of a layer, [B, T, K] each."""
  E, K = stacks.moe_of(layer).num_experts, _num_choices(stacks, layer)
  expert, kept = record.layers[layer].expert, record.layers[layer].kept
  missing, largest = K - expert.shape[-1], int(expert.max(initial=NO_CHOICE))
  if missing < 0 or largest >= E:
    raise InputError(
      f'layer {layer}: the record has {expert.shape[-1]} choices of a token '
      f'and expert {largest}; the model has {K} choices among {E} experts'
    )
  padding = [(0, 0)] * (expert.ndim - 1) + [(0, missing)]
  expert = expert.astype(_expert_type(stacks))
  return (
    np.pad(expert, padding, constant_values=NO_CHOICE),
    np.pad(kept, padding),
  )


def _differences(trace: Trace, in_run: Header, steps: int) -> Iterator[str]:
  """A line for each thing that keeps a trace from fitting a run."""
  in_trace = trace.header
  names = 'batch_size', 'seq_len', 'vocab_size', 'data_digest', 'seed'
  pairs = {n: (getattr(in_trace, n), getattr(in_run, n)) for n in names}
  pairs['sparse layers'] = sorted(in_trace.layers), sorted(in_run.layers)
  shared = sorted({*in_trace.layers} & {*in_run.layers})
  for layer in shared:
    a, b = in_trace.layers[layer], in_run.layers[layer]
    names = ['num_experts', 'by_expert', 'sequence']
    names += [] if a.by_expert else ['num_selected']
    names += ['group_size'] if a.group_size else []
    for n in names:
      pairs[f'layer {layer}: {n}'] = getattr(a, n), getattr(b, n)
  for name, (there, here) in pairs.items():
    if there != here:
      yield f'{name}: {there!r} there, {here!r} here'
  for layer in shared:
    there, here = (x.layers[layer].capacity for x in (in_trace, in_run))
    if here is not None and (there is None or there > here):
      yield (
        f'layer {layer}: capacity: {there} there, {here} here, which must not '
        'be less'
      )
  missing = set(range(steps)) - {*trace.steps_of(TRAIN)}
  if missing:
    yield (
      f'{len(missing)} of {steps} steps have no record, the first after '
      f'{min(missing)} steps; record with trace.every_steps=1'
    )


class Replaying(Hook):
  """Imposes the records of `moe.replay` on the training steps of a run."""

  serves = 'model.moe.replay'

  def __init__(self):
    self._trace: Trace | None = None

  def check(self, run: Run) -> None:
    """Reads the trace.

    Raises:
      ValueError: There is none, or it does not fit the run.
    """
    if folder := run.options.model.moe.replay:
      self._trace = traces.read(folder)
      steps = run.options.total_steps
      lines = [*_differences(self._trace, header_of(run), steps)]
      if lines:
        name = f'model.moe.replay={folder!r} does not fit:'
        raise InputError('\n'.join([name, *lines]))

  def start(self, run: Run) -> Run | None:
    """Wraps the step."""
    if self._trace is not None:
      run.message(
        f'{run.options.model.moe.replay}: its choices of experts are replayed '
        'in training; evaluations choose by themselves'
      )
    elif not _is_recorded(run):
      return None
    step = ReplayedStep(run, self._trace)
    return dataclasses.replace(run, train_step=step)


def _is_recorded(run: Run) -> bool:
  """Whether steps are recorded that could be replayed as they are.

  A teacher would read the arrays of the batch, too, and forced choices cannot
  be left to the routers.
  """
  moes = run.model.stacks.mixtures
  return (
    bool(moes)
    and run.options.trace.every_steps > 0
    and not run.model.stacks.forced_balance
    and 'distill' not in run.options.for_hooks
    and all(moe.replays() is None for moe in moes)
  )


class ReplayedStep:
  """A step (state, batch) whose batches get arrays of choices.

  They are the recorded ones of the step; without a trace, they leave all
  choices to the routers.

  Attributes:
    stage: The step that takes them in its batch, or a stage of its compilation.
  """

  def __init__(self, run: Run, trace: Trace | None):
    self.stage: Any = run.train_step
    self._run, self._trace = run, trace
    self._records: Iterator[list[Record]] | None = None
    shapes = run.options.batch_shapes(run.model)
    self._open = run.programs.put(no_choices(run.model, shapes))
    replicated = partitioning.sharding(run.mesh, run.options.sharding.rules, ())
    self._equal = jax.jit(_equal, out_shardings=replicated)

  def __call__(self, state: Any, batch: Batch) -> Any:
    """The new state and the metrics; see `training.step.train_step`.

    Raises:
      ValueError: The record is of another batch, or its file is damaged.
    """
    if self._trace is None:
      return self.stage(state, {**batch, **self._open})
    if self._records is None:
      self._records = _by_step(self._trace, int(state.step))
    records, options = next(self._records), self._run.options
    put = self._run.programs.put
    imposed_arrays, record_ids = (
      put.local({name: value[put.rows] for name, value in values.items()})
      for values in (arrays(self._run.model, records), ids(records))
    )
    # This waits for the step before.
    if not self._equal({name: batch[name] for name in record_ids}, record_ids):
      raise InputError(
        f'model.moe.replay={options.model.moe.replay!r}: the batch after '
        f'{records[0].step} steps is another one there; the options of the '
        'data differ'
      )
    state, metrics = self.stage(state, {**batch, **imposed_arrays})
    if not options.trace.every_steps:
      metrics = metrics._replace(sums=metrics.sums._replace(choices=None))
    return state, metrics

  def lower(self, state: Any, batch: Batch) -> 'ReplayedStep':
    """See `jax.stages.Wrapped.lower`."""
    shapes = {
      name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
      for name, x in self._open.items()
    }
    return self._with(self.stage.lower(state, {**batch, **shapes}))

  def compile(self) -> 'ReplayedStep':
    """See `jax.stages.Lowered.compile`."""
    return self._with(self.stage.compile())

  def _with(self, stage: Any) -> 'ReplayedStep':
    step = object.__new__(ReplayedStep)
    vars(step).update(vars(self), stage=stage)
    return step

  def __getattr__(self, name: str) -> Any:
    return getattr(self.stage, name)


def _equal(in_batch: Batch, in_record: Batch) -> jax.Array:
  equal = [jnp.all(in_batch[name] == in_record[name]) for name in in_batch]
  return functools.reduce(jnp.logical_and, equal)


def _by_step(trace: Trace, start: int) -> Iterator[list[Record]]:
  """The records of each training step from `start` on, in order."""
  records = trace.records(TRAIN, range(start, trace.steps_of(TRAIN)[-1] + 1))
  for _, step_records in itertools.groupby(records, lambda record: record.step):
    yield list(step_records)
