"""The parts of a run, built and checked before anything is compiled."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, TypeVar

import jax
from jax.sharding import Mesh

from moe_jax import data
from moe_jax.config import ConfigDict, section_of
from moe_jax.data import tokenizers
from moe_jax.devices import check_room, check_same
from moe_jax.errors import InputError
from moe_jax.models import Model
from moe_jax.runs import workdir as workdir_lib
from moe_jax.runs.checkpointer import Checkpointer
from moe_jax.runs.recorder import Recorder
from moe_jax.runs.trackers import check_installed
from moe_jax.training.early_stopping import EarlyStopping
from moe_jax.training.evaluate import Evaluation, make_evaluations
from moe_jax.training.losses import loss_weights
from moe_jax.training.programs import Programs, Step, make_programs
from moe_jax.training.run_options import RunOptions
from moe_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True)
class Run:
  """The parts of a run, which hooks get, too; it is not changed in place.

  Attributes:
    options: The options, with the sizes of the model that the data decides.
    config: The config that `options` were made from, as the workdir keeps it,
      without the sizes that the data decides.
    workdir: The run's folder.
    dataset: The run's data.
    model: The model that is trained.
    mesh: The mesh of devices.
    programs: The programs that the devices execute.
    train_step: The step of `programs`, unless a hook gives another step.
    evaluations: The run's evaluations.
    checkpoints: The run's checkpoints.
    early_stopping: The measurements that may end the run before its last step.
    recorder: Writes and prints rows of metrics.
    message: Prints a line in process 0, above the bar of progress.
    notes: Lines to print at the start: overrides that are ignored, and users'
      files that have changed since the run began.
    row_offset: Index of the row of data that step 1 would begin with at this
      batch size; not 0 where earlier steps had another batch size.
  """

  options: RunOptions
  config: ConfigDict
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
  notes: tuple[str, ...] = ()
  row_offset: int = 0

  def batches(self, start: int) -> Iterator[dict[str, jax.Array]]:
    """Yields the batches after step `start`, moved to the devices."""
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
    serves: Name of the section of the config that has an effect only through
      this hook; '' for none.
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

  def paused(self) -> None:
    """Called when training pauses.

    Training pauses after evaluations, whose rows are then among the metrics,
    and before a checkpoint is saved or values are added to its manifest.
    """

  def end(self, run: Run, state: TrainState) -> None:
    """Called after the last step has been taken, evaluated and saved."""

  def close(self) -> None:
    """Called when the run ends, also if it is stopped or fails."""


class Ended(Hook):
  """A hook that notes whether a run has ended, at its last step or early.

  Attributes:
    ended: Whether nothing of the run is left to do.
  """

  ended: bool = False

  def end(self, run: Run, state: TrainState) -> None:
    """Notes that the run has ended."""
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
  row_parts = options.sharding.row_parts(mesh)
  config, defaults = section_of(options), section_of(type(options))
  options.check_rows(row_parts)
  check_installed(options.tracker_names)
  checked = workdir_lib.check(workdir, config, resume=resume, defaults=defaults)
  options, tokenizer_notes = with_tokenizer(options, config, checked.folder)
  dataset = data.load(options.data)
  options.sample.check_prompt(dataset.tokenizer)
  options = options.filled(dataset.vocab_size)
  check_room(options.least_bytes(), list(mesh.devices.flat))
  model = options.model.build(options.sharding.rules)
  programs = make_programs(options, model, mesh)
  notes = (
    *checked.notes,
    *tokenizer_notes,
    *setup_notes(options, model, mesh),
  )
  evaluations = make_evaluations(
    options.model,
    model,
    options.evals,
    options.sharding.rules,
    dataset=dataset,
    data=options.data,
    workdir=checked.folder,
    put=programs.put,
  )
  checkpoints = options.checkpoint.checkpointer(checked.checkpoints)
  recorder = Recorder(
    checked.folder,
    total_steps=options.total_steps,
    log_every_steps=options.log_every_steps,
    max_nonfinite_steps=options.max_nonfinite_steps,
    batch_tokens=options.batch_size * options.data.row_tokens,
    moes=model.stacks.moes,
    state=programs.abstract_state,
    checkpoints=checkpoints,
    tell=dataset.tell,
    confirm=confirm,
    trackers=options.tracker_names,
  )
  check_same(
    {
      'the config': json.dumps(config.to_dict(), sort_keys=True),
      'the data': dataset.digest,
      'the experts that train': programs.trained.masks_digest,
      **checked.class_digests,
    }
  )
  return Run(
    options=options,
    config=config,
    workdir=checked.folder,
    dataset=dataset,
    model=model,
    mesh=mesh,
    programs=programs,
    train_step=programs.train_step,
    evaluations=evaluations,
    checkpoints=checkpoints,
    early_stopping=EarlyStopping(options.early_stopping, options.checkpoint),
    recorder=recorder,
    message=recorder.message,
    notes=notes,
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
  rules = dict(options.sharding.rules)
  if any(mesh.shape[a] > 1 for a in rules['expert'] if a in rules['batch']):
    return
  dispatches = [moe.dispatch for moe in model.stacks.mixtures]
  for dispatch in dict.fromkeys(dispatches):
    for name in ('exchange', 'shadowing'):
      value, default = getattr(dispatch, name, None), type(dispatch)()
      if value != getattr(default, name, None):
        yield (
          f'moe.dispatch: {name}={value} has no effect, since no mesh axis of '
          'several devices splits both the batch and the experts'
        )


R = TypeVar('R', bound=RunOptions)


def with_tokenizer(
  options: R, config: ConfigDict, folder: pathlib.Path
) -> tuple[R, list[str]]:
  """The options with the tokenizer that a run takes in place of the config's.

  It is the tokenizer of the run whose parameters this run begins with, or the
  tokenizer in this run's folder where the config's cannot be read any more.

  Args:
    options: The options of the run.
    config: The config that the options were made from.
    folder: The folder of the run, which need not exist.

  Returns:
    The options, and a line about the tokenizer where it is not the config's.

  Raises:
    ValueError: The tokenizer cannot be read.
  """
  given, init_from = options.data.tokenizer, options.init_from
  data_options = init_from.with_tokenizer(options.data, folder)
  note = (
    f'that of {init_from.workdir}; data.tokenizer.kind='
    f'{data.TOKENIZERS.name_of(given)!r} is not used (init_from.keep_tokenizer)'
  )
  try:
    identity = given.identity()
  except InputError as error:
    identity = None
    if data_options is options.data:
      path = folder / workdir_lib.TOKENIZER
      kept = workdir_lib.kept_config(folder).get('data', {}).get('tokenizer')
      if not path.is_file() or kept != config.to_dict()['data']['tokenizer']:
        raise
      data_options = options.data.with_tokenizer(tokenizers.read(path))
      note = f'that which the run has kept; {error}'
  if data_options is options.data:
    return options, []
  is_same = identity == data_options.tokenizer.identity()
  notes = [] if is_same else [f'tokenizer: {note}']
  return dataclasses.replace(options, data=data_options), notes
