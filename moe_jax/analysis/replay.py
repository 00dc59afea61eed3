"""Replay: a recorded routing imposed on another pass over the same tokens.

    batch = replay.imposed(model, batch, record)
    logits, aux = model.apply(variables, **model.inputs(batch))

The record decides the experts and the drops; gates, losses and gradients come
from the running model's own routers. So two implementations of a model, or two
precisions, are compared with the routing held fixed.

The hook `Replaying` gives each training step of a run the record of the same
step in the trace `config.model.moe.replay`. A run that records its steps gets
the same arrays from the hook, but with values that leave all choices to the
routers. So a recorded run and its replay execute the same program, and are
equal to the last bit.
"""

import dataclasses
import itertools
from collections import defaultdict
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
from moe_jax.training.programs import Step
from moe_jax.training.setup import Hook, Run

TRAIN = 'train'  # the kind of records of training steps
Batch = dict[str, Any]


def imposed(model: Model, batch: Mapping[str, Any], *records: Record) -> Batch:
  """A batch with added arrays that make the model repeat the records' choices.

  Without records the arrays leave the choices to the routers. One compiled
  program serves both, so that a recorded pass and its replay are equal to the
  last bit; two programs may round differently.

  Args:
    model: The model, in training or not.
    batch: The batch.
    *records: The record of the batch; for an encoder-decoder two records, of
      the encoder's and the decoder's sequence.

  Raises:
    ValueError: The records have other tokens or documents than the batch, or
      other layers than the model.
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
  """The records' tokens and documents, as a batch has them.

  The keys are 'tokens' and 'segment_ids'; an encoder's begin with 'encoder_'.
  """
  arrays = {}
  for record in records:
    arrays[f'{_prefix(record)}tokens'] = record.tokens
    arrays[f'{_prefix(record)}segment_ids'] = record.documents
  return arrays


def arrays(model: Model, records: Sequence[Record]) -> dict[str, np.ndarray]:
  """The arrays of a batch that impose the choices of records, by key.

  Each sequence has two arrays [B, T, L, K] by the keys `REPLAYED` (an encoder's
  with a prefix): indices of experts, int8 or int16, and whether choices are
  served, bool. L counts its sparse layers; K is the most choices in any.

  Raises:
    ValueError: The records do not have the model's sparse layers, or a token
      has more choices than a layer of the model takes.
  """
  layers = _layers(model.stacks)
  own = {prefix: [*of_sequence] for prefix, of_sequence in layers.items()}
  recorded = {_prefix(record): sorted(record.layers) for record in records}
  if recorded != own:
    raise InputError(
      f'the records have the layers {recorded}, by the sequence that they see; '
      f'the sparse layers of the model are {own}'
    )
  choices = no_choices(model, ids(records))
  for record in records:
    experts, served = (choices[f'{_prefix(record)}{key}'] for key in REPLAYED)
    for i, (layer, K) in enumerate(layers[_prefix(record)].items()):
      expert, _, kept, _ = record.layers[layer]
      E, N = model.stacks.moe_of(layer).num_experts, expert.shape[-1]
      largest = int(expert.max(initial=NO_CHOICE))
      if N > K or largest >= E:
        raise InputError(
          f'layer {layer}: the record has {N} choices of a token and expert '
          f'{largest}; the model has {K} choices among {E} experts'
        )
      experts[:, :, i] = NO_CHOICE
      experts[:, :, i, :N], served[:, :, i, :N] = expert, kept
  return choices


def no_choices(model: Model, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The arrays of a batch that leave all choices to the routers, by key.

  They have the keys and shapes of `arrays`: for each sequence of `batch` the
  indices of experts, all `OPEN`, and whether choices are served, all False.
  """
  choices, (expert, kept) = {}, REPLAYED
  dtype = expert_type(max(moe.num_experts for moe in model.stacks.mixtures))
  for prefix, most in _layers(model.stacks).items():
    shape = (*batch[f'{prefix}tokens'].shape, len(most), max(most.values()))
    choices[f'{prefix}{expert}'] = np.full(shape, OPEN, dtype)
    choices[f'{prefix}{kept}'] = np.zeros(shape, bool)
  return choices


def _prefix(record: Record) -> str:
  """The prefix of a batch's keys for a record's sequence: '' or 'encoder_'."""
  return record.sequence and f'{record.sequence}_'


def _layers(stacks: Stacks) -> dict[str, dict[int, int]]:
  """The most experts that a token can have in each sparse layer.

  The keys are the prefix of the batch's keys of the sequence that the layer
  sees ('' or 'encoder_'), and the layer's index among all layers. Where experts
  choose, a token can have all of them.
  """
  layers = defaultdict(dict)
  for layer in stacks.sparse_layers:
    moe = stacks.moe_of(layer)
    most = moe.num_experts if moe.router.by_expert else moe.num_selected
    layers[stacks.sequence_of(layer)][layer] = most
  return layers


def _differences(trace: Trace, in_run: Header, steps: int) -> Iterator[str]:
  """A line for each reason why a trace cannot be replayed in a run.

  The run would record its own trace with the header `in_run`, and has `steps`
  training steps.
  """
  in_trace = trace.header
  names = 'batch_size', 'seq_len', 'vocab_size', 'data_digest', 'seed'
  yield from traces.differences(in_trace, in_run, names)
  own, others = sorted(in_run.layers), sorted(in_trace.layers)
  if own != others:
    yield f'sparse layers: {others} there, {own} here'
  for layer in sorted({*own} & {*others}):
    there, here = in_trace.layers[layer], in_run.layers[layer]
    names = ['num_experts', 'by_expert', 'sequence']
    names += [] if there.by_expert else ['num_selected']
    names += ['group_size'] if there.group_size else []
    for line in traces.differences(there, here, names):
      yield f'layer {layer}: {line}'
    most, room = there.capacity, here.capacity
    if room is not None and (most is None or most > room):
      line = f'layer {layer}: capacity: {most} there, {room} here'
      yield f'{line}, which must not be less'
  if missing := {*range(steps)} - {*trace.steps_of(TRAIN)}:
    yield (
      f'{len(missing)} of {steps} steps have no record, the first after '
      f'{min(missing)} steps; record with trace.every_steps=1'
    )


class Replaying(Hook):
  """Imposes the records of `moe.replay` on the training steps of a run."""

  serves = 'model.moe.replay'
  _trace: Trace | None = None

  def check(self, run: Run) -> None:
    """Reads the trace that `moe.replay` names.

    Raises:
      ValueError: There is no trace, or the trace does not fit the run.
    """
    if folder := run.options.model.moe.replay:
      self._trace = traces.read(folder)
      steps = run.options.total_steps
      if lines := [*_differences(self._trace, header_of(run), steps)]:
        name = f'model.moe.replay={folder!r} does not fit:'
        raise InputError('\n'.join([name, *lines]))

  def start(self, run: Run) -> Run | None:
    """Adds the arrays of replay to batches, if the run replays or records."""
    if self._trace is not None:
      run.message(
        f'{run.options.model.moe.replay}: its choices of experts are replayed '
        'in training; evaluations choose by themselves'
      )
      step = _replayed_step(run, self._trace)
    elif _is_recorded(run):
      step = _open_step(run)
    else:
      return None
    return dataclasses.replace(run, train_step=step)


def _is_recorded(run: Run) -> bool:
  """Whether the run records steps that a replay could repeat bit for bit.

  Runs with a teacher are left out, as the teacher would read the arrays of
  replay, too; so are forced choices, which cannot be left to the routers.
  """
  moes = run.model.stacks.mixtures
  return (
    bool(moes)
    and run.options.trace.every_steps > 0
    and not run.model.stacks.forced_balance
    and 'distill' not in run.options.for_hooks
    and all(moe.replays() is None for moe in moes)
  )


def _open_step(run: Run) -> Step:
  """Wraps a recording run's step, so that its replay can run an equal program.

  The function (state, batch) -> (state, metrics) adds `no_choices` to batches.
  """
  shapes = run.options.batch_shapes(run.model)
  choices = run.programs.put(no_choices(run.model, shapes))
  return lambda state, batch: run.train_step(state, {**batch, **choices})


def _replayed_step(run: Run, trace: Trace) -> Step:
  """Wraps a run's step so that each step repeats the choices of a trace.

  The function (state, batch) -> (state, metrics) raises ValueError if the
  trace's record of the step has other tokens or documents than the batch, or
  the record's file is damaged.
  """
  options, put = run.options, run.programs.put
  replicated = partitioning.sharding(run.mesh, options.sharding.rules, ())
  is_equal = jax.jit(_equal, out_shardings=replicated)
  records_by_step: Iterator[list[Record]] | None = None

  def replayed(state, batch):
    nonlocal records_by_step
    if records_by_step is None:  # reading `state.step` waits for the device
      records_by_step = _by_step(trace, int(state.step))
    records = next(records_by_step)
    choices, record_ids = (
      put.local({name: value[put.rows] for name, value in values.items()})
      for values in (arrays(run.model, records), ids(records))
    )
    # Reading the comparison's result waits for the step before.
    if not is_equal({name: batch[name] for name in record_ids}, record_ids):
      raise InputError(
        f'model.moe.replay={options.model.moe.replay!r}: the batch after '
        f'{records[0].step} steps is another one there; the options of the '
        'data differ'
      )
    state, metrics = run.train_step(state, {**batch, **choices})
    if not options.trace.every_steps:
      metrics = metrics._replace(sums=metrics.sums._replace(choices=None))
    return state, metrics

  return replayed


def _equal(in_batch: Batch, in_record: Batch) -> jax.Array:
  pairs = ((in_batch[name], in_record[name]) for name in in_batch)
  return jnp.array([jnp.array_equal(*pair) for pair in pairs]).all()


def _by_step(trace: Trace, start: int) -> Iterator[list[Record]]:
  """Yields the records of each training step in a trace, from `start` on."""
  records = trace.records(TRAIN, range(start, trace.steps_of(TRAIN)[-1] + 1))
  for _, step_records in itertools.groupby(records, lambda record: record.step):
    yield list(step_records)
