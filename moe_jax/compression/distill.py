"""Distillation: a run learns from another run's model, and may begin with it.

    config.distill.teacher = 'runs/tiny'

The teacher's soft labels are mixed with hard ones, as in
https://arxiv.org/abs/1503.02531 and in section 4.2 of Switch Transformers
(https://arxiv.org/abs/2101.03961). The hook `Distilling` puts the soft labels
into the training step, and gives the parameters to begin with.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from moe_jax import finetuning, partitioning
from moe_jax.compression import dense_start, teacher_logits
from moe_jax.compression.distill_options import CONCATENATED, DistillOptions
from moe_jax.data.plain_files import read_json
from moe_jax.devices import is_first
from moe_jax.errors import InputError
from moe_jax.finetuning import start as start_lib
from moe_jax.models import Model, code_trees
from moe_jax.models.base import Batch, TokenLosses, counted, of_targets
from moe_jax.models.logits import by_blocks
from moe_jax.runs import workdir as workdir_lib
from moe_jax.runs.checkpointer import Restored
from moe_jax.shapes import Array, Float32, Int
from moe_jax.training import trained
from moe_jax.training.programs import Step, make_step, metrics_shardings
from moe_jax.training.setup import Hook, Run

# The file in a student's folder that says which checkpoint is the teacher.
TEACHER_FILE = 'teacher.json'


class Teacher:
  """The run whose model teaches another run, the student.

  Attributes:
    folder: The teacher's folder.
    options: The teacher's options and tokenizer.
    model: The teacher's model, with the sharding table `distill.sharding`.
  """

  def __init__(
    self, run: Run, options: DistillOptions, allow: Iterable[str] = ()
  ):
    """Checks the teacher against a run; the teacher's arrays are read later.

    Args:
      run: The run that learns.
      options: The run's `config.distill`.
      allow: Modules whose classes, named in the teacher's folder, may be
        imported.

    Raises:
      ValueError: The folder holds no run, or a run with quantised kernels; or
        the teacher's tokens, tasks, sequences or sizes do not fit the run: all
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
    self._note = read_json(run.workdir / TEACHER_FILE)
    self._kept = self._note.get('asked') == self._asked
    step = self._note['step'] if self._kept else options.step
    self._pinned_step = None if step < 0 else step

  def _problems(self, options: DistillOptions) -> Iterator[str]:
    model, run = self.model, self._run
    yield from self.options.data_problems(
      run.options.data, run.dataset.tokenizer
    )
    if model.has_encoder != run.model.has_encoder:
      kinds = type(model).__name__, type(run.model).__name__
      yield f'it is a {kinds[0]}, which does not read the batches of {kinds[1]}'
      return
    if model.vocab_size != run.model.vocab_size:
      yield (
        f'it has logits of vocab_size={model.vocab_size}, this model of '
        f'{run.model.vocab_size}'
      )
    if options.soft_weight and not options.logits:
      num_parts = partitioning.row_parts(run.mesh, self._rules)
      shape = run.options.shape(num_parts)
      yield from self.options.model.problems_in(shape)

  @functools.cached_property
  def restored(self) -> Restored:
    """The teacher's variables on the run's devices, with their step.

    Raises:
      ValueError: No checkpoint has the step, or the checkpoint is of another
        model than the teacher's config describes.
      CheckpointError: The checkpoint is not good.
    """
    return trained.restore_variables(
      self.folder,
      self.model,
      self._rules,
      mesh=self._run.mesh,
      step=self._pinned_step,
    )

  @property
  def step(self) -> int:
    """The step of the teacher's checkpoint, the newest if options name none."""
    pinned = self._pinned_step
    return self.restored.step if pinned is None else pinned

  @property
  def digest(self) -> str:
    """The sha256 of the manifest of the teacher's checkpoint.

    The manifest has the sha256 of every other file.

    Raises:
      ValueError: The teacher has no checkpoint of `step`.
    """
    return trained.checkpoint_digest(self.folder, self.step)

  def keep_to(self) -> None:
    """Notes the teacher's checkpoint in the run's folder, for resumed runs.

    Raises:
      ValueError: The run has begun with another checkpoint: its step is the
        same, but its contents differ.
    """
    run, note = self._run, self._note
    new = {'asked': self._asked, 'step': self.step, 'sha256': self.digest}
    if self._kept:
      if note['sha256'] != new['sha256']:
        raise InputError(
          f'the checkpoint of step {self.step} in {self.folder} is not that '
          f'which taught {run.workdir} before: the sha256 of its manifest was '
          f'{note["sha256"]}, and is {new["sha256"]}'
        )
      return
    if note:
      run.message(f'WARNING: another teacher than before: {note["asked"]}')
    if is_first():
      text = json.dumps(new, indent=2) + '\n'
      workdir_lib.write_text(run.workdir / TEACHER_FILE, text)


class Distilling(Hook):
  """Teaches a run whose config has `distill.teacher`; other runs do not change.

  Attributes:
    allow: Modules whose classes, named in another run's folder, may be
      imported.
  """

  serves = 'distill'

  def __init__(self, allow: Iterable[str] = ()):
    self.allow = tuple(allow)
    self._teacher: Teacher | None = None

  def check(self, run: Run) -> None:
    """Checks the teacher or the run of `config.init_from`, without any arrays.

    The run of `config.init_from` is not checked if this run has a checkpoint.
    """
    options = _options(run)
    if options.teacher:
      Teacher(run, options, self.allow)
    if options.begins or run.checkpoints.steps():
      return
    finetuning.check(run, self.allow)

  def initial(self, run: Run) -> tuple[dict[str, Any], str] | None:
    """The variables that a run begins with, and a line that says which.

    They come from the teacher, as `distill.start` says, or from
    `config.init_from`; None if both name no run.

    Raises:
      ValueError: The teacher, or the run of `config.init_from`, cannot be read
        or does not fit the run.
      CheckpointError: No checkpoint is good.
    """
    options = _options(run)
    if not options.begins:
      return finetuning.initial(run, self.allow)
    self._teacher = Teacher(run, options, self.allow)
    return _begin_with(run, options, self._teacher)

  def start(self, run: Run) -> Run | None:
    """Puts soft labels into the run's step; None if the run learns from none.

    The teacher is noted in the run's folder.

    Raises:
      ValueError: The teacher or the folder of logits does not fit the run, or
        the teacher is not the one that the run began with.
    """
    options = _options(run)
    if not options.teacher:
      return None
    teacher = self._teacher or Teacher(run, options, self.allow)
    self._teacher = None  # the step keeps the arrays that it needs
    teacher.keep_to()
    line = f'teacher: step {teacher.step} of {teacher.folder}'
    if not options.soft_weight:
      run.message(f'{line}, which gives parameters to begin with and no labels')
      return None
    run.message(
      f'{line}; {options.hard_weight:g} hard and {options.soft_weight:g} soft '
      f'labels, temperature {options.temperature:g}'
    )
    if teacher.model.stacks.leaks_future:
      run.message(
        'WARNING: the teacher is not causal: where its capacity binds, later '
        'tokens change its soft labels for earlier ones'
      )
    step = _taught_step(run, options, teacher)
    return dataclasses.replace(run, train_step=step)


def _options(run: Run) -> DistillOptions:
  """The run's `config.distill`, completed by the step of stored logits.

  If the config names a folder of logits but no step of the teacher, the step is
  that of the checkpoint that computed the logits.
  """
  options = getattr(run.options, 'distill', DistillOptions())
  if not options.logits or options.step >= 0:
    return options
  step = teacher_logits.read(options.logits).step
  return dataclasses.replace(options, step=step)


def _begin_with(
  run: Run, options: DistillOptions, teacher: Teacher
) -> tuple[dict[str, Any], str]:
  """The student's first variables, and a line of text that says how it begins.

  The teacher's parameters are copied, all but those of experts and routers.
  Where the teacher's layer is sparse, the student's feed-forward is drawn from
  the seed, or made of the teacher's experts. ValueError is raised where the
  parameters do not fit the student.
  """
  try:
    plan = finetuning.plan(run.model, teacher.model, experts=False)
    apply, description = plan.apply, plan.describe()
    if options.start == CONCATENATED:
      batches = itertools.islice(run.batches(0), options.start_batches)
      experts = dense_start.best_experts(
        run.model, teacher.model, teacher.restored.state, batches
      )
      apply = functools.partial(
        dense_start.concatenated, run.model, teacher.model, experts, apply
      )
      numbers = ', '.join(f'{[*e]} of layer {i}' for i, e in experts.items())
      description += f'; then made of experts {numbers}, their outputs averaged'
  except InputError as error:
    raise InputError(
      f'distill.start={options.start!r} with distill.teacher='
      f"{options.teacher}: {error}\nwith distill.start='none' the run begins "
      'with parameters of its own'
    ) from None
  params = start_lib.convert(run, apply, teacher.restored.state['params'])
  line = (
    f'beginning with the weights of step {teacher.step} of {teacher.folder}: '
    f'{description}; the optimizer is new'
  )
  # The teacher's feed-forwards are not copied: the student's may differ.
  ffns = ('model.ffn.', 'model.encoder.ffn.')
  settings = start_lib.changes(teacher.options.model, run.options.model)
  if changes := ', '.join(x for x in settings if not x.startswith(ffns)):
    line += f'; WARNING: settings differ: {changes}'
  return {'params': params}, line


def soft_cross_entropy(
  outputs: Float32[Array, '*B V'],
  logits: Float32[Array, '*B L'],
  temperature: float = 1.0,
  ids: Int[Array, '*B L'] | None = None,
) -> Float32[Array, '*B']:
  """T^2 times the cross-entropy of softmax(logits / T), for each token.

  The square keeps the size of the gradient as the temperature T grows. The
  Kullback-Leibler divergence differs from this loss by the teacher's entropy,
  which has no gradient here.

  Args:
    outputs: The student's logits.
    logits: The teacher's logits or log-probabilities of L tokens, through which
      no gradient flows.
    temperature: T.
    ids: The ids of the L tokens that `logits` is about, in any order; None if
      it is about all V. The teacher gives other tokens the probability 0.
  """
  labels = jax.nn.softmax(jax.lax.stop_gradient(logits) / temperature)
  log_probs = jax.nn.log_softmax(outputs / temperature)
  if ids is not None:
    log_probs = jnp.take_along_axis(log_probs, ids, axis=-1)
  return -(temperature**2) * (labels * log_probs).sum(-1)


def mixed(
  model: Model, options: DistillOptions, labels: Callable[[Batch], Any]
) -> Callable[[Any, Batch], TokenLosses]:
  """Returns the function from a student's outputs and a batch to its loss.

  The loss of each token is the sum of the model's own and that of soft labels,
  weighted.

  Args:
    model: The student.
    options: The two weights, and the temperature of the soft labels; a
      `hard_weight` of 0 leaves out the model's loss.
    labels: The function from a batch to the `logits` and `ids` that
      `soft_cross_entropy` takes; the logits may be yet to be computed.
  """

  def of_tokens(arrays, rows):
    outputs, (logits, ids) = arrays
    hard_loss = model.loss(outputs, rows)
    nats = options.soft_weight * soft_cross_entropy(
      counted(outputs, rows), counted(logits, rows), options.temperature, ids
    )
    if options.hard_weight:
      nats = options.hard_weight * hard_loss.nats + nats
    return hard_loss._replace(nats=nats)

  def loss(outputs: Any, batch: Batch) -> TokenLosses:
    return by_blocks(of_tokens, (outputs, labels(batch)), of_targets(batch))

  return loss


def _taught_step(run: Run, options: DistillOptions, teacher: Teacher) -> Step:
  """Returns a step (state, batch) -> (state, metrics) that learns soft labels.

  The labels are stored, or the teacher computes them for each microbatch. The
  teacher runs as in evaluation: dropout and routers' noise are off, and tokens
  beyond the capacity of evaluation are dropped. ValueError is raised where the
  stored logits are of another teacher or of other batches.
  """
  model, stored = teacher.model.with_deferred_logits(), None
  if options.logits:
    stored = teacher_logits.read(options.logits)
    stored.check(run, teacher.step, teacher.digest)
    run.message(stored.describe())
  arrays = stored.shapes(run) if stored else teacher.restored.state

  def labels(arrays, batch):
    if stored:
      return tuple(batch[name] for name in teacher_logits.IN_BATCH)
    logits, _ = model.apply(arrays, **model.inputs(batch))
    return logits, None

  def train_step(arrays, state, batch):
    step = make_step(
      run.options,
      run.model,
      run.programs.adapters,
      run.programs.trained,
      run.programs.optimizer,
      loss=mixed(run.model, options, functools.partial(labels, arrays)),
    )
    # Stored logits are in the batch, so that microbatches split them, too.
    return step(state, {**batch, **arrays} if stored else batch)

  layouts = jax.tree.map(
    lambda x: x.sharding, (arrays, run.programs.abstract_state)
  )
  rows = run.programs.put.sharding
  stage = jax.jit(
    train_step,
    in_shardings=(*layouts, rows),
    out_shardings=(layouts[1], metrics_shardings(layouts[1].step, rows)),
    donate_argnums=1,
  )
  arrays_of = stored.reader(run) if stored else lambda _: arrays
  return lambda state, batch: stage(arrays_of(state), state, batch)
