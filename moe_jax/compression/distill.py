"""Distillation: a run learns from another run's model, and begins with it.

    config.distill.teacher = 'runs/tiny'

Switch Transformers, section 4.2 (https://arxiv.org/abs/2101.03961). The hook
`Distilling` wraps the step, and gives the parameters to begin with.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from moe_jax import finetuning
from moe_jax.compression import (
  dense_start,
  soft_labels,
  teacher_logits,
)
from moe_jax.compression import teacher as teacher_lib
from moe_jax.compression.distill_options import (
  CONCATENATED,
  NONE,
  DistillOptions,
)
from moe_jax.compression.teacher import Teacher
from moe_jax.errors import InputError
from moe_jax.finetuning import start as start_lib
from moe_jax.training.programs import make_step, metrics_shardings
from moe_jax.training.setup import Hook, Run
from moe_jax.training.step import TrainState

LEAK = (
  'WARNING: the teacher is not causal: where its capacity binds, later tokens '
  'change its soft labels for earlier ones'
)


class Distilling(Hook):
  """Teaches a run whose config has `distill.teacher`; others stay as they are.

  Attributes:
    allow: Modules whose classes, named in another run's folder, may be
      imported.
  """

  serves = 'distill'

  def __init__(self, allow: Iterable[str] = ()):
    self.allow = tuple(allow)
    self._teacher: Teacher | None = None

  def check(self, run: Run) -> None:
    """Checks that the other run fits, without reading any of its arrays.

    A run that has begun no longer needs the run that it began with.

    Raises:
      ValueError: See `initial`.
    """
    options = _options(run)
    if options.teacher:
      teacher_lib.read(run, options, self.allow)
    if run.checkpoints.steps():
      return
    if not options.teacher or options.start == NONE:
      finetuning.check(run, self.allow)

  def initial(self, run: Run) -> tuple[dict[str, Any], str] | None:
    """The variables that a run begins with; see `training.begin.Initial`.

    They are the teacher's, as `distill.start` says, or those of
    `config.init_from`.

    Raises:
      ValueError: The teacher does not fit the run; or see
        `finetuning.initial`.
      CheckpointError: No checkpoint is good.
    """
    options = _options(run)
    if not options.teacher or options.start == NONE:
      return finetuning.initial(run, self.allow)
    return begin_with(run, options, self._read(run))

  def start(self, run: Run) -> None:
    """Wraps the step, and notes the teacher in the run's folder.

    Raises:
      ValueError: The teacher or the folder of logits does not fit the run, or
        the teacher is not the one that the run began with.
    """
    options = _options(run)
    if not options.teacher:
      return
    teacher = self._read(run)
    self._teacher = None  # the step keeps the arrays that it needs
    teacher_lib.keep_to(run, options, teacher)
    run.message(_description(options, teacher))
    if not options.soft_weight:
      return
    make = _stored_logits_step if options.logits else _computed_logits_step
    step = make(run, options, teacher)
    run.programs = dataclasses.replace(run.programs, train_step=step)
    run.train_step = step

  def _read(self, run: Run) -> Teacher:
    self._teacher = self._teacher or teacher_lib.read(
      run, _options(run), self.allow
    )
    return self._teacher


def _options(run: Run) -> DistillOptions:
  """The run's section `distill`; its step is that of stored logits, if any."""
  options = getattr(run.options, 'distill', DistillOptions())
  if not options.logits or options.step >= 0:
    return options
  step = teacher_logits.read(options.logits).about.step
  return dataclasses.replace(options, step=step)


def _description(o: DistillOptions, teacher: Teacher) -> str:
  description = f'teacher: step {teacher.step} of {teacher.folder}'
  if not o.soft_weight:
    return f'{description}, which gives parameters to begin with and no labels'
  description += (
    f'; {o.hard_weight:g} hard and {o.soft_weight:g} soft labels, temperature '
    f'{o.temperature:g}'
  )
  return description + f'\n{LEAK}' * teacher.model.leaks_future


def begin_with(
  run: Run, options: DistillOptions, teacher: Teacher
) -> tuple[dict[str, Any], str]:
  """The parameters of the teacher that the run begins with.

  All but experts and routers are copied; a feed-forward in a layer in which the
  teacher is sparse is drawn from the seed, or made of experts.

  Args:
    run: The run.
    options: Its section `distill`.
    teacher: The teacher.

  Returns:
    The variables and a line about them.

  Raises:
    ValueError: The models do not fit: all differences are listed.
  """
  try:
    plan = finetuning.plan(run.model, teacher.model, experts=False)
    apply, description = plan.apply, plan.describe()
    if options.start == CONCATENATED:
      batches = _first_batches(run, options.start_batches)
      concatenation = dense_start.plan(
        run.model, teacher.model, teacher.variables, batches
      )
      apply = functools.partial(concatenation.apply, apply)
      description += f'; {concatenation.describe()}'
  except InputError as error:
    raise InputError(
      f'distill.start={options.start!r} with distill.teacher='
      f"{options.teacher}: {error}\nwith distill.start='none' the run begins "
      'with parameters of its own'
    ) from None
  params = start_lib.convert(run, apply, teacher.variables['params'])
  line = (
    f'beginning with the weights of step {teacher.step} of {teacher.folder}: '
    f'{description}; the optimizer is new'
  )
  if changes := ', '.join(_changes(run, teacher)):
    line += f'; WARNING: settings differ: {changes}'
  return {'params': params}, line


def _changes(run: Run, teacher: Teacher) -> Iterator[str]:
  """Differing settings of what is copied, so without feed-forwards."""
  for change in start_lib.changes(teacher.options.model, run.options.model):
    if (
      not change.removeprefix('model.')
      .removeprefix('encoder.')
      .startswith('ffn.')
    ):
      yield change


def _first_batches(run: Run, count: int) -> list[dict[str, jax.Array]]:
  batches = run.batches(0)
  return [next(batches) for _ in range(count)]


class TaughtStep:
  """A step (state, batch) around one that takes arrays of a teacher, too.

  Attributes:
    stage: The function (teacher_arrays, state, batch), or a compiled stage.
    arrays_of: Function from the state to the teacher's variables or logits.
    shapes: The shapes of the teacher's arrays, with shardings.
  """

  def __init__(
    self, stage: Any, arrays_of: Callable[[TrainState], Any], shapes
  ):
    self.stage, self.arrays_of, self.shapes = stage, arrays_of, shapes

  def __call__(self, state: TrainState, batch: dict[str, jax.Array]) -> Any:
    """The new state and the metrics; see `training.step.train_step`."""
    return self.stage(self.arrays_of(state), state, batch)

  def lower(self, state: Any, batch: Any) -> 'TaughtStep':
    """See `jax.stages.Wrapped.lower`."""
    lowered = self.stage.lower(self.shapes, state, batch)
    return TaughtStep(lowered, self.arrays_of, self.shapes)

  def compile(self) -> 'TaughtStep':
    """See `jax.stages.Lowered.compile`."""
    return TaughtStep(self.stage.compile(), self.arrays_of, self.shapes)

  def __getattr__(self, name: str) -> Any:
    return getattr(self.stage, name)


def _shapes_of(tree: Any) -> Any:
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )


def _compile_step(run: Run, options: DistillOptions, soft, shapes: Any) -> Any:
  """The jitted function (teacher_arrays, state, batch) -> (state, metrics).

  Args:
    run: The run.
    options: Its section `distill`.
    soft: Function from the teacher's arrays to the soft loss, and the entries
      that it adds to the batch.
    shapes: The shapes of the teacher's arrays, with shardings.
  """

  def train_step(teacher_arrays, state, batch):
    soft_loss, entries = soft(teacher_arrays)
    loss = soft_labels.mixed(
      run.model, options.hard_weight, options.soft_weight, soft_loss
    )
    step = make_step(
      run.options,
      run.model,
      run.programs.optimizer,
      run.programs.trained,
      loss=loss,
    )
    return step(state, {**batch, **entries})

  state_layout = jax.tree.map(lambda x: x.sharding, run.programs.abstract_state)
  metrics = metrics_shardings(run.mesh, run.options.sharding.rules)
  teacher_layout = jax.tree.map(lambda x: x.sharding, shapes)
  return jax.jit(
    train_step,
    in_shardings=(teacher_layout, state_layout, run.programs.put.sharding),
    out_shardings=(state_layout, metrics),
    donate_argnums=1,
  )


def _computed_logits_step(
  run: Run, options: DistillOptions, teacher: Teacher
) -> TaughtStep:
  """The step that computes the teacher's logits of each (micro)batch."""
  variables = teacher.variables
  model, shapes = teacher.model, _shapes_of(variables)

  def soft(variables):
    return soft_labels.computed_beside(
      model, variables, options.temperature
    ), {}

  step = _compile_step(run, options, soft, shapes)
  return TaughtStep(step, lambda state: variables, shapes)


def _stored_logits_step(
  run: Run, options: DistillOptions, teacher: Teacher
) -> TaughtStep:
  """The step that reads the teacher's largest logits from a folder."""
  logits = teacher_logits.read(options.logits)
  logits.check(run, teacher)
  run.message(logits.describe())
  shapes = logits.shapes(run)

  def soft(teacher_arrays):
    return soft_labels.read_from_batch(options.temperature), teacher_arrays

  step = _compile_step(run, options, soft, shapes)
  return TaughtStep(step, logits.reader(run), shapes)
