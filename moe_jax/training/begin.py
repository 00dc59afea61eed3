"""First state of a run: from a checkpoint, given parameters, or its seed."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import multihost_utils

from moe_jax.devices import is_first
from moe_jax.errors import InputError
from moe_jax.layers.routers.contract import ROUTER_STATE
from moe_jax.models.trees import variables as as_variables
from moe_jax.runs import workdir as workdir_lib
from moe_jax.training import averages
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

# The name under which a checkpoint has the sha256 of the masks of the experts
# that train.
EXPERTS = 'trained_experts'
# The name under which a checkpoint has the index of the first row of data that
# no step has seen.
NEXT_ROW = 'next_row'
# The name under which a checkpoint has the number of rows of an epoch.
NUM_ROWS = 'num_rows'
# The name under which a checkpoint has the names of the evaluations of its step
# that are still to be made.
DUE = 'due_evaluations'
# A function that gives the variables with which a run begins (parameters, and
# `router_state` and `opt_state` unless they begin anew), sharded, and a line
# about them; or None, if the run draws its parameters from its seed.
Initial = Callable[[Run], tuple[dict[str, Any], str] | None]


def begin(
  run: Run, initial: Initial | None = None
) -> tuple[Run, TrainState, list[str]]:
  """Begins a run, or goes on from its newest checkpoint; prints which.

  A checkpoint of step 0 holds only parameters, such as those of an imported
  model, and perhaps the state of its routers: the optimizer starts anew. The
  config is written to the workdir only after all checks, so that a run that is
  refused changes nothing.

  Args:
    run: The run, as `set_up` made it.
    initial: Gives the parameters where there is no checkpoint.

  Returns:
    The run, with the rows of data that its next steps take; its state; and the
    names of the evaluations of that state that are still to be made.

  Raises:
    ValueError: The checkpoint was made on other data, with other tokens, for
      another model, or after the last step; or `initial` raises it.
    CheckpointError: There are checkpoints and none is good.
  """
  steps, decay = run.checkpoints.steps(), run.options.optimizer.ema
  config = workdir_lib.kept_config(run.workdir) if any(steps) else {}
  if any(steps) and (problem := averages.change_problem(config, decay)):
    raise InputError(problem)
  abstract = run.programs.abstract_state
  base = run.programs.adapters.base(abstract.params)
  restored = run.checkpoints.restore(
    abstract, first=as_variables(base, abstract.router_state)
  )
  if restored is not None and restored.step:
    digest = restored.extra.get('data_digest')
    if digest != run.dataset.digest:
      raise InputError(
        f'{run.workdir} was trained on data of sha256 {digest}, this is '
        f'{run.dataset.digest}; results of two corpora must not mix'
      )
    if problem := end_problem(run, restored.step):
      raise InputError(problem)
  if restored is not None:
    workdir_lib.check_kept_ids(run.workdir, run.dataset.tokenizer)
  first = None
  if restored is None and initial is not None:
    first = initial(run)
  elif restored is None and (folder := run.options.init_from.workdir):
    raise InputError(
      f'init_from.workdir={folder!r} and nobody to read it; pass '
      'initial=moe_jax.finetuning.initial'
    )
  elif restored is not None and not restored.step:
    note = 'beginning with the parameters of the checkpoint of step 0'
    first = restored.state, note
  if is_first():
    workdir_lib.claim(run.workdir, run.config)
    workdir_lib.record_plugins(run.workdir, run.config)
    run.dataset.tokenizer.save(run.workdir / workdir_lib.TOKENIZER)
  multihost_utils.sync_global_devices('the workdir')
  for step, reason in restored.skipped if restored else ():
    run.message(f'passed over the checkpoint of step {step}: {reason}')
  if first is not None:
    variables, note = first
    run.message(note)
    state = run.programs.state_of(variables['params'])
    state = state.replace(
      router_state=variables.get(ROUTER_STATE, state.router_state),
      opt_state=variables.get('opt_state', state.opt_state),
    )
    return run, state, []
  if restored is None:
    return run, run.programs.init_state(), []
  run.message(f'going on from the checkpoint of step {restored.step}')
  run.early_stopping.restore(restored.extra)
  earlier_rows = restored.step * run.options.batch_size
  next_row = restored.extra.get(NEXT_ROW, earlier_rows)
  num_rows = len(run.dataset.splits['train'])
  earlier_num_rows = restored.extra.get(NUM_ROWS, num_rows)
  if num_rows != earlier_num_rows:  # data.seq_len has changed, or the task
    next_row = next_row * num_rows // earlier_num_rows
    run.message(
      f'the data has {num_rows:,} rows, {earlier_num_rows:,} before: the run '
      f'goes on with row {next_row:,}, at the same share of the data; as rows '
      f'are shuffled, {next_row % num_rows / num_rows:.0%} of the rest of this '
      'epoch was read before'
    )
  if restored.extra.get(EXPERTS, '') != run.programs.trained.masks_digest:
    run.message('WARNING: other experts train than before that checkpoint')
  # The seed is the config's: another seed changes the order of the data, too.
  seed = jnp.full_like(restored.state.seed, run.options.seed)
  run = dataclasses.replace(run, row_offset=next_row - earlier_rows)
  return run, restored.state.replace(seed=seed), restored.extra.get(DUE, [])


def end_problem(run: Run, step: int) -> str | None:
  """The problem of a checkpoint of a step beyond the run's `total_steps`."""
  total = run.options.total_steps
  if step <= total:
    return None
  return (
    f'{run.workdir} has a checkpoint of step {step}, and total_steps={total}: '
    'give at least as many steps, or another --workdir'
  )
