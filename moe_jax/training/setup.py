"""The parts of a run, built and checked before anything is compiled."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import jax
from jax.sharding import Mesh

from moe_jax import data, plugins, sections
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.distributed import check_same, is_first
from moe_jax.models import Model
from moe_jax.options import OptionError
from moe_jax.runs import workdir as workdir_lib
from moe_jax.runs.checkpointer import Checkpointer
from moe_jax.runs.progress import print_line
from moe_jax.training.early_stopping import EarlyStopping
from moe_jax.training.evaluate import Evaluation
from moe_jax.training.evaluation_entries import (
  changed_models,
  make_evaluations,
  overridden,
)
from moe_jax.training.losses import loss_weights
from moe_jax.training.needed_memory import check_fits
from moe_jax.training.programs import Programs, Step, make_programs
from moe_jax.training.run_options import RunOptions
from moe_jax.training.run_tokenizer import tokenizer_notes, with_tokenizer
from moe_jax.training.sample_options import SampleOptions
from moe_jax.training.step import TrainState


def _message() -> Callable[[str], None]:
  return print_line if is_first() else lambda text: None


@dataclasses.dataclass
class Run:
  """The parts of a run, which hooks are given, too.

  Attributes:
    options: The options, with the sizes of the model that the data decides.
    given_options: The options as they were given, which the workdir keeps.
    workdir: The run's folder.
    dataset: The run's data.
    model: The model that is trained.
    mesh: The mesh of devices.
    programs: The programs that the devices execute.
    train_step: The step of `programs`; a hook may wrap it.
    evaluations: The run's evaluations.
    checkpoints: The run's checkpoints.
    early_stopping: The measurements that may end the run before its last step.
    notes: Lines to print at the start: overrides that are ignored, and users'
      files that have changed since the run began.
    hooks: The hooks of the run.
    row_offset: Number of the row of data that step 1 would begin with at this
      batch size; not 0 where earlier steps had another batch size.
    due: Names of the evaluations after the present step that the rows and the
      checkpoint do not have yet.
    should_stop: Returns whether a signal stops the run now; called once after
      each step, and before each batch of an evaluation.
    confirm: Raises ValueError if another job has taken the workdir.
    message: Prints a line in process 0; the recorder replaces it while it
      displays progress.
  """

  options: RunOptions
  given_options: RunOptions
  workdir: pathlib.Path
  dataset: data.Dataset
  model: Model
  mesh: Mesh
  programs: Programs
  train_step: Step
  evaluations: list[Evaluation]
  checkpoints: Checkpointer
  early_stopping: EarlyStopping
  notes: tuple[str, ...] = ()
  hooks: Sequence['Hook'] = ()
  row_offset: int = 0
  due: list[str] = dataclasses.field(default_factory=list)
  should_stop: Callable[[], bool] = lambda: False
  confirm: Callable[[], None] = lambda: None
  message: Callable[[str], None] = dataclasses.field(default_factory=_message)

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

  def start(self, run: Run) -> None:
    """Called before the first step, after a restore."""

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
    """See `Hook.end`."""
    self.ended = True


def set_up(
  options: RunOptions,
  workdir: str | os.PathLike[str],
  *,
  resume: bool = False,
  devices: Sequence[jax.Device] | None = None,
) -> Run:
  """Builds a `Run`; on disk only the data cache may change.

  Arguments and errors are those of `loop.train_and_evaluate`.
  """
  mesh = options.mesh.make(devices)
  options.check_mesh(mesh)
  config = sections.section(options)
  defaults = sections.section(type(options))
  folder = workdir_lib.check(workdir, config, resume=resume, defaults=defaults)
  given_options, options = options, with_tokenizer(options, folder)
  dataset = data.load(options.data)
  check_same(
    {
      'the config': json.dumps(config.to_dict(), sort_keys=True),
      'the data': dataset.digest,
      **plugins.digests(plugins.names_in(config)),
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
    checkpoints=Checkpointer(
      workdir_lib.checkpoints_of(folder, checkpoint.directory),
      keep_newest=checkpoint.keep_newest,
      keep_best=checkpoint.keep_best,
      best_metric=checkpoint.best_name,
      best_is_highest=checkpoint.best_is_highest,
      retry=checkpoint.retry,
    ),
    early_stopping=EarlyStopping(options.early_stopping, checkpoint),
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
