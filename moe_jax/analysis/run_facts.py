"""Facts that a run's folder does not tell by itself: model, machine, state.

They are in `run_facts.json`, which a run writes at its start and its end; for a
folder without that file they are worked out from its other files, as far as
possible. Not here: the page that shows them (`run_page.py`).
"""

import dataclasses
import importlib.metadata
import json
import pathlib
import platform
import time
from collections.abc import Iterable
from typing import Any

import jax

from moe_jax import models
from moe_jax.analysis import counts, devices
from moe_jax.errors import InputError
from moe_jax.models import MODELS, Model, ModelOptions
from moe_jax.models.parameter_trees import abstract_params
from moe_jax.runs import trained
from moe_jax.runs import workdir as workdir_lib
from moe_jax.training.setup import Run

FILE = 'run_facts.json'
RUNNING, FINISHED, STOPPED, FAILED = 'running', 'finished', 'stopped', 'failed'
_PACKAGES = ('moe_jax', 'jax', 'jaxlib', 'flax', 'optax', 'numpy')


@dataclasses.dataclass(frozen=True)
class RunFacts:
  """The facts of a run beside its metrics and its config.

  Attributes:
    model: The kind of model.
    experts: A line on its sparse layers.
    parameters: Number of its parameters; 0 if unknown.
    active: Number of those that compute one token; 0 if unknown.
    generates: Whether it can generate text.
    is_sparse: Whether routers choose experts for its tokens.
    has_blocks: Whether it consists of blocks of attention and feed-forward.
    by_task: Whether its prompts need the name of a task.
    loss_unit: Unit of a loss.
    counted: Noun, in the singular, for what the speed counts.
    config_name: Name of the config's file; '' if unknown.
    devices: A line on the devices; '' if unknown.
    versions: Versions of packages by name.
    started: Time of the last start; '' if unknown.
    state: One of `RUNNING`, `FINISHED`, `STOPPED`, `FAILED`; '' if unknown.
    said: Message of the error that ended the run; '' without.
  """

  model: str = ''
  experts: str = ''
  parameters: int = 0
  active: int = 0
  generates: bool = False
  is_sparse: bool = False
  has_blocks: bool = False
  by_task: bool = False
  loss_unit: str = 'nats/token'
  counted: str = 'token'
  config_name: str = ''
  devices: str = ''
  versions: dict[str, str] = dataclasses.field(default_factory=dict)
  started: str = ''
  state: str = ''
  said: str = ''

  def write(self, folder: pathlib.Path) -> None:
    """Writes the facts into a run's folder."""
    text = json.dumps(dataclasses.asdict(self), indent=2) + '\n'
    workdir_lib.write_text(folder / FILE, text)


def now() -> str:
  """The time, as pages give it."""
  return time.strftime('%Y-%m-%d %H:%M %Z')


def of_run(run: Run, config_name: str = '') -> RunFacts:
  """The facts of a run that begins or goes on."""
  return dataclasses.replace(
    _model_facts(run.model, run.options.model, run.options.data.seq_len),
    loss_unit=run.dataset.loss_unit,
    counted=run.dataset.counted,
    config_name=config_name,
    devices=devices.describe(run.mesh),
    versions=_versions(),
    started=now(),
    state=RUNNING,
  )


def read(folder: pathlib.Path, allow: Iterable[str] = ()) -> RunFacts:
  """The facts of the run in a folder, as far as they are known.

  Args:
    folder: The run's folder.
    allow: Modules whose classes may be imported where the folder names them.
  """
  try:
    values = json.loads((folder / FILE).read_text(encoding='utf-8'))
    facts = RunFacts(**values)
    if _is_whole(facts):
      return facts
  except (OSError, TypeError, ValueError, RecursionError):
    pass
  try:
    run = trained.read(folder, allow, tokenizer_needed=False)
    model = run.model.build()
    return _model_facts(model, run.model, run.data.seq_len)
  except (OSError, InputError):  # no checkpoint yet, or a damaged folder
    return RunFacts()


def _is_whole(facts: RunFacts) -> bool:
  """Whether each value has the type of its default."""
  stored = dataclasses.asdict(facts)
  defaults = dataclasses.asdict(RunFacts())
  pairs = [*facts.versions.items()] if isinstance(facts.versions, dict) else []
  return all(
    type(stored[name]) is type(defaults[name]) for name in defaults
  ) and all(isinstance(text, str) for pair in pairs for text in pair)


def _model_facts(model: Model, options: ModelOptions, seq_len: int) -> RunFacts:
  """The facts of a model."""
  if model.reads_features:
    leaves = jax.tree.leaves(abstract_params(model))
    parameters = active = sum(leaf.size for leaf in leaves)
    units = {'loss_unit': 'per example', 'counted': 'example'}
  else:
    cost = counts.count(model, seq_len)
    parameters, active = cost.total_params, cost.active_params
    units: dict[str, Any] = {}
  try:
    models.check_generates(model)
    generates = True
  except InputError:
    generates = False
  return RunFacts(
    model=MODELS.name_of(options),
    experts=_experts(model),
    parameters=int(parameters),
    active=int(active),
    generates=generates,
    is_sparse=bool(model.sparse_layers) and not model.reads_features,
    has_blocks=bool(model.stacks),
    by_task=bool(model.task_sequences),
    **units,
  )


def _experts(model: Model) -> str:
  moes = {i: moe for i, moe in enumerate(model.moes) if moe is not None}
  if not moes:
    return ''
  expert_counts = {moe.sizes.num_retained for moe in moes.values()}
  choice_counts = {moe.num_selected for moe in moes.values()}
  layers = ', '.join(map(str, moes))
  return (
    f'{" or ".join(map(str, sorted(expert_counts)))} experts, '
    f'{" or ".join(map(str, sorted(choice_counts)))} selected, in '
    f'layer{"s" * (len(moes) > 1)} {layers}'
  )


def _versions() -> dict[str, str]:
  system = f'{platform.system()} {platform.machine()}'
  versions: dict[str, Any] = {
    'Python': f'{platform.python_version()}, {system}'
  }
  for name in _PACKAGES:
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return versions
