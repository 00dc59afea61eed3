"""A trained run as compression reads it, and the new run that it writes.

The size of a model in memory and on disk is counted here, too.
"""

import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax

from moe_jax.config import section_of
from moe_jax.layers.routers.contract import ROUTER_STATE
from moe_jax.models import MODELS, Model, ModelOptions
from moe_jax.runs import workdir as workdir_lib
from moe_jax.training import trained


class WholeRun(NamedTuple):
  """A run with the variables of its model.

  Attributes:
    folder: The run's folder.
    options: The run's options, and its tokenizer if it has one.
    model: The run's model.
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
  """Reads a run, trained or imported, onto the first local device.

  Args:
    workdir: The run's folder.
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
  """Writes the folder of a new run, an existing run with another model.

  Like the folder of an imported model, the new folder serves for training,
  evaluation, generation and export. `config.sample.task` becomes '' if no
  router of the new model goes by task, since a config with such a task would be
  refused.

  Args:
    run: The run whose model the new parameters were made of.
    output: A folder that is new or empty.
    params: The parameters of the new model.
    model: The options of the new model; None keeps the options of the run.
    router_state: The state of the new model's routers; None keeps the state in
      the run.

  Returns:
    The new folder.

  Raises:
    ValueError: `output` holds something else.
  """
  changes = {}
  if model is not None:
    changes['model'] = section_of(model, MODELS).to_dict()
    if not model.routes_by_task:
      sample = workdir_lib.kept_config(run.folder).get('sample', {})
      changes['sample'] = {**sample, 'task': ''}
  return trained.derive(
    run.folder,
    output,
    params,
    changes,
    router_state=router_state or run.variables.get(ROUTER_STATE),
  )


def bytes_in_memory(variables: Mapping[str, Any]) -> int:
  """The bytes of a model's variables, quantised kernels' codes included."""
  return sum(leaf.nbytes for leaf in jax.tree.leaves(variables))


def bytes_on_disk(workdir: str | os.PathLike[str]) -> int:
  """The bytes of a run's checkpoints, the optimizer's state included."""
  folder = pathlib.Path(workdir).expanduser() / workdir_lib.CHECKPOINTS
  return sum(
    path.stat().st_size for path in folder.rglob('*') if path.is_file()
  )
