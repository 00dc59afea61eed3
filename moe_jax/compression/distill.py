"""Distillation: a run learns from another run's model, and begins with it.

    config.distill.teacher = 'runs/tiny'

Switch Transformers, section 4.2 (https://arxiv.org/abs/2101.03961). The hook
`Distilling` wraps the step, and gives the parameters to begin with.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from moe_jax import finetuning, partitioning
from moe_jax.compression import dense_start, soft_labels, teacher_logits
from moe_jax.compression.distill_options import (
  CONCATENATED,
  NONE,
  DistillOptions,
)
from moe_jax.distributed import is_first
from moe_jax.errors import InputError
from moe_jax.finetuning import start as start_lib
from moe_jax.models import code_trees
from moe_jax.models.base import counted
from moe_jax.runs import trained
from moe_jax.runs import workdir as workdir_lib
from moe_jax.runs.checkpointer import Restored
from moe_jax.training.programs import make_step, metrics_shardings
from moe_jax.training.setup import Hook, Run
from moe_jax.training.step import TrainState

# File of a student's folder that says which checkpoint teaches it.
TEACHER_FILE = 'teacher.json'
LEAK = (
  'WARNING: the teacher is not causal: where its capacity binds, later tokens '
  'change its soft labels for earlier ones'
)


class Teacher:
  """Another run, whose model teaches a run.

  Attributes:
    folder: The other run's folder.
    options: Its options and its tokenizer.
    model: Its model, built with the sharding table `distill.sharding`.
  """

  def __init__(
    self, run: Run, options: DistillOptions, allow: Iterable[str] = ()
  ):
    """Checks the teacher against a run; its arrays are read later.

    Args:
      run: The run.
      options: Its section `distill`.
      allow: Modules whose classes, named in the teacher's folder, may be
        imported.

    Raises:
      ValueError: The folder holds no run, or one with kernels in codes; or the
        teacher's tokens, tasks, sequences or sizes do not fit the run: all
        reasons are listed.
    """
    self._run, self._rules = run, options.sharding.rules
    self.folder = pathlib.Path(options.teacher).expanduser()
    self.options = trained.read(self.folder, allow)
    name = f'distill.teacher={options.teacher}'
    code_trees.check_plain(self.options.model, name)
    self.model = self.options.model.build(self._rules)
    if problems := list(self._problems(options)):
      raise InputError('\n'.join([f'{name} does not fit:', *problems]))
    self._asked = {'teacher': options.teacher, 'step': options.step}
    self._note = _stored_note(run.workdir / TEACHER_FILE)
    self._kept = self._note.get('asked') == self._asked
    step = self._note['step'] if self._kept else options.step
    self._pinned_step = None if step < 0 else step

  def _problems(self, options: DistillOptions) -> Iterator[str]:
    model, run = self.model, self._run
    yield from self.options.token_problems(run.dataset.tokenizer)
    if model.has_encoder != run.model.has_encoder:
      kinds = type(model).__name__, type(run.model).__name__
      yield f'it is a {kinds[0]}, which does not read the batches of {kinds[1]}'
      return
    if model.vocab_size != run.model.vocab_size:
      yield (
        f'it has logits of vocab_size={model.vocab_size}, this model of '
        f'{run.model.vocab_size}'
      )
    yield from self.options.task_problems(run.options.data)
    if options.soft_weight and not options.logits:
      num_parts = partitioning.row_parts(run.mesh, self._rules)
      shape = run.options.shape(num_parts)
      yield from self.options.model.problems_in(shape)

  @functools.cached_property
  def _restored(self) -> Restored:
    return trained.restore_variables(
      self.folder,
      self.model,
      self._rules,
      mesh=self._run.mesh,
      step=self._pinned_step,
    )

  @property
  def variables(self) -> dict[str, Any]:
    """The teacher's variables on the run's devices; read at first use.

    Raises:
      ValueError: There is no such checkpoint, or it is of another model.
      CheckpointError: The checkpoint is not good.
    """
    return self._restored.state

  @property
  def step(self) -> int:
    """The step of the checkpoint, which is read unless the step is pinned."""
    pinned = self._pinned_step
    return self._restored.step if pinned is None else pinned

  @property
  def digest(self) -> str:
    """The sha256 of the checkpoint's manifest, which has the files' own sha256.

    Raises:
      ValueError: There is no such checkpoint.
    """
    return trained.checkpoint_digest(self.folder, self.step)

  def keep_to(self) -> None:
    """Notes the checkpoint in the run's folder.

    Raises:
      ValueError: The run has begun with a checkpoint of that step which had
        other contents.
    """
    run, note, digest = self._run, self._note, self.digest
    if self._kept:
      if note['sha256'] != digest:
        raise InputError(
          f'the checkpoint of step {self.step} in {self.folder} is not that '
          f'which taught {run.workdir} before: the sha256 of its manifest was '
          f'{note["sha256"]}, and is {digest}'
        )
      return
    if note:
      run.message(f'WARNING: another teacher than before: {note["asked"]}')
    if is_first():
      fields = {'asked': self._asked, 'step': self.step, 'sha256': digest}
      text = json.dumps(fields, indent=2) + '\n'
      workdir_lib.write_text(run.workdir / TEACHER_FILE, text)


def _stored_note(path: pathlib.Path) -> dict[str, Any]:
  """The values that `Teacher.keep_to` wrote; {} where there is no file."""
  if not path.exists():
    return {}
  try:
    fields = json.loads(path.read_text(encoding='utf-8'))
    return {key: fields[key] for key in ('asked', 'step', 'sha256')}
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(f'{path} cannot be read: {error!r}') from None


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
    """
    options = _options(run)
    if options.teacher:
      Teacher(run, options, self.allow)
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
    self._teacher = self._teacher or Teacher(run, options, self.allow)
    return _begin_with(run, options, self._teacher)

  def start(self, run: Run) -> None:
    """Wraps the step, and notes the teacher in the run's folder.

    Raises:
      ValueError: The teacher or the folder of logits does not fit the run, or
        the teacher is not the one that the run began with.
    """
    options = _options(run)
    if not options.teacher:
      return
    teacher = self._teacher or Teacher(run, options, self.allow)
    self._teacher = None  # the step keeps the arrays that it needs
    teacher.keep_to()
    run.message(_description(options, teacher))
    if options.soft_weight:
      step = _taught_step(run, options, teacher)
      run.programs = dataclasses.replace(run.programs, train_step=step)
      run.train_step = step


def _options(run: Run) -> DistillOptions:
  """The run's section `distill`; its step is that of stored logits, if any."""
  options = getattr(run.options, 'distill', DistillOptions())
  if not options.logits or options.step >= 0:
    return options
  step = teacher_logits.read(options.logits).step
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


def _begin_with(
  run: Run, options: DistillOptions, teacher: Teacher
) -> tuple[dict[str, Any], str]:
  """The variables that the teacher gives, and a line about them.

  All but experts and routers are copied; a feed-forward in a layer in which the
  teacher is sparse is drawn from the seed, or made of experts.
  """
  try:
    plan = finetuning.plan(run.model, teacher.model, experts=False)
    apply, description = plan.apply, plan.describe()
    if options.start == CONCATENATED:
      batches = run.batches(0)
      concatenation = dense_start.plan(
        run.model,
        teacher.model,
        teacher.variables,
        [next(batches) for _ in range(options.start_batches)],
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
  # Feed-forwards are not copied.
  ffns = ('model.ffn.', 'model.encoder.ffn.')
  settings = start_lib.changes(teacher.options.model, run.options.model)
  if changes := ', '.join(x for x in settings if not x.startswith(ffns)):
    line += f'; WARNING: settings differ: {changes}'
  return {'params': params}, line


class TaughtStep:
  """A step (state, batch) around one that takes arrays of a teacher, too.

  It is lowered and compiled like a function that `jax.jit` returns.

  Attributes:
    stage: The function (teacher_arrays, state, batch), or a compiled stage.
    arrays_of: Function from the state to the teacher's variables or logits.
    shapes: The shapes of the teacher's arrays, with shardings.
  """

  def __init__(
    self, stage: Any, arrays_of: Callable[[TrainState], Any], shapes: Any
  ):
    self.stage, self.arrays_of, self.shapes = stage, arrays_of, shapes

  def __call__(self, state: TrainState, batch: dict[str, jax.Array]) -> Any:
    """The new state and the metrics; see `training.step.train_step`."""
    return self.stage(self.arrays_of(state), state, batch)

  def lower(self, state: Any, batch: Any) -> 'TaughtStep':
    """The step, lowered for a state and a batch of these shapes."""
    lowered = self.stage.lower(self.shapes, state, batch)
    return TaughtStep(lowered, self.arrays_of, self.shapes)

  def compile(self) -> 'TaughtStep':
    """The lowered step, compiled."""
    return TaughtStep(self.stage.compile(), self.arrays_of, self.shapes)

  def __getattr__(self, name: str) -> Any:
    return getattr(self.stage, name)


def _taught_step(
  run: Run, options: DistillOptions, teacher: Teacher
) -> TaughtStep:
  """The step with soft labels, computed for each (micro)batch or stored.

  The teacher's dropout and its routers' noise are off; tokens that its capacity
  drops in its evaluation are dropped here, too.
  """
  model, temperature = teacher.model, options.temperature
  if options.logits:
    stored = teacher_logits.read(options.logits)
    stored.check(run, teacher.step, teacher.digest)
    run.message(stored.describe())
    arrays_of, shapes = stored.reader(run), stored.shapes(run)
  else:
    variables = teacher.variables

    def all_variables(state: TrainState) -> Any:
      del state
      return variables

    arrays_of = all_variables
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      variables,
    )

  def train_step(teacher_arrays, state, batch):
    def soft(outputs, batch):
      if options.logits:
        ids = batch[teacher_logits.IDS]
        logits = batch[teacher_logits.LOG_PROBS]
      else:
        logits, _ = model.apply(teacher_arrays, **model.inputs(batch))
        logits, ids = counted(logits, batch), None
      return soft_labels.soft_cross_entropy(outputs, logits, temperature, ids)

    step = make_step(
      run.options,
      run.model,
      run.programs.optimizer,
      run.programs.trained,
      loss=soft_labels.mixed(
        run.model, options.hard_weight, options.soft_weight, soft
      ),
    )
    # Rows of stored logits are split into microbatches like others.
    entries = teacher_arrays if options.logits else {}
    return step(state, {**batch, **entries})

  def layout_of(tree):
    return jax.tree.map(lambda x: x.sharding, tree)

  state_layout = layout_of(run.programs.abstract_state)
  metrics = metrics_shardings(run.mesh, run.options.sharding.rules)
  step = jax.jit(
    train_step,
    in_shardings=(layout_of(shapes), state_layout, run.programs.put.sharding),
    out_shardings=(state_layout, metrics),
    donate_argnums=1,
  )
  return TaughtStep(step, arrays_of, shapes)
