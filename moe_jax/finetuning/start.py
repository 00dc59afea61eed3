"""Reads and converts the parameters that `config.init_from` names."""

import dataclasses
import pathlib
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import jax

from moe_jax.config import fields_of
from moe_jax.errors import InputError
from moe_jax.finetuning import optimizer_state
from moe_jax.finetuning.meaning import difference
from moe_jax.finetuning.upcycling import InitFrom, Plan, plan
from moe_jax.models import Model, ModelOptions, code_trees
from moe_jax.models.trees import abstract_router_state
from moe_jax.runs import workdir as workdir_lib
from moe_jax.shapes import PRNGKey
from moe_jax.training import trained
from moe_jax.training.setup import Run


def initial(
  run: Run, allow: Iterable[str] = ()
) -> tuple[dict[str, Any], str] | None:
  """The variables with which a run begins, made from `config.init_from`.

  Each device reads its part of the arrays of the run that `init_from` names,
  and converts the part unless the arrays are only copied.

  Args:
    run: The run.
    allow: Modules whose classes, named in that run's folder, may be imported.

  Returns:
    The variables and a line about them; None if the config names no folder. The
    variables are 'params', 'router_state' if parameters are only copied and
    both models have such a state, and 'opt_state', the optimizer's state, if
    `init_from.keep_optimizer` is set.

  Raises:
    ValueError: The folder holds no run, it has another tokenizer, or the models
      or the optimizer that is kept do not fit: all differences are listed.
    CheckpointError: No checkpoint of the folder is good.
  """
  options = cast(InitFrom, run.options.init_from)
  if not options.workdir:
    return None
  folder, source_run, source, copy_plan = _read(run, allow)
  step = None if options.step < 0 else options.step
  # Parameters that are only copied are read in this run's dtypes and shardings.
  as_is = copy_plan.copies_all
  has_state = all(abstract_router_state(m) for m in (source, run.model))
  restored = trained.restore_variables(
    folder,
    run.model if as_is else source,
    run.options.sharding.rules,
    mesh=run.mesh,
    step=trained.best_step(folder) if options.best else step,
    cast=as_is,
    router_state=as_is and has_state,
  )
  variables, optimizer = restored.state, 'the optimizer is new'
  if not as_is:
    variables = {'params': convert(run, copy_plan.apply, variables['params'])}
  if options.keep_optimizer:
    state, optimizer = optimizer_state.restore(run, folder, restored.step)
    variables = {**variables, 'opt_state': state}
  line = (
    f'beginning with the parameters of step {restored.step} of {folder}: '
    f'{copy_plan.describe()}; {optimizer}'
  )
  settings = list(changes(source_run.model, run.options.model))
  if copy_plan.upcycled:
    settings += _expert_changes(source, run.model)
  if settings:
    line += f'; WARNING: settings differ: {", ".join(settings)}'
  return variables, line


def check(run: Run, allow: Iterable[str] = ()) -> None:
  """Checks that a run can begin with the run that `config.init_from` names.

  These are the checks of `initial` that read no checkpoint. Nothing is checked
  if the config names no folder.

  Args:
    run: The run that begins.
    allow: Modules whose classes, named in the folder, may be imported.

  Raises:
    ValueError: The folder holds no run, it has another tokenizer, its kernels
      are quantised, or the models or the optimizer that is kept do not fit.
  """
  if run.options.init_from.workdir:
    _read(run, allow)


def _read(
  run: Run, allow: Iterable[str]
) -> tuple[pathlib.Path, trained.Described, Model, Plan]:
  """Reads the run that `config.init_from` names.

  Args:
    run: The run that begins with that run's parameters.
    allow: Modules whose classes, named in that run's config, may be imported.

  Returns:
    That run's folder, its options and its model, and a plan by which the
    parameters of `run` are made from that run's parameters.

  Raises:
    ValueError: The folder holds no run, its kernels are quantised, or its
      tokens, tasks or model do not fit `run`.
  """
  folder = pathlib.Path(run.options.init_from.workdir).expanduser()
  source_run = trained.read(folder, allow)
  if code_trees.has_codes(source_run.model):
    raise InputError(
      f'init_from.workdir={folder}: its kernels are in codes of few bits, '
      'which are not trained; begin with the run that they were made of'
    )
  data, tokenizer = run.options.data, run.dataset.tokenizer
  for problem in source_run.data_problems(data, tokenizer):
    raise InputError(f'init_from.workdir={folder}: {problem}')
  source = source_run.model.build(run.options.sharding.rules)
  return folder, source_run, source, _plan(run, source, folder)


def _plan(run: Run, source: Model, folder: pathlib.Path) -> Plan:
  """The plan by which a run's parameters are made from those of `source`.

  `folder` holds the run whose model is `source`. ValueError is raised if the
  models, or an optimizer that is to be kept, do not fit.
  """
  options = cast(InitFrom, run.options.init_from)
  try:
    copy_plan = plan(run.model, source, options)
  except InputError as error:
    message = f'init_from.workdir={folder}: {error}'
    own = run.options
    small = dataclasses.replace(own, model=own.model.shrunk())
    if own == small.filled(run.dataset.vocab_size):
      message += (
        "\nThis model is as small as ':runlocal' behind a config's name makes "
        'it: leave that out, or train the other run with it, too'
      )
    raise InputError(message + _own_model(folder)) from None
  if options.keep_optimizer and not copy_plan.copies_all:
    raise InputError(
      'init_from.keep_optimizer=True: the parameters are converted, '
      f'{copy_plan.describe()}, and the state of the optimizer cannot be'
    )
  return copy_plan


def _own_model(folder: pathlib.Path) -> str:
  """A line, for errors, on how to train the model of the run in `folder` on.

  The line is '' if the folder has no config file.
  """
  path = folder / workdir_lib.CONFIG_PY
  if not path.exists():
    return ''
  return (
    "\nFor the other run's own model, begin with its config: "
    f'--config={shlex.quote(str(path))} '
    f'--config.init_from.workdir={shlex.quote(str(folder))}'
  )


def convert(
  run: Run,
  apply: Callable[[Mapping[str, Any], PRNGKey], dict[str, Any]],
  params: Mapping[str, Any],
) -> dict[str, Any]:
  """Makes the run's parameters from another run's, each device its own part.

  Args:
    run: The run, whose seed gives the key for `apply`.
    apply: A pure function from the other run's parameters and a key to all
      parameters of the run's model, without adapters.
    params: The parameters of the other run.
  """
  shardings = jax.tree.map(
    lambda leaf: leaf.sharding,
    run.programs.adapters.base(run.programs.abstract_state.params),
  )
  return jax.jit(apply, out_shardings=shardings)(
    params, jax.random.key(run.options.seed)
  )


def changes(old: ModelOptions, new: ModelOptions) -> Iterator[str]:
  """Lines on differences, outside of sparse layers, in what models compute."""
  for name, (old_value, new_value) in difference(old, new).items():
    if name.removeprefix('encoder.').split('.')[0] not in ('moe', 'sparse'):
      yield f'model.{name} {old_value!r} -> {new_value!r}'


def _expert_changes(source: Model, model: Model) -> Iterator[str]:
  """Lines on options in which experts differ from the dense layer they copy."""
  dense = source.stacks.blocks[-1].block.ffn
  expert = model.stacks.mixtures[-1].expert
  for name in fields_of(type(dense)):
    old, new = getattr(dense, name), getattr(expert, name, None)
    if new not in (None, old):
      yield f'model.moe.expert.{name} {old!r} -> {new!r}'
