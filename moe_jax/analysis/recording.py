"""Records the choices of experts in the training and evaluations of a run.

Arrays are copied from the devices while the devices compute; a thread makes
records of the arrays, and writes the records.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import jax
import numpy as np

from moe_jax.analysis import traces
from moe_jax.analysis.counts import group_size, training_slots
from moe_jax.analysis.traces import Header, LayerInfo, Record
from moe_jax.data import DataOptions
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.devices import fetch, is_first
from moe_jax.models import Model, ModelOptions
from moe_jax.models.recorded import Apply, Choices, LayerChoices
from moe_jax.runs.summary import Batch, summarize
from moe_jax.training.evaluate import Losses, Measure
from moe_jax.training.programs import Step
from moe_jax.training.run_options import TraceOptions
from moe_jax.training.setup import Hook, Run

FOLDER = 'trace'
# The most batches that may wait for the thread that writes records. Until a
# batch is written, the devices hold its arrays.
_QUEUE_SIZE = 8
# For each field of a record that is copied from a batch, the array's key there.
# An encoder's arrays have keys with the prefix 'encoder_'.
_KEYS = {
  'tokens': 'tokens',
  'positions': 'positions',
  'documents': 'segment_ids',
  'sources': 'task_ids',
}


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
  """The header of a trace of a model's choices of experts.

  Args:
    model: The model.
    options: The options that the model was built from.
    data: The options of the data that the model reads.
    tokenizer: The tokenizer of the data.
    batch_size: The number of rows of a batch.
    microbatches: The number of parts that a batch is computed in.
    note: A note for readers. If the model's choices are forced, a sentence that
      says so is added.
    **fields: Further fields of the header.
  """
  stacks, layers = model.stacks, {}
  seq_len = data.target_len if model.has_encoder else data.seq_len
  for layer in stacks.sparse_layers:
    moe, sequence = stacks.moe_of(layer), stacks.sequence_of(layer)
    length = data.seq_len if sequence else seq_len
    S = group_size(moe, batch_size // microbatches, length)
    is_bounded = moe.router.by_expert or moe.causality.drops
    layers[layer] = LayerInfo(
      num_experts=moe.num_retained,
      num_selected=moe.num_selected,
      capacity=training_slots(moe, S) if is_bounded else None,
      group_size=S,
      by_expert=moe.router.by_expert,
      sequence=sequence.rstrip('_'),
      by_logits=moe.router.by_logits,
    )
  return Header(
    layers=layers,
    batch_size=batch_size,
    seq_len=seq_len,
    vocab_size=model.vocab_size,
    model_digest=hashlib.sha256(repr(options).encode()).hexdigest(),
    sources=tuple(data.tasks),
    tokenizer=tokenizer.identity,
    note='; '.join(filter(None, (note, stacks.forced_balance))),
    **fields,
  )


def header_of(run: Run) -> Header:
  """The header of a run's trace."""
  o = run.options
  described = run.model, o.model, o.data, run.dataset.tokenizer
  return make_header(
    *described,
    batch_size=o.batch_size,
    microbatches=o.microbatches,
    data_digest=run.dataset.digest,
    seed=o.seed,
    has_logits=o.trace.logits,
    dtype=o.trace.dtype,
  )


def records_of(
  model: Model,
  kind: str,
  step: int,
  number: int,
  batch: Mapping[str, Any],
  choices: Mapping[int, LayerChoices],
) -> Iterator[Record]:
  """The records of a batch: one for each stack that has sparse layers.

  Args:
    model: The model.
    kind, step, number: The fields `kind`, `step` and `batch` of the records.
    batch: The arrays of the batch, on the host.
    choices: The choices of each sparse layer, by the index of the layer, on the
      host.
  """
  stacks = model.stacks
  for prefix in stacks.sequences:
    layers = {
      i: _in_order(of_layer, stacks.moe_of(i).router.by_expert)
      for i, of_layer in choices.items()
      if stacks.sequence_of(i) == prefix
    }
    if layers:
      ids: Any = {k: batch.get(f'{prefix}{key}') for k, key in _KEYS.items()}
      sequence = prefix.rstrip('_')
      yield Record(kind, step, number, **ids, layers=layers, sequence=sequence)


def _in_order(choices: LayerChoices, by_expert: bool) -> LayerChoices:
  """A layer's choices as a record has them, with int32 indices of experts.

  Where experts choose tokens (`by_expert`), a token's choices are sorted by
  falling gate, and their dimension of E is cut to the most choices of a token.
  """
  choices = choices._replace(expert=choices.expert.astype(np.int32))
  if not by_expert:
    return choices
  # Where experts choose, a token has any number of choices, mostly a few.
  is_choice = choices.expert >= 0
  order = np.where(is_choice, -choices.gate, np.inf)
  order = np.argsort(order, axis=-1, kind='stable')
  most = max(int(is_choice.sum(-1).max(initial=0)), 1)
  ordered = [np.take_along_axis(x, order[..., :most], -1) for x in choices[:3]]
  return LayerChoices(*ordered, logits=choices.logits)


class Recorder:
  """Writes the choices of experts in batches into a folder, on its own thread.

  If the trace cannot be written, the run goes on without the trace, and says
  so. An older trace in the folder keeps its records of steps before the first
  batch.

  Args:
    folder: The folder of the trace.
    header: The header of the trace.
    model: The model.
    message: Called with a line of text if recording fails before the run ends.

  Raises:
    ValueError: The folder has another trace; what differs is listed.
  """

  def __init__(
    self,
    folder: traces.Folder,
    header: Header,
    model: Model,
    message: Callable[[str], None] = print,
  ):
    self._folder, self._header = pathlib.Path(folder).expanduser(), header
    self._model, self._message = model, message
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'routing trace')
    self._waiting: collections.deque = collections.deque()
    self._has_begun = self._has_failed = False
    traces.check(folder, header)

  def add(
    self, kind: str, step: int, number: int, batch: Batch, choices: Choices
  ) -> None:
    """Records a batch's choices; waits while over `_QUEUE_SIZE` batches wait.

    Every process calls this method, and the first process writes. Of several
    processes each waits until the batch is computed, since the rows of the
    batch are gathered from all processes.

    Args:
      kind, step, number: The fields `kind`, `step` and `batch` of the records.
      batch: The batch.
      choices: The choices of experts that were made in the batch.
    """
    prefixes, keys = self._model.stacks.sequences, _KEYS.values()
    names = {f'{prefix}{key}' for prefix in prefixes for key in keys}
    arrays: Any = {k: v for k, v in batch.items() if k in names}, choices
    if jax.process_count() > 1:
      arrays = fetch(arrays)
    for leaf in jax.tree.leaves(arrays):
      if isinstance(leaf, jax.Array):
        leaf.copy_to_host_async()
    if not is_first():
      return
    self.flush(_QUEUE_SIZE)
    if not self._has_failed:
      call = self._write, kind, step, number, *arrays
      self._waiting.append(self._thread.submit(*call))

  def measure(self, name: str, losses: Losses, apply: Apply) -> Measure:
    """Returns a function that measures an evaluation and records its choices.

    The function takes variables and a step, and returns a row of metrics.

    Args:
      name: The name of the evaluation, and the kind of its records.
      losses: The evaluation's measurement without recording.
      apply: Applies the model, and returns its result and its choices.
    """

    def measure(variables, step):
      record = functools.partial(self.add, name, step)
      sums = losses.sums(variables, apply, record)
      return summarize(sums, losses.model.stacks.moes)

    return measure

  def flush(self, most_waiting: int = 0) -> None:
    """Waits until at most `most_waiting` of the added batches are unwritten."""
    while len(self._waiting) > most_waiting:
      error = self._waiting.popleft().exception()
      if error is not None and not self._has_failed:
        self._has_failed = True
        self._message(f'the trace of choices ends: {error!r}')

  def close(self) -> None:
    """Waits until the thread has written all records, and ends it."""
    self.flush()
    self._thread.shutdown()

  def _write(self, kind, step, number, batch, choices) -> None:
    if not self._has_begun:
      traces.begin(self._folder, self._header, step)
      self._has_begun = True
    batch, choices = jax.tree.map(np.asarray, (batch, choices))
    for record in records_of(self._model, kind, step, number, batch, choices):
      traces.save(self._folder, self._header, record)


class Traces(Hook):
  """Records the choices of experts in steps and evaluations of `config.trace`.

  This hook has to come after hooks that change or compile the step.
  """

  serves = 'trace'
  _recorder: Recorder | None = None

  def check(self, run: Run) -> None:
    if run.options.trace.is_on and run.model.stacks.sparse_layers:
      folder, header = run.workdir / FOLDER, header_of(run)
      self._recorder = Recorder(folder, header, run.model, run.message)

  def start(self, run: Run) -> Run | None:
    """Wraps the training step and the evaluations that are to be recorded."""
    o = run.options.trace
    if self._recorder is None:
      if o.is_on:
        reason = 'the model has no sparse layers'
        run.message(f'trace: {reason}; nothing is recorded')
      return None
    step, evaluations = run.train_step, [*run.evaluations]
    if o.every_steps:
      step = _recorded_step(step, o, self._recorder)
    for i, entry in enumerate(evaluations):
      if entry.name in o.names(run.options.loss_evals):
        losses = cast(Losses, entry.measure)
        measure = self._recorder.measure(entry.name, losses, o.recording)
        evaluations[i] = dataclasses.replace(entry, measure=measure)
    folder = run.workdir / FOLDER
    run.message(f'trace: choices of experts are recorded in {folder}')
    return dataclasses.replace(run, train_step=step, evaluations=evaluations)

  def paused(self) -> None:
    """Waits until all records are written, before a checkpoint is written.

    So a run that goes on from the checkpoint misses no step in its trace.
    """
    if self._recorder is not None:
      self._recorder.flush()

  def close(self) -> None:
    if self._recorder is not None:
      self._recorder.close()


def _recorded_step(step: Step, o: TraceOptions, recorder: Recorder) -> Step:
  """Wraps a step, (state, batch) -> (state, metrics), so that it is recorded.

  At the steps that `o` asks for, choices go to the recorder; the metrics that
  the wrapped step returns have none.
  """
  num_steps: int | None = None

  def recorded(state, batch):
    nonlocal num_steps
    if num_steps is None:  # reading `state.step` waits for the device
      num_steps = int(state.step)
    state, metrics = step(state, batch)
    if o.has_step(num_steps + 1):
      recorder.add('train', num_steps, 0, batch, metrics.sums.choices)
    num_steps += 1
    return state, metrics._replace(sums=metrics.sums._replace(choices=None))

  return recorded
