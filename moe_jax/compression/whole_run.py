"""A trained run as compression reads it, and the new run that commands write.

The size of a model in memory and on disk is counted here, too.
"""

import argparse
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from moe_jax import cli
from moe_jax.config import section_of
from moe_jax.layers.routers.contract import ROUTER_STATE
from moe_jax.models import MODELS, ModelOptions
from moe_jax.runs import workdir as workdir_lib
from moe_jax.training import trained
from moe_jax.training.trained import Loaded


def command(
  commands: Any, name: str, run: Callable[..., str], text: str, doc: str | None
) -> argparse.ArgumentParser:
  """Adds a command that makes a new run's folder from that of a run.

  Args:
    commands: The commands of a parser.
    name: The name of the command.
    run: The function that carries it out, from the parsed options and the
      overrides of a config to a text to print.
    text: What the command does, in words.
    doc: The docstring of the command's module, for the help.

  Returns:
    The parser of the command, for further arguments.
  """
  parser = commands.add_parser(name, help=text, **cli.about(doc))
  parser.set_defaults(run=run)
  text = 'folder of the run'
  parser.add_argument('--run', required=True, dest='folder', help=text)
  parser.add_argument('--output', required=True, help='folder of the new run')
  text = 'step of the checkpoint; else the newest good'
  parser.add_argument('--step', type=cli.NOT_NEGATIVE, help=text)
  return parser


def read(workdir: str | os.PathLike[str], **arguments: Any) -> Loaded:
  """Reads a run, which may lack a tokenizer, onto the first local device.

  `arguments` are arguments of `trained.load`, such as `step`, where None is the
  newest good checkpoint, and `allow`, modules whose classes may be imported.

  Raises:
    ValueError: The folder lacks something, or its files do not fit together.
    CheckpointError: No checkpoint is good.
  """
  return trained.load(workdir, tokenizer_needed=False, **arguments)


def write(
  run: Loaded,
  output: str | os.PathLike[str],
  params: Any,
  model: ModelOptions | None = None,
  *,
  router_state: Mapping[str, Any] | None = None,
) -> pathlib.Path:
  """Writes the folder of a new run, an existing run with another model.

  Like the folder of an imported model, the new folder serves for training,
  evaluation, generation and export. `config.sample.task` becomes '' if no
  router of the new model goes by task, since the config would be refused.

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
    ValueError: `output` is not empty.
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
