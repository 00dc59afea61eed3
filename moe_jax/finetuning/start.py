"""The parameters that `config.init_from` names, read and converted.

Not here: which become which (`upcycling.py`).
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax

from moe_jax import models
from moe_jax.config import flatten, to_dataclass
from moe_jax.finetuning.matching import plan
from moe_jax.finetuning.upcycling import Copies, Plan
from moe_jax.models.router_state import abstract_router_state
from moe_jax.runs import workdir as workdir_lib
from moe_jax.training.setup import Run

# What changes a model's function and no parameter's shape.
_SETTINGS = (
  'activation', 'attention_scale', 'embedding_scale', 'logits_scale', 'norm',
  'norm_epsilon', 'position_offset', 'positions', 'relative_max_distance',
  'rope_theta', 'sliding_window',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class InitFrom:
  """The section `config.init_from`.

  Attributes:
    workdir: Of the other run; '': none.
    step: Of its checkpoint; -1: the newest good one.
    experts: The source of each expert, comma-separated.
    router_std, expert_noise, router_noise: See `Copies`.
  """

  workdir: str = ''
  step: int = -1
  experts: str = ''
  router_std: float = 0.0
  expert_noise: float = 0.0
  router_noise: float = 0.0

  @property
  def copies(self) -> Copies:
    """How experts are copied; ValueError where the text is no numbers."""
    numbers = [part.strip() for part in self.experts.split(',') if part.strip()]
    if not all(number.isdigit() for number in numbers):
      raise ValueError(
        f"init_from.experts={self.experts!r} is no list of numbers, '0,1,0,1'"
      )
    return Copies(
      experts=tuple(map(int, numbers)),
      router_std=self.router_std,
      expert_noise=self.expert_noise,
      router_noise=self.router_noise,
    )


def initial(run: Run) -> tuple[dict[str, Any], str] | None:
  """What a run begins with that `config.init_from` gives a source.

  The source is read in its shards, and converted where it is; where nothing
  changes, it is read into its place.

  Returns:
    The variables and what to say of them; None without a source. What routers
    keep is among them where nothing changes and both models keep it.

  Raises:
    ValueError: The folder holds no run, its tokenizer is another, or the models
      do not fit: all differences are listed.
    CheckpointError: No checkpoint of it is good.
  """
  section = to_dataclass(InitFrom, run.config.init_from)
  if not section.workdir:
    return None
  folder = pathlib.Path(section.workdir).expanduser()
  config, tokenizer = workdir_lib.read(folder)
  theirs, ours = tokenizer.identity, run.dataset.tokenizer.identity
  if theirs != ours:
    raise ValueError(
      f'{folder} was trained on tokens of {theirs}, this run is on those of '
      f'{ours}'
    )
  source = models.build(config)
  try:
    found = plan(run.model, source, section.copies)
  except ValueError as error:
    raise ValueError(f'init_from.workdir={folder}: {error}') from None
  as_is = found.copies_all
  has_state = all(abstract_router_state(m, 1) for m in (source, run.model))
  restored = workdir_lib.restore_variables(
    folder,
    run.model if as_is else source,
    run.config if as_is else _with_sharding(config, run),
    mesh=run.mesh,
    step=None if section.step < 0 else section.step,
    cast=as_is,
    router_state=as_is and has_state,
  )
  begun = restored.state
  if not as_is:
    begun = {'params': _convert(run, found, begun['params'])}
  said = (
    f'beginning with the parameters of step {restored.step} of {folder}: '
    f'{found.describe()}; the optimizer is new'
  )
  if changes := _changes(config, run.config, found):
    said += f'; WARNING: settings differ: {", ".join(changes)}'
  return begun, said


def _convert(run: Run, found: Plan, params) -> Any:
  places = jax.tree.map(
    lambda leaf: leaf.sharding, run.programs.abstract_state.params
  )
  apply = functools.partial(found.apply, seq_len=run.config.data.seq_len)
  return jax.jit(apply, out_shardings=places)(
    params, jax.random.key(run.config.seed)
  )


def _with_sharding(config, run: Run):
  """The source's config with the run's sharding table."""
  config = config.copy_and_resolve_references().unlock()
  config.sharding = run.config.sharding
  return config.lock()


def _changes(theirs, ours, found: Plan) -> list[str]:
  """Settings that make copied parameters compute something else."""
  old, new = flatten(theirs.model), flatten(ours.model)
  if found.upcycled and ours.model.moe.activation:
    new['activation'] = ours.model.moe.activation
  return [
    f'model.{name} {old.get(name)!r} -> {new.get(name)!r}'
    for name in _SETTINGS
    if old.get(name) != new.get(name)
  ]
