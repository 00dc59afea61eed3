"""Reads the folder of a trained run, and makes one from given parameters.

Generation, evaluation and export read the options, the tokenizer and the
parameters of a run. Imports, and commands that make a new model from a run,
write the folder of a run that begins with these parameters.
"""

import hashlib
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax import data as data_lib
from moe_jax import partitioning
from moe_jax.config import Section, overridden, read_options, section_of
from moe_jax.data import DataOptions, Dataset, tokenizers
from moe_jax.data.cache_folders import whole_folder
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.errors import InputError
from moe_jax.layers.routers.contract import ROUTER_STATE
from moe_jax.models import MODELS, Model, ModelOptions, trees
from moe_jax.models.lora import Adapters, LoraOptions, adapt
from moe_jax.partitioning import Rules, ShardingOptions
from moe_jax.runs import manifest
from moe_jax.runs import workdir as workdir_lib
from moe_jax.runs.checkpointer import Checkpointer, Restored
from moe_jax.runs.retention import CheckpointOptions, Directory
from moe_jax.runs.storage_errors import describe as describe_error
from moe_jax.runs.workdir import CONFIG, IMPORTED, TOKENIZER, kept_config
from moe_jax.training import averages, trainable

_FIRST_SAVE = (
  'a run writes the first one after checkpoint.every_steps steps, when it is '
  'stopped, and at its end'
)


class Described(NamedTuple):
  """Options and tokenizer of a run, from its folder.

  Attributes:
    model: The options of the model, with the sizes that the data decides.
    data: The options of the data, with the run's own tokenizer.
    sharding: The options of how arrays are split over a mesh.
    batch_size: Number of rows in a batch of training.
    tokenizer: The tokenizer; None where the folder has none and none is needed.
    microbatches: Number of slices of a batch of training.
  """

  model: ModelOptions
  data: DataOptions
  sharding: ShardingOptions
  batch_size: int
  tokenizer: Tokenizer | None
  microbatches: int = 1

  def data_problems(
    self, data: DataOptions, tokenizer: Tokenizer
  ) -> Iterator[str]:
    """Yields the ways in which data has other token ids or tasks than the run.

    A run without a tokenizer fits data of any tokens. Task i of a batch is
    source i of `data.mixture`, which matters to models that route by task.

    Args:
      data: The options of the data.
      tokenizer: The tokenizer of the data, whose ids may include those that a
        task added, such as an EOS.
    """
    own = self.tokenizer and self.tokenizer.ids_identity
    ids = tokenizer.ids_identity
    if own not in (None, ids):
      yield (
        f'it was trained on tokens of {own}, the data is of {ids}; to take its '
        "tokenizer for other texts, give data.tokenizer.kind='file' and its "
        'folder as data.tokenizer.file.path'
      )
    if self.model.routes_by_task and self.data.tasks != data.tasks:
      yield (
        f'it routes by the tasks {list(self.data.tasks)}, and the data has '
        f'{list(data.tasks)}; give data.mixture the same sources, those that '
        'are not learned from in data.mixture.held_out'
      )

  def load_data(
    self, workdir: str | os.PathLike[str], options: DataOptions | None = None
  ) -> Dataset:
    """Loads data whose tokens and tasks are those that the run knows.

    Args:
      workdir: The run's folder, for messages.
      options: The options of the data; None takes those of the run.

    Raises:
      ValueError: The data has other tokens or tasks than the run.
    """
    options = options or self.data
    dataset = data_lib.load(options)
    for problem in self.data_problems(options, dataset.tokenizer):
      raise InputError(f'{workdir} does not fit the data: {problem}')
    return dataset


def read(
  workdir: str | os.PathLike[str],
  allow: Iterable[str] = (),
  *,
  tokenizer_needed: bool = True,
) -> Described:
  """Reads a run's options and tokenizer.

  Args:
    workdir: The run's folder.
    allow: Modules whose classes may be imported where the folder names them.
    tokenizer_needed: Whether a folder without a tokenizer is refused.

  Raises:
    ValueError: The folder holds no run, something in it cannot be read, its
      config was edited, or it names a class of a module that is not allowed.
  """
  folder = workdir_lib.folder_of(workdir)
  if not (folder / CONFIG).exists():
    reason = f'it has no {CONFIG}'
    if not folder.exists():
      reason = 'there is no such folder; give a --workdir of a training run'
    raise InputError(f'{folder} holds no trained run: {reason}')
  has_tokenizer = (folder / TOKENIZER).exists()
  if tokenizer_needed and not has_tokenizer:
    raise InputError(
      f'{folder} holds no trained run: it has no {TOKENIZER}; if a checkpoint '
      'without one was imported, train it there first, or import it again, '
      'with its own tokenizer: --config.data.tokenizer.kind=file '
      '--config.data.tokenizer.file.path=TOKENIZER'
    )
  checkpoints = workdir_lib.checkpoints_of(folder)
  try:
    has_checkpoints = checkpoints.exists()
  except Exception as error:  # a URL of a file system that is not installed
    raise InputError(f'{checkpoints}: {describe_error(error)}') from None
  if not has_checkpoints:
    raise InputError(
      f'{folder} holds no trained run: no {checkpoints.name}; {_FIRST_SAVE}'
    )
  config = kept_config(folder)
  stored = {key: config.get(key, {}) for key in ('model', 'data', 'sharding')}
  workdir_lib.check_allowed(workdir_lib.classes_in(stored), allow)
  data = _section_of(folder, 'data', DataOptions)
  model = _section_of(folder, 'model', MODELS)
  sharding = _section_of(folder, 'sharding', ShardingOptions)
  batch_size = config.get('batch_size')
  if type(batch_size) is not int or batch_size < 1:
    raise InputError(
      f'{folder / CONFIG} cannot be read: batch_size={batch_size!r:.60} is not '
      'a number of rows'
    )
  workdir_lib.check_unedited(folder)
  # A user's own class of tokenizers is known once its module is imported.
  tokenizer, vocab_size = None, 0
  if has_tokenizer:
    tokenizer = tokenizers.load(folder / TOKENIZER)
    vocab_size = tokenizer.vocab_size
    data = data.with_tokenizer(tokenizer)
  model = model.filled(vocab_size, data.seq_len, len(data.tasks))
  slices = config.get('microbatches', 1)
  return Described(model, data, sharding, batch_size, tokenizer, slices)


class Loaded(NamedTuple):
  """A run with the variables of a checkpoint.

  Attributes:
    folder: The run's folder.
    options: The run's options, and its tokenizer if it has one.
    model: The run's model.
    variables: The variables that `model.apply` takes: 'params', with the run's
      adapters merged into the kernels, and 'router_state' where the model has
      it.
    step: The optimizer step of the checkpoint that was read.
    skipped: Newer checkpoints that were not good, each with the reason.
  """

  folder: pathlib.Path
  options: Described
  model: Model
  variables: dict[str, Any]
  step: int
  skipped: Sequence[tuple[int, str]] = ()

  @property
  def tokenizer(self) -> Tokenizer:
    """The run's tokenizer; None if it has none, and `load` needed none."""
    return cast(Tokenizer, self.options.tokenizer)


def load(
  workdir: str | os.PathLike[str],
  step: int | None = None,
  *,
  dtype: str = '',
  mesh: Mesh | None = None,
  allow: Iterable[str] = (),
  tokenizer_needed: bool = True,
) -> Loaded:
  """Reads a run, trained or imported, with the variables of a checkpoint.

  Each device reads its own part of the parameters and of the routers' state.

  Args:
    workdir: The run's folder.
    step: The optimizer step of the checkpoint; None is the newest good one.
    dtype: The dtype of parameters and products, 'float32' or 'bfloat16'; '' is
      the run's own. Routers stay float32.
    mesh: The devices of the parameters, which are split by the run's own
      sharding table; None is the first local device.
    allow: Modules whose classes, named in the run's config, may be imported.
    tokenizer_needed: Whether a folder without a tokenizer is refused.

  Raises:
    ValueError: The folder lacks something, or its files do not fit together.
    CheckpointError: No checkpoint is good.
  """
  options = read(workdir, allow, tokenizer_needed=tokenizer_needed)
  if dtype:
    changes = {'numerics': {'dtype': dtype, 'param_dtype': dtype}}
    changed = overridden(MODELS, options.model, changes, 'model.')
    options = options._replace(model=changed)
  rules = options.sharding.rules
  model = options.model.build(rules)
  restored = restore_variables(
    workdir, model, rules, mesh=mesh, step=step, cast=bool(dtype)
  )
  folder = pathlib.Path(workdir).expanduser()
  step, skipped = restored.step, restored.skipped
  return Loaded(folder, options, model, restored.state, step, skipped)


def best_step(workdir: str | os.PathLike[str]) -> int:
  """The step of a run's best checkpoint, by its own `checkpoint.best_eval`.

  Raises:
    ValueError: There is no best checkpoint, or the config cannot be read.
  """
  folder = workdir_lib.folder_of(workdir)
  options = _section_of(folder, 'checkpoint', CheckpointOptions)
  directory = Directory(workdir_lib.checkpoints_of(folder), options)
  if (step := directory.best_step()) is None:
    raise InputError(
      f'{folder} has no best checkpoint: none of the steps '
      f'{directory.steps()} has the number {options.best_name!r}'
    )
  return step


def checkpoint_digest(workdir: str | os.PathLike[str], step: int) -> str:
  """The sha256, in hex, of a checkpoint's manifest, which covers all its files.

  Raises:
    ValueError: There is no such checkpoint.
  """
  checkpoints = workdir_lib.checkpoints_of(workdir_lib.folder_of(workdir))
  path = checkpoints / str(step) / manifest.NAME
  if not path.exists():
    raise InputError(f'{checkpoints} has no checkpoint of step {step}')
  return hashlib.sha256(path.read_bytes()).hexdigest()


def adapters_of(workdir: str | os.PathLike[str], model: Model) -> Adapters:
  """The adapters of a run whose model is `model`, from its folder's config.

  Raises:
    ValueError: The config cannot be read, or does not fit the model.
  """
  options = _section_of(pathlib.Path(workdir).expanduser(), 'lora', LoraOptions)
  return adapt(options, trees.describe(model))


def _section_of(folder: pathlib.Path, name: str, root: Any) -> Any:
  try:
    return read_options(root, kept_config(folder).get(name, {}), f'{name}.')
  except (InputError, KeyError, TypeError, AttributeError) as error:
    raise InputError(
      f'{folder / CONFIG} cannot be read: {error}; {workdir_lib.OLDER}'
    ) from None


def restore_variables(
  workdir: str | os.PathLike[str],
  model: Model,
  rules: Rules,
  *,
  adapters: Adapters | None = None,
  mesh: Mesh | None = None,
  step: int | None = None,
  cast: bool = False,
  router_state: bool = True,
) -> Restored:
  """Reads the variables of a run, as a model's `apply` takes them.

  The variables are the `state` of the result: 'params', which are the running
  means if the run keeps them, with the run's adapters merged into the kernels,
  and 'router_state' where the model has it. The optimizer's state is not read.
  The checkpoint's files are verified first.

  Args:
    workdir: The run's folder.
    model: A model with these parameters, which decides their dtypes.
    rules: The sharding table: the mesh axes that split each logical axis.
    adapters: The adapters of the run, if their factors shall not be merged into
      the kernels; None merges them. A checkpoint of step 0 has no factors.
    mesh: Any mesh; a dimension that its axes do not divide is not split. None
      means the first local device.
    step: The step of the checkpoint; None is the newest good one.
    cast: Whether arrays may have been saved in another floating-point type, and
      are then converted to the model's.
    router_state: Whether 'router_state' is read, too.

  Raises:
    ValueError: There is no checkpoint, or it is of another model.
    CheckpointError: No checkpoint is good.
  """
  folder, merges = pathlib.Path(workdir).expanduser(), adapters is None
  adapters = adapters or adapters_of(workdir, model)
  if mesh is None:
    mesh = partitioning.make_mesh(dict(data=1), jax.local_devices()[:1])
  shapes, axes, _ = adapters.trees
  abstract = jax.tree.map(
    lambda leaf, sharding: leaf.update(sharding=sharding),
    shapes,
    partitioning.tree_shardings(mesh, rules, axes, shapes, uneven=True),
  )
  whole = partitioning.sharding(mesh, rules, ())
  states = trees.abstract_router_state(model) if router_state else {}
  routers = jax.tree.map(lambda leaf: leaf.update(sharding=whole), states)
  config, means = kept_config(folder), {}
  if config.get('optimizer', {}).get('ema', 0):
    part = trainable.trained_by(adapters, config['trainable']).part(abstract)
    mean = jax.tree.map(lambda p: p.update(dtype=jnp.float32), part)
    steps = jax.ShapeDtypeStruct((), jnp.int32)
    means = {'averages': averages.Averages(steps, mean)}
  directory = workdir_lib.checkpoints_of(folder)
  with Checkpointer(directory) as checkpoints:
    restored = checkpoints.restore(
      trees.variables(abstract, routers) | means,
      step=step,
      partial=True,
      cast=cast,
      first=trees.variables(adapters.base(abstract), routers),
    )
  if restored is None:
    raise InputError(f'{directory} has no finished checkpoint; {_FIRST_SAVE}')
  saved = restored.state
  params = averages.averaged(saved['params'], saved.get('averages'))
  if merges and restored.step:
    params = adapters.merged_on_devices(params)
  # A run may begin without the state of its routers.
  if routers:
    routers = saved.get(ROUTER_STATE) or trees.init_router_state(model)
  return restored._replace(state=trees.variables(params, routers))


def write(
  folder: pathlib.Path,
  config: Section,
  variables: Mapping[str, Any],
  extra: dict[str, Any] | None = None,
) -> None:
  """Writes the folder of a run that begins with given variables.

  The folder gets the config, and a checkpoint of step 0 with only parameters
  (and a balancing bias where the model keeps one). The tokenizer's file is
  written by the caller.

  Args:
    folder: The folder, which the caller renames once it is complete.
    config: The config of the run.
    variables: 'params' of the run's model, and 'router_state' if it has one.
    extra: JSON values to save with the checkpoint, such as where it came from.
  """
  with Checkpointer(folder / workdir_lib.CHECKPOINTS) as saver:
    saver.save(0, dict(variables), extra=extra)
  workdir_lib.claim(folder, config)


def derive(
  base: str | os.PathLike[str],
  output: str | os.PathLike[str],
  params: Any,
  changes: Mapping[str, Any] | None = None,
  *,
  router_state: Mapping[str, Any] | None = None,
  tokenizer: pathlib.Path | None = None,
) -> pathlib.Path:
  """Makes a new run's folder from a base run's folder and new parameters.

  The new config is that of the base run, without `checkpoint.directory` and the
  sections `lora`, `init_from` and `distill`. Tokenizer and imported files are
  copied; where the base run took its tokenizer from the run that its
  `init_from` names, the new config names the copied tokenizer.

  Args:
    base: Folder of the base run.
    output: A folder that is new or empty.
    params: The parameters of the new model.
    changes: Sections of the config that replace those of the base, by name.
    router_state: The state of the model's routers; None or empty where they
      keep none.
    tokenizer: The `TOKENIZER` file of another run; None takes the base's.

  Returns:
    The new folder.

  Raises:
    ValueError: `output` is neither new nor empty.
  """
  base = pathlib.Path(base).expanduser().resolve()
  output = pathlib.Path(output).expanduser().resolve()
  config = kept_config(base) | dict(changes or {})
  # A base run that began from another run may have used that run's tokenizer,
  # not its own `data.tokenizer`; the new config has no `init_from` to say so.
  begin = config.get('init_from', {})
  takes_tokenizer = begin.get('workdir') and begin.get('keep_tokenizer', True)
  if takes_tokenizer and (base / TOKENIZER).exists():
    kept = tokenizers.FileOptions(str(output / TOKENIZER))
    section = section_of(kept, tokenizers.TOKENIZERS).to_dict()
    config['data'] = {**config.get('data', {}), 'tokenizer': section}
  for name in ('lora', 'init_from', 'distill'):
    config.pop(name, None)
  config.get('checkpoint', {}).pop('directory', None)
  for name in (IMPORTED, TOKENIZER):
    config = _with_folder(config, str(base / name), str(output / name))
  with whole_folder(output) as unfinished:
    for path in (tokenizer or base / TOKENIZER, base / workdir_lib.PLUGINS):
      if path.exists():
        shutil.copyfile(path, unfinished / path.name)
    if (imported := base / IMPORTED).is_dir():
      shutil.copytree(imported, unfinished / imported.name)
    write(unfinished, config, trees.variables(params, router_state))
  return output


def _with_folder(values: Any, old: str, new: str) -> Any:
  """A config's nested values, with the path `new` in place of `old`."""
  if isinstance(values, Mapping):
    return {key: _with_folder(value, old, new) for key, value in values.items()}
  return new if values == old else values
