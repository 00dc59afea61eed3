"""The teacher of a run: read, checked, and kept to until the run ends.

Not here: what it teaches (`soft_labels.py`), and when (`distill.py`).
"""

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
    asked: The step of the checkpoint; None is the newest good one.
  """

  folder: pathlib.Path
  options: trained.Described
  model: Model
  rules: partitioning.Rules
  mesh: Mesh
  asked: int | None

  @functools.cached_property
  def _restored(self) -> Restored:
    return trained.restore_variables(
      self.folder, self.model, self.rules, mesh=self.mesh, step=self.asked
    )

  @property
  def variables(self) -> dict[str, Any]:
    """The teacher's variables on the run's devices; read at first use.

    Raises:
      ValueError: There is no such checkpoint, or it is of another model.
      CheckpointError: It is not good.
    """
    return self._restored.state

  @property
  def step(self) -> int:
    """The step of the checkpoint, which is read unless its step is asked."""
    return self._restored.step if self.asked is None else self.asked

  @property
  def digest(self) -> str:
    """The sha256 of the checkpoint's manifest, which has those of its files.

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
  theirs = trained.read(folder, allow)
  code_trees.check_plain(theirs.model, f'distill.teacher={options.teacher}')
  model = theirs.model.build(options.sharding.rules)
  if problems := list(_problems(run, options, theirs, model)):
    raise ValueError(
      '\n'.join([f'distill.teacher={options.teacher} does not fit:', *problems])
    )
  asked = None if options.step < 0 else options.step
  if (kept := _kept(run)) and kept['asked'] == _asked(options):
    asked = kept['step']
  rules = options.sharding.rules
  return Teacher(folder, theirs, model, rules, run.mesh, asked)


def _problems(
  run: Run, options: DistillOptions, theirs: trained.Described, model: Model
) -> Iterator[str]:
  old, new = theirs.ids_identity, run.dataset.tokenizer.ids_identity
  if old != new:
    yield f'it was trained on tokens of {old}, this run is on those of {new}'
  if model.has_encoder != run.model.has_encoder or model.reads_features:
    kinds = type(model).__name__, type(run.model).__name__
    yield f'it is a {kinds[0]}, which does not read the batches of {kinds[1]}'
    return
  if model.vocab_size != run.model.vocab_size:
    yield (
      f'it has logits of vocab_size={model.vocab_size}, this model of '
      f'{run.model.vocab_size}'
    )
  yield from theirs.task_problems(run.options.data)
  if options.soft_weight and not options.logits:
    parts = partitioning.row_parts(run.mesh, options.sharding.rules)
    yield from theirs.model.problems_in(run.options.shape(parts))


def keep_to(run: Run, options: DistillOptions, teacher: Teacher) -> None:
  """Notes the teacher's checkpoint in the run's folder.

  Raises:
    ValueError: The run has begun with a checkpoint of that step which had other
      contents.
  """
  path, digest = run.workdir / FILE, teacher.digest
  kept = _kept(run)
  if kept and kept['asked'] == _asked(options):
    if kept['sha256'] != digest:
      raise ValueError(
        f'the checkpoint of step {teacher.step} in {teacher.folder} is not '
        f'that which taught {run.workdir} before: the sha256 of its manifest '
        f'was {kept["sha256"]}, and is {digest}'
      )
    return
  if kept:
    run.message(f'WARNING: another teacher than before: {kept["asked"]}')
  if is_first():
    values = {'asked': _asked(options), 'step': teacher.step, 'sha256': digest}
    workdir_lib.write_text(path, json.dumps(values, indent=2) + '\n')


def _asked(options: DistillOptions) -> dict[str, Any]:
  return {'teacher': options.teacher, 'step': options.step}


def _kept(run: Run) -> dict[str, Any]:
  """The values that `keep_to` wrote; {} where there is no file.

  Raises:
    ValueError: The file cannot be read.
  """
  path = run.workdir / FILE
  if not path.exists():
    return {}
  try:
    values = json.loads(path.read_text(encoding='utf-8'))
    return {key: values[key] for key in ('asked', 'step', 'sha256')}
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise ValueError(f'{path} cannot be read: {error!r}') from None
