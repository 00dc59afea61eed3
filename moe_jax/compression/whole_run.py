"""A trained run as compression reads it, and the new run that it writes."""

import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from moe_jax import sections
from moe_jax.models import MODELS, Model, ModelOptions
from moe_jax.models.router_state import COLLECTION
from moe_jax.runs import new_run, trained
from moe_jax.runs import workdir as workdir_lib


class WholeRun(NamedTuple):
  """A run with the variables of its model.

  Attributes:
    folder: The run's folder.
    options: Its options and its tokenizer, if it has one.
    model: Its model.
    variables: The variables that `model.apply` takes: 'params', with the run's
      adapters merged into the kernels, and 'router_state' where the model has
      it.
    step: The step of the checkpoint.
  """

  folder: pathlib.Path
  options: trained.Described
  model: Model
  variables: dict[str, Any]
  step: int


def read(
  workdir: str | os.PathLike[str],
  *,
  step: int | None = None,
  allow: Iterable[str] = (),
) -> WholeRun:
  """Reads a run onto the first local device.

  Args:
    workdir: The run's folder, of a trained or an imported model.
    step: The step of the checkpoint; None is the newest good one.
    allow: Modules whose classes, named in the run's folder, may be imported.

  Raises:
    ValueError: The folder holds no run, or none of its checkpoints is finished.
    CheckpointError: No checkpoint is good.
  """
  folder = pathlib.Path(workdir).expanduser()
  options = trained.read(folder, allow, tokenizer_needed=False)
  rules = options.sharding.rules
  model = options.model.build(rules)
  restored = trained.restore_variables(folder, model, rules, step=step)
  return WholeRun(folder, options, model, restored.state, restored.step)


def write(
  run: WholeRun,
  output: str | os.PathLike[str],
  params: Any,
  model: ModelOptions | None = None,
  *,
  router_state: Mapping[str, Any] | None = None,
) -> pathlib.Path:
  """Makes a new run's folder of a run, with another model.

  The folder is trained, evaluated, generated from and exported like that of an
  imported model. The task of its sample is left out if no router of the new
  model goes by task, as a config that names one would be refused.

  Args:
    run: The run that the model was made of.
    output: A folder that is new or empty, or that a killed command left.
    params: The parameters of the new model.
    model: The options of the new model; None keeps those of the run.
    router_state: The state of the new model's routers; None keeps that of the
      run.

  Returns:
    The new folder.

  Raises:
    ValueError: The folder is not free.
  """
  changes = {}
  if model is not None:
    changes['model'] = sections.choice_section(MODELS, model).to_dict()
    if not model.routes_by_task:
      sample = workdir_lib.kept_config(run.folder).get('sample', {})
      changes['sample'] = {**sample, 'task': ''}
  return new_run.derive(
    run.folder,
    output,
    params,
    changes,
    router_state=router_state or run.variables.get(COLLECTION),
  )
