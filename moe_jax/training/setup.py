"""The parts of a run, built and checked before anything is compiled."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax import data
from moe_jax.config import OptionError, section_of
from moe_jax.data import tokenizers
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.devices import check_room, check_same
from moe_jax.errors import InputError
from moe_jax.models import Model
from moe_jax.runs import workdir as workdir_lib
from moe_jax.runs.checkpointer import Checkpointer
from moe_jax.runs.recorder import Recorder
from moe_jax.runs.workdir import class_digests, classes_in
from moe_jax.training.early_stopping import EarlyStopping
from moe_jax.training.evaluate import (
  Evaluation,
  changed_models,
  make_evaluations,
  overridden,
)
from moe_jax.training.losses import loss_weights
from moe_jax.training.programs import Programs, Step, make_programs
from moe_jax.training.run_options import RunOptions, SampleOptions
from moe_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class Run:
  """The parts of a run, which hooks are given, too; nobody changes one.

  Attributes:
    options: The options, with the sizes of the model that the data decides.
    given_options: The options as they were given, which the workdir keeps.
    workdir: The run's folder.
    dataset: The run's data.
    model: The model that is trained.
    mesh: The mesh of devices.
    programs: The programs that the devices execute.
    train_step: The step of `programs`, unless a hook gives another.
    evaluations: The run's evaluations.
    checkpoints: The run's checkpoints.
    early_stopping: The measurements that may end the run before its last step.
    recorder: Writes and prints rows of metrics.
    message: Prints a line in process 0, above the bar of progress.
    confirm: Raises ValueError if another job has taken the workdir.
    notes: Lines to print at the start: overrides that are ignored, and users'
      files that have changed since the run began.
    row_offset: Number of the row of data that step 1 would begin with at this
      batch size; not 0 where earlier steps had another batch size.
  """

  options: RunOptions
  given_options: RunOptions
  workdir: pathlib.Path
  dataset: data.Dataset
  model: Model
  mesh: Mesh
  programs: Programs
  train_step: Step
  evaluations: Sequence[Evaluation]
  checkpoints: Checkpointer
  early_stopping: EarlyStopping
  recorder: Recorder
  message: Callable[[str], None]
  confirm: Callable[[], None] = lambda: None
  notes: tuple[str, ...] = ()
  row_offset: int = 0

  def batches(self, start: int) -> Iterator[dict[str, jax.Array]]:
    """The batches after step `start`, on the devices."""
    put = self.programs.put
    return map(
      put.local,
      data.train_batches(
        self.dataset.splits['train'],
        batch_size=self.options.batch_size,
        seed=self.options.seed,
        start=start,
        share=put.rows,
        offset=self.row_offset,
      ),
    )


class Hook:
  """Behaviour that a caller adds to a run; by default methods do nothing.

  Attributes:
    serves: Name of the section of the config that the hook gives its effect; ''
      for none.
  """

  serves: ClassVar[str] = ''

  def check(self, run: Run) -> None:
    """Called once a run is set up, before anything is compiled or written.

    Raises:
      ValueError: The section of the config that the hook serves does not fit.
    """

  def start(self, run: Run) -> Run | None:
    """Called before the first step, after a restore.

    Returns:
      The run with the `train_step` and the `evaluations` with which it goes on;
      None leaves it as it is.
    """

  def evaluated(self) -> None:
    """Called after evaluations, whose numbers are then among the metrics."""

  def saving(self) -> None:
    """Called before a checkpoint, or what its evaluations add, is saved."""

  def end(self, run: Run, state: TrainState) -> None:
    """Called after the last step has been taken, evaluated and saved."""

  def close(self) -> None:
    """Called when the run ends, also if it is stopped or fails."""


class Ended(Hook):
  """Notes whether a run has ended: it is at its last step, or ended early.

  Attributes:
    ended: Whether nothing of the run is left to do.
  """

  ended: bool = False

  def end(self, run: Run, state: TrainState) -> None:
    """Notes the end."""
    self.ended = True


def set_up(
  options: RunOptions,
  workdir: str | os.PathLike[str],
  *,
  resume: bool = False,
  devices: Sequence[jax.Device] | None = None,
  confirm: Callable[[], None] = lambda: None,
) -> Run:
  """Builds a `Run`; on disk only the data cache may change.

  Arguments and errors are those of `loop.train_and_evaluate`; `confirm` raises
  ValueError if another job has taken the workdir.
  """
  mesh = options.mesh.make(devices)
  options.check_mesh(mesh)
  config = section_of(options)
  defaults = section_of(type(options))
  folder = workdir_lib.check(workdir, config, resume=resume, defaults=defaults)
  given_options, options = options, with_tokenizer(options, folder)
  dataset = data.load(options.data)
  check_same(
    {
      'the config': json.dumps(config.to_dict(), sort_keys=True),
      'the data': dataset.digest,
      **class_digests(classes_in(config)),
    }
  )
  _check_sample(options.sample, dataset.tokenizer)
  filled = options.filled(dataset.vocab_size)
  check_fits(filled, mesh)
  model = filled.build()
  entry_models = changed_models(
    filled.model, model, filled.evals, filled.sharding.rules
  )
  programs = make_programs(filled, model, mesh)
  check_same({'the experts that train': programs.trained.masks_digest})
  evaluations = make_evaluations(
    filled.evals,
    entry_models,
    dataset=dataset,
    data=filled.data,
    batch_size=filled.batch_size,
    workdir=folder,
    put=programs.put,
  )
  checkpoint = options.checkpoint
  checkpoints = Checkpointer(
    workdir_lib.checkpoints_of(folder, checkpoint.directory),
    keep_newest=checkpoint.keep_newest,
    keep_best=checkpoint.keep_best,
    best_metric=checkpoint.best_name,
    best_is_highest=checkpoint.best_is_highest,
    retry=checkpoint.retry,
  )
  recorder = Recorder(
    folder,
    total_steps=filled.total_steps,
    log_every_steps=filled.log_every_steps,
    max_nonfinite_steps=filled.max_nonfinite_steps,
    batch_tokens=filled.batch_size * filled.data.row_tokens,
    moes=model.moes,
    state=programs.abstract_state,
    checkpoints=checkpoints,
    tell=dataset.tell,
    confirm=confirm,
  )
  return Run(
    options=filled,
    given_options=given_options,
    workdir=folder,
    dataset=dataset,
    model=model,
    mesh=mesh,
    programs=programs,
    train_step=programs.train_step,
    evaluations=evaluations,
    checkpoints=checkpoints,
    early_stopping=EarlyStopping(options.early_stopping, checkpoint),
    recorder=recorder,
    message=recorder.message,
    confirm=confirm,
    notes=(
      *(
        f'going on with another config: {line}'
        for line in workdir_lib.changes(folder, config, defaults)
      ),
      *tokenizer_notes(given_options, options),
      *setup_notes(filled, model, mesh),
      *workdir_lib.changed_plugins(folder, config),
    ),
  )


def setup_notes(options: RunOptions, model: Model, mesh: Mesh) -> Iterator[str]:
  """A line for each option without an effect, or with an unusual one."""
  schedule, total = options.optimizer.schedule, options.total_steps
  if (steps := schedule.warmup_in(total)) < schedule.warmup_steps:
    yield (
      f'warm-up: {steps} steps, half of total_steps={total}, in place of '
      f'optimizer.schedule.warmup_steps={schedule.warmup_steps}'
    )
  weights = loss_weights(model, options.logits_z_weight)
  factors = options.aux_losses
  if factors != type(options)().aux_losses and not factors.changes(weights):
    yield (
      f'aux_losses: this model gives none of {list(factors.losses)} a weight; '
      'their schedule changes nothing'
    )
  for name, entry in options.evals.items():
    ignored = overridden(options.model, entry)[1]
    if ignored:
      unused = ', '.join(f'{key}={value!r}' for key, value in ignored.items())
      yield f'evals.{name}: this model has no use for {unused}; ignored'
  rules = dict(options.sharding.rules)
  if any(mesh.shape[a] > 1 for a in rules['expert'] if a in rules['batch']):
    return
  dispatches = [moe.dispatch for moe in model.moes if moe is not None]
  for dispatch in dict.fromkeys(dispatches):
    for name in ('exchange', 'shadowing'):
      value, default = getattr(dispatch, name, None), type(dispatch)()
      if value != getattr(default, name, None):
        yield (
          f'moe.dispatch: {name}={value} has no effect, since no mesh axis of '
          'several devices splits both the batch and the experts'
        )


def _check_sample(sample: SampleOptions, tokenizer: Tokenizer) -> None:
  """Raises OptionError for a sample that could not be drawn at the end."""
  if sample.num_tokens and not len(tokenizer.encode(sample.prompt)):
    raise OptionError(
      [
        f'sample.prompt={sample.prompt!r} has no tokens; give it some text, or '
        'set sample.num_tokens=0'
      ]
    )


_ITEM_BYTES = 4  # bytes of a number of a batch, of a loss and of logits


def check_fits(options: RunOptions, mesh: Mesh) -> None:
  """Checks that a run can fit into the memory of the devices of its mesh.

  It is counted by arithmetic before a model is built, since with ten million
  layers even that takes minutes.

  Args:
    options: The options of the run, after `filled`.
    mesh: The devices.

  Raises:
    ValueError: One of its parts alone needs more than all devices have.
  """
  check_room(_least_bytes(options), list(mesh.devices.flat))


def _least_bytes(options: RunOptions) -> Iterator[tuple[str, int]]:
  """The arrays of a run that may be large, each with its least bytes."""
  model, rows = options.model, options.batch_size
  param_bytes = jnp.dtype(model.param_dtype).itemsize
  yield (
    f'the parameters of {type(model).__name__}, {model.least_parameters():,}',
    param_bytes * model.least_parameters(),
  )
  lengths = options.data.seq_len, options.data.target_len
  tokens = rows * sum(lengths)
  # Tokens, segments and positions; targets and weights of the last sequence.
  yield f'batch_size={rows} of {sum(lengths)} tokens', 3 * _ITEM_BYTES * tokens
  logit_tokens = rows // options.microbatches * (lengths[1] or lengths[0])
  V = model.vocab_size
  yield (
    f'the logits of {logit_tokens} tokens of a microbatch, with vocab_size={V}',
    _ITEM_BYTES * logit_tokens * V,
  )


R = TypeVar('R', bound=RunOptions)


def with_tokenizer(options: R, folder: pathlib.Path) -> R:
  """The options with the tokenizer that a run takes in place of the config's.

  It is the tokenizer of the run that this one begins with, or the one in this
  run's folder where that of the config cannot be read any more.

  Args:
    options: The options of the run.
    folder: The folder of the run, which need not exist.

  Raises:
    ValueError: The tokenizer cannot be read.
  """
  data_options = options.init_from.with_tokenizer(options.data, folder)
  if data_options is options.data:
    try:
      options.data.tokenizer.identity()
    except InputError:
      if not _began_with(options, folder):
        raise
      tokenizer = tokenizers.read(folder / workdir_lib.TOKENIZER)
      data_options = options.data.with_tokenizer(tokenizer)
  if data_options is options.data:
    return options
  return dataclasses.replace(options, data=data_options)


def _began_with(options: RunOptions, folder: pathlib.Path) -> bool:
  """Whether a folder has the tokenizer that the options name."""
  if not (folder / workdir_lib.TOKENIZER).is_file():
    return False
  stored = workdir_lib.kept_config(folder).get('data', {}).get('tokenizer')
  current = section_of(options).to_dict()['data']['tokenizer']
  return stored == current


def check_kept_ids(folder: pathlib.Path, tokenizer: Tokenizer) -> None:
  """Checks that ids mean what they mean to the parameters in a run's folder.

  The task of the data may add ids after those of the tokenizer in the folder.
  A file that cannot be read, as a kill of older code left one, says nothing.

  Args:
    folder: The folder of the run.
    tokenizer: The tokenizer of the data.

  Raises:
    ValueError: The folder has a tokenizer whose ids are others.
  """
  path = folder / workdir_lib.TOKENIZER
  try:
    kept = tokenizers.load(path)
  except (OSError, InputError):
    return
  (old, old_names), (new, new_names) = map(_with_names, (kept, tokenizer))
  if old == new and new_names[: len(old_names)] == old_names:
    return
  raise InputError(
    f'{folder} has parameters of tokens of {kept.ids_identity}, the data is of '
    f"{tokenizer.ids_identity}; give data.tokenizer.kind='file' and {path} as "
    'data.tokenizer.file.path'
  )


def _with_names(tokenizer: Tokenizer) -> tuple[str, tuple[str, ...]]:
  """The identity of a tokenizer's own ids, and the names that a task added."""
  if isinstance(tokenizer, tokenizers.Extended):
    return tokenizer.base.ids_identity, tokenizer.names
  return tokenizer.ids_identity, ()


def tokenizer_notes(
  given_options: RunOptions, options: RunOptions
) -> Iterator[str]:
  """A line about a tokenizer that is taken in place of the config's.

  Args:
    given_options: The options as they were given.
    options: The options `with_tokenizer`.
  """
  if options.data is given_options.data:
    return
  try:
    given_identity = given_options.data.tokenizer.identity()
    if given_identity == options.data.tokenizer.identity():
      return
    problem = ''
  except InputError as error:
    problem = str(error)
  init_from = given_options.init_from
  if not (init_from.workdir and init_from.keep_tokenizer):
    yield f'tokenizer: that which the run has kept; {problem}'
    return
  kind = data.TOKENIZERS.name_of(given_options.data.tokenizer)
  yield (
    f'tokenizer: that of {init_from.workdir}; data.tokenizer.kind={kind!r} is '
    'not used (init_from.keep_tokenizer)'
  )
