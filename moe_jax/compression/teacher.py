"""The teacher of a run: read, checked, and kept to until the run ends."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from jax.sharding import Mesh

from moe_jax import partitioning
from moe_jax.compression.distill_options import DistillOptions
from moe_jax.distributed import is_first
from moe_jax.errors import InputError
from moe_jax.models import Model, code_trees
from moe_jax.runs import trained
from moe_jax.runs import workdir as workdir_lib
from moe_jax.runs.checkpointer import Restored
from moe_jax.training.setup import Run

# File of a student's folder that says which checkpoint teaches it.
FILE = 'teacher.json'


@dataclasses.dataclass(frozen=True)
class Teacher:
  """Another run, whose model teaches a run.

  Attributes:
    folder: The other run's folder.
    options: Its options and its tokenizer.
    model: Its model, built with the sharding table `distill.sharding`.
    rules: The sharding table by which the model's arrays are split.
    mesh: The run's devices.
    pinned_step: The step of the checkpoint; None is the newest good one.
  """

  folder: pathlib.Path
  options: trained.Described
  model: Model
  rules: partitioning.Rules
  mesh: Mesh
  pinned_step: int | None

  @functools.cached_property
  def _restored(self) -> Restored:
    return trained.restore_variables(
      self.folder, self.model, self.rules, mesh=self.mesh, step=self.pinned_step
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
    return self._restored.step if self.pinned_step is None else self.pinned_step

  @property
  def digest(self) -> str:
    """The sha256 of the checkpoint's manifest, which has the files' own sha256.

    Raises:
      ValueError: There is no such checkpoint.
    """
    return trained.checkpoint_digest(self.folder, self.step)


def read(
  run: Run, options: DistillOptions, allow: Iterable[str] = ()
) -> Teacher:
  """The teacher of a run, checked against it; its arrays are read later.

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
  folder = pathlib.Path(options.teacher).expanduser()
  settings = trained.read(folder, allow)
  code_trees.check_plain(settings.model, f'distill.teacher={options.teacher}')
  model = settings.model.build(options.sharding.rules)
  if problems := list(_problems(run, options, settings, model)):
    raise InputError(
      '\n'.join([f'distill.teacher={options.teacher} does not fit:', *problems])
    )
  pinned_step = None if options.step < 0 else options.step
  if (note := _stored_note(run)) and note['asked'] == _request(options):
    pinned_step = note['step']
  rules = options.sharding.rules
  return Teacher(folder, settings, model, rules, run.mesh, pinned_step)


def _problems(
  run: Run, options: DistillOptions, settings: trained.Described, model: Model
) -> Iterator[str]:
  yield from settings.token_problems(run.dataset.tokenizer)
  if model.has_encoder != run.model.has_encoder:
    kinds = type(model).__name__, type(run.model).__name__
    yield f'it is a {kinds[0]}, which does not read the batches of {kinds[1]}'
    return
  if model.vocab_size != run.model.vocab_size:
    yield (
      f'it has logits of vocab_size={model.vocab_size}, this model of '
      f'{run.model.vocab_size}'
    )
  yield from settings.task_problems(run.options.data)
  if options.soft_weight and not options.logits:
    num_parts = partitioning.row_parts(run.mesh, options.sharding.rules)
    yield from settings.model.problems_in(run.options.shape(num_parts))


def keep_to(run: Run, options: DistillOptions, teacher: Teacher) -> None:
  """Notes the teacher's checkpoint in the run's folder.

  Raises:
    ValueError: The run has begun with a checkpoint of that step which had other
      contents.
  """
  path, digest = run.workdir / FILE, teacher.digest
  note, request = _stored_note(run), _request(options)
  if note and note['asked'] == request:
    if note['sha256'] != digest:
      raise InputError(
        f'the checkpoint of step {teacher.step} in {teacher.folder} is not '
        f'that which taught {run.workdir} before: the sha256 of its manifest '
        f'was {note["sha256"]}, and is {digest}'
      )
    return
  if note:
    run.message(f'WARNING: another teacher than before: {note["asked"]}')
  if is_first():
    fields = {'asked': request, 'step': teacher.step, 'sha256': digest}
    workdir_lib.write_text(path, json.dumps(fields, indent=2) + '\n')


def _request(options: DistillOptions) -> dict[str, Any]:
  return {'teacher': options.teacher, 'step': options.step}


def _stored_note(run: Run) -> dict[str, Any]:
  """The values that `keep_to` wrote; {} where there is no file.

  Raises:
    ValueError: The file cannot be read.
  """
  path = run.workdir / FILE
  if not path.exists():
    return {}
  try:
    fields = json.loads(path.read_text(encoding='utf-8'))
    return {key: fields[key] for key in ('asked', 'step', 'sha256')}
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(f'{path} cannot be read: {error!r}') from None
