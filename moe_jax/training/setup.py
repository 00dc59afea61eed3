"""The start of a run: its parts, and its first state.

The parts are built and checked before anything is compiled. The state is that
of a checkpoint, or new, with parameters that are given or drawn from the seed.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from moe_jax import data
from moe_jax.config import ConfigDict, section_of
from moe_jax.data import tokenizers
from moe_jax.devices import check_room, check_same, is_first
from moe_jax.errors import InputError
from moe_jax.layers.routers.contract import ROUTER_STATE
from moe_jax.models import Model
from moe_jax.models.trees import variables as as_variables
from moe_jax.runs import workdir as workdir_lib
from moe_jax.runs.checkpointer import Checkpointer
from moe_jax.runs.recorder import Recorder
from moe_jax.runs.trackers import check_installed
from moe_jax.training.early_stopping import EarlyStopping
from moe_jax.training.evaluate import Evaluation, Setting, make_evaluations
from moe_jax.training.programs import Programs, Step, make_programs
from moe_jax.training.run_options import RunOptions
from moe_jax.training.step import TrainState

# The name under which a checkpoint has the names of the evaluations of its step
# that are still to be made.
DUE = 'due_evaluations'
# Names under which a checkpoint has the sha256 of the run's data and of the
# masks of the experts that train, the number of rows of an epoch, and the index
# of the first row of data that no step has seen.
_DATA, _EXPERTS = 'data_digest', 'trained_experts'
_NUM_ROWS, _NEXT_ROW = 'num_rows', 'next_row'


@dataclasses.dataclass(frozen=True)
class Run:
  """The parts of a run, as its hooks get them; no part is replaced in place.

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
    checkpoints: Writes and reads the run's checkpoints.
    early_stopping: The measurements that may end the run before its last step.
    recorder: Writes and prints rows of metrics.
    message: Prints a line in process 0, above the bar of progress.
    notes: Lines to print at the start: changes of the config and of users'
      files since the run began, another tokenizer than the config's, a warm-up
      that is shorter than the config asks for, and a schedule of the learning
      rate for another number of steps than before.
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

  def extra(self, step: int) -> dict[str, Any]:
    """The JSON values that are saved with a step's state, for `begin` to read.

    Their names are those in `_DATA`, `_EXPERTS`, `_NUM_ROWS`, `_NEXT_ROW` and,
    if the run may end early, 'early_stopping'.
    """
    return {
      _DATA: self.dataset.digest,
      _NUM_ROWS: len(self.dataset.splits['train']),
      _NEXT_ROW: self.row_offset + step * self.options.batch_size,
      _EXPERTS: self.programs.trained.masks_digest,
      **self.early_stopping.extra,
    }

  def batches(self, start: int) -> Iterator[dict[str, jax.Array]]:
    """Yields the batches after step `start`, moved to the devices."""
    put = self.programs.put
    batches = data.train_batches(
      self.dataset.splits['train'],
      batch_size=self.options.batch_size,
      seed=self.options.seed,
      start=start,
      share=put.rows,
      offset=self.row_offset,
    )
    return map(put.local, batches)


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

  Args:
    options: The run's options.
    workdir: The run's folder, which need not exist.
    resume: Whether the run may go on where the workdir's options differ.
    devices: The devices of the mesh; None means all devices.
    confirm: Raises ValueError if another job has taken the workdir; it is
      called before each row of metrics and each save.

  Raises:
    ValueError: The options or the data are bad, a tracker's package is not
      installed, the processes differ in their options or data, or `workdir`
      belongs to another run.
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
  schedule = schedule_notes(options, checked.folder)
  notes = (*checked.notes, *tokenizer_notes, *schedule)
  setting = Setting(model, dataset, options.data, checked.folder, programs.put)
  evaluations = make_evaluations(
    options.evals, options.model, options.sharding.rules, setting
  )
  checkpoints = Checkpointer(checked.checkpoints, options.checkpoint)
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


def schedule_notes(options: RunOptions, folder: pathlib.Path) -> Iterator[str]:
  """Yields lines on a cut warm-up, and on other steps than the run began with.

  `folder` is the run's, which need not exist.
  """
  schedule, total = options.optimizer.schedule, options.total_steps
  before = workdir_lib.kept_config(folder).get('total_steps', total)
  if before != total:
    yield (
      f'learning rate: from here on it has the schedule of a run of {total} '
      f'steps, no longer that of {before} (total_steps)'
    )
  if (steps := schedule.warmup_in(total)) < schedule.warmup_steps:
    yield (
      f'warm-up: {steps} steps, half of total_steps={total}, in place of '
      f'optimizer.schedule.warmup_steps={schedule.warmup_steps}'
    )


R = TypeVar('R', bound=RunOptions)


def with_tokenizer(
  options: R, config: ConfigDict, folder: pathlib.Path
) -> tuple[R, list[str]]:
  """The options, with another tokenizer where a run does not take the config's.

  The other tokenizer is that of the run whose parameters this run begins with,
  unless `init_from.keep_tokenizer` is False, or that in this run's folder where
  the config's cannot be read any more.

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


# A function that gives the variables with which a run begins (parameters, and
# `router_state` and `opt_state` unless they begin anew), sharded, and a line
# about them; or None, if the run draws its parameters from its seed.
Initial = Callable[[Run], tuple[dict[str, Any], str] | None]


def begin(
  run: Run, initial: Initial | None = None
) -> tuple[Run, TrainState, list[str]]:
  """Begins a run, or goes on from its newest checkpoint; prints which.

  A checkpoint of step 0 holds only parameters, such as those of an imported
  model, and perhaps the state of its routers: the optimizer starts anew. The
  config is written to the workdir only after all checks, so that a run that is
  refused changes nothing.

  Args:
    run: The run, as `set_up` made it.
    initial: Function from the run to its first variables and a line about them,
      called where there is no checkpoint; None draws parameters from the seed,
      and refuses options that name a run in `init_from`.

  Returns:
    The run, with the `row_offset` at which its data goes on; its state; and the
    names of the evaluations of that state that are still to be made.

  Raises:
    ValueError: The checkpoint was made on other data, with other tokens, for
      another model, or after the last step; or `initial` raises it.
    CheckpointError: There are checkpoints and none is good.
  """
  abstract, first = run.programs.abstract_state, None
  base = run.programs.adapters.base(abstract.params)
  restored = run.checkpoints.restore(
    abstract, first=as_variables(base, abstract.router_state)
  )
  if restored is not None:
    digest = restored.extra.get(_DATA)
    if restored.step and digest != run.dataset.digest:
      raise InputError(
        f'{run.workdir} was trained on data of sha256 {digest}, this is '
        f'{run.dataset.digest}; results of two corpora must not mix'
      )
    if problem := end_problem(run, restored.step):
      raise InputError(problem)
    workdir_lib.check_kept_ids(run.workdir, run.dataset.tokenizer)
    if not restored.step:
      note = 'beginning with the parameters of the checkpoint of step 0'
      first = restored.state, note
  elif initial is not None:
    first = initial(run)
  elif folder := run.options.init_from.workdir:
    raise InputError(
      f'init_from.workdir={folder!r} and nobody to read it; pass '
      'initial=moe_jax.finetuning.initial'
    )
  if is_first():
    workdir_lib.claim(run.workdir, run.config)
    workdir_lib.record_plugins(run.workdir, run.config)
    run.dataset.tokenizer.save(run.workdir / workdir_lib.TOKENIZER)
  multihost_utils.sync_global_devices('the workdir')
  for step, reason in restored.skipped if restored else ():
    run.message(f'passed over the checkpoint of step {step}: {reason}')
  if first is not None:
    variables, note = first
    run.message(note)
    state = run.programs.state_of(variables['params'])
    state = state.replace(
      router_state=variables.get(ROUTER_STATE, state.router_state),
      opt_state=variables.get('opt_state', state.opt_state),
    )
    return run, state, []
  if restored is None:
    return run, run.programs.init_state(), []
  step, total = restored.step, run.options.total_steps
  run.message(
    f'going on from the checkpoint of step {step}: {step} of {total} steps are '
    f'done, {total - step} still to be taken'
  )
  run.early_stopping.restore(restored.extra)
  if restored.extra.get(_EXPERTS, '') != run.programs.trained.masks_digest:
    run.message('WARNING: other experts train than before that checkpoint')
  earlier_rows = restored.step * run.options.batch_size
  next_row = restored.extra.get(_NEXT_ROW, earlier_rows)
  num_rows = len(run.dataset.splits['train'])
  earlier_num_rows = restored.extra.get(_NUM_ROWS, num_rows)
  if num_rows != earlier_num_rows:  # data.seq_len has changed, or the task
    next_row = next_row * num_rows // earlier_num_rows
    run.message(
      f'the data has {num_rows:,} rows, {earlier_num_rows:,} before: the run '
      f'goes on with row {next_row:,}, at the same share of the data'
    )
  # The seed is the config's: another seed changes the order of the data, too.
  seed = jnp.full_like(restored.state.seed, run.options.seed)
  run = dataclasses.replace(run, row_offset=next_row - earlier_rows)
  return run, restored.state.replace(seed=seed), restored.extra.get(DUE, [])


def end_problem(run: Run, step: int) -> str | None:
  """The reason for which a run cannot go on from its checkpoint of a step.

  None if the step is not after the run's last.
  """
  if step <= run.options.total_steps:
    return None
  return (
    f'{run.workdir} has a checkpoint of step {step}, and total_steps='
    f'{run.options.total_steps}: give at least as many steps, or another '
    '--workdir'
  )
