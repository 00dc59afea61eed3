"""Everything a run needs, built and checked before anything compiles."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import linen as nn
from jax.sharding import Mesh

from moe_jax import data, models, partitioning
from moe_jax.config import merge, to_dataclass
from moe_jax.distributed import Placing, check_same, is_first
from moe_jax.layers.initializers import axis_names
from moe_jax.models import Model
from moe_jax.models.router_state import init_router_state, moved
from moe_jax.runs import workdir as workdir_lib
from moe_jax.runs.checkpointer import Checkpointer
from moe_jax.runs.storage_errors import Retry
from moe_jax.shapes import Leaf
from moe_jax.training import checks
from moe_jax.training import step as step_lib
from moe_jax.training.evaluate import (
  Evaluation,
  Kind,
  check_entries,
  make_evaluations,
)
from moe_jax.training.losses import LossWeights
from moe_jax.training.optimizer import make_optimizer, make_schedule
from moe_jax.training.step import TrainState
from moe_jax.training_types import StepMetrics


@dataclasses.dataclass(frozen=True)
class Programs:
  """What runs on the devices.

  Attributes:
    init_state: () -> the state before the first step, sharded.
    state_of: (parameters) -> the state before the first step, with these,
      which are donated.
    abstract_state: Shapes and shardings of the state.
    train_step: (state, batch) -> (state, metrics), compiled at first use; the
      state is donated.
    put: Moves batches of numpy arrays to the devices.
    optimizer: Of the step.
  """

  init_state: Callable[[], TrainState]
  state_of: Callable[[Any], TrainState]
  abstract_state: TrainState
  train_step: Callable[[TrainState, Any], tuple[TrainState, StepMetrics]]
  put: Placing
  optimizer: optax.GradientTransformation


def _message() -> Callable[[str], None]:
  return print if is_first() else lambda text: None


@dataclasses.dataclass
class Run:
  """One run, ready to go; what hooks are given.

  Attributes:
    config: Locked, with the vocabulary's size filled in.
    given: The config as it was given, and as the workdir keeps it.
    workdir: The run's folder.
    dataset: The tokenized corpus.
    model: The training model.
    mesh: The devices.
    programs: What runs on them.
    train_step: Of `programs`; a hook may wrap it.
    evaluations: All of `config.evals`.
    checkpoints: The run's checkpoints.
    message: Prints a line, in process 0; the progress display puts itself in
      its place.
  """

  config: ml_collections.ConfigDict
  given: ml_collections.ConfigDict
  workdir: pathlib.Path
  dataset: data.Dataset
  model: Model
  mesh: Mesh
  programs: Programs
  train_step: Callable[[TrainState, Any], tuple[TrainState, StepMetrics]]
  evaluations: list[Evaluation]
  checkpoints: Checkpointer
  message: Callable[[str], None] = dataclasses.field(default_factory=_message)

  def batches(self, start: int) -> Iterator[dict[str, jax.Array]]:
    """The batches from step `start` on, on the devices."""
    put = self.programs.put
    return map(
      put.local,
      data.train_batches(
        self.dataset.splits['train'],
        batch_size=self.config.batch_size,
        seed=self.config.seed,
        start=start,
        share=put.rows,
      ),
    )


class Hook:
  """What a caller adds to a run; its methods do nothing by default."""

  def start(self, run: Run) -> None:
    """Called before the first step, after a restore."""

  def end(self, run: Run, state: TrainState) -> None:
    """Called once the last step is taken, evaluated and saved."""

  def close(self) -> None:
    """Called on the way out, also of a run that is stopped or fails."""


def set_up(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike[str],
  *,
  resume: bool = False,
  devices: Sequence[jax.Device] | None = None,
  kinds: Mapping[str, Kind] | None = None,
) -> Run:
  """Builds a `Run` and changes nothing on disk but the data cache.

  See `loop.train_and_evaluate` for what it raises.
  """
  mesh = partitioning.make_mesh(config.mesh.to_dict(), devices)
  check_entries(config, kinds or {})
  checks.check_numbers(config, mesh)
  folder = workdir_lib.check(workdir, config, resume=resume)
  data_config = to_dataclass(data.DataConfig, config.data)
  checks.check_task(config, data_config)
  dataset = data.load(data_config)
  check_same(
    {'the config': config.to_json_best_effort(), 'the data': dataset.digest}
  )
  checks.check_sample(config, dataset.tokenizer)
  filled = with_vocabulary(config, dataset.vocab_size, dataset.feature_shape)
  model = models.build(filled)
  programs = make_programs(filled, model, mesh)
  evaluations = make_evaluations(
    filled,
    model,
    dataset=dataset,
    workdir=folder,
    put=programs.put,
    kinds=kinds or {},
  )
  return Run(
    config=filled,
    given=config,
    workdir=folder,
    dataset=dataset,
    model=model,
    mesh=mesh,
    programs=programs,
    train_step=programs.train_step,
    evaluations=evaluations,
    checkpoints=Checkpointer(
      workdir_lib.checkpoints_of(folder, config),
      keep_newest=config.checkpoint.keep_newest,
      keep_best=config.checkpoint.keep_best,
      best_metric=config.checkpoint.best_eval,
      retry=Retry(config.checkpoint.tries, config.checkpoint.retry_seconds),
    ),
  )


def make_programs(
  config: ml_collections.ConfigDict, model: Model, mesh: Mesh
) -> Programs:
  """What runs on the devices, with its shardings; nothing compiles yet."""
  rules = partitioning.make_rules(config.sharding.to_dict())
  boxed = models.abstract_params(model, config.data.seq_len)
  axes, params = axis_names(boxed), nn.meta.unbox(boxed)
  optimizer = make_optimizer(config.optimizer, config.total_steps, axes)
  checks.check_rules(config.optimizer, params)
  router_state = init_router_state(model, config.data.seq_len)
  shardings = state_shardings(
    mesh, rules, params, axes, optimizer, router_state
  )
  batch_sharding = partitioning.sharding(mesh, rules, ('batch', None))
  init = functools.partial(
    step_lib.init_state,
    model=model,
    optimizer=optimizer,
    seq_len=config.data.seq_len,
  )
  init = jax.jit(init, out_shardings=shardings)
  state_of = jax.jit(
    functools.partial(
      step_lib.state_of, optimizer=optimizer, router_state=router_state
    ),
    out_shardings=shardings,
    donate_argnums=1,
  )
  seed = jnp.asarray(config.seed, jnp.uint32)
  return Programs(
    optimizer=optimizer,
    init_state=lambda: init(seed),
    state_of=functools.partial(state_of, seed),
    abstract_state=jax.tree.map(
      lambda leaf, place: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=place
      ),
      jax.eval_shape(init, seed),
      shardings,
    ),
    train_step=jax.jit(
      make_step(config, model, optimizer),
      in_shardings=(shardings, batch_sharding),
      # Every process reads the metrics.
      out_shardings=(shardings, partitioning.sharding(mesh, rules, ())),
      donate_argnums=0,
    ),
    put=Placing(batch_sharding, config.batch_size),
  )


def make_step(
  config: ml_collections.ConfigDict,
  model: Model,
  optimizer: optax.GradientTransformation,
  *,
  change: Callable[[LossWeights], LossWeights] = lambda weights: weights,
  balance_bias_rate: Leaf | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, StepMetrics]]:
  """(state, batch) -> (state, metrics), pure, not yet compiled.

  Args:
    config: The run's.
    model: Its model.
    optimizer: Its optimizer.
    change: Of the losses' weights.
    balance_bias_rate: In the place of the config's.
  """
  weights = change(loss_weights(config, model))
  step = functools.partial(
    step_lib.train_step,
    grad_fn=step_lib.make_grad_fn(model, weights, config.microbatches),
    optimizer=optimizer,
    schedule=make_schedule(config.optimizer, config.total_steps),
    move_router_state=functools.partial(
      moved, model.config, rate=balance_bias_rate
    ),
  )
  if config.max_nonfinite_steps:
    step = step_lib.skipping_nonfinite(step)
  return step


def with_vocabulary(
  config: ml_collections.ConfigDict,
  vocab_size: int,
  feature_shape: Sequence[int] = (),
) -> ml_collections.ConfigDict:
  """The config with `model.vocab_size=0` replaced by the tokenizer's size.

  So is `model.feature_shape=()`, by the data's.

  Raises:
    ValueError: The model's own vocabulary is smaller than the tokenizer's, or
      its examples are of another shape than the data's.
  """
  own, shape = tuple(config.model.feature_shape), tuple(feature_shape)
  if own and own != shape:
    raise ValueError(
      f'model.feature_shape={own} is not that of the data, {shape}'
    )
  if own != shape:
    like = type(config.model.feature_shape)  # a list where it comes from JSON
    config = merge(config, {'model': {'feature_shape': like(shape)}})
  if not config.model.vocab_size:
    return merge(config, {'model': {'vocab_size': vocab_size}})
  if config.model.vocab_size < vocab_size:
    raise ValueError(
      f'model.vocab_size={config.model.vocab_size} is smaller than the '
      f"tokenizer's {vocab_size}"
    )
  return merge(config, {})


def loss_weights(
  config: ml_collections.ConfigDict, model: Model
) -> LossWeights:
  """The coefficients of the losses."""
  moe = config.model.moe
  sparse = sum(model.config.sparse) if model.config.moe else 0
  if moe.router == 'strictly_balanced' and sparse and not moe.load_weight:
    raise ValueError(
      "moe.router='strictly_balanced' with moe.load_weight=0.0: the thresholds "
      'of its inference learn by that loss; set it above 0'
    )
  if moe.branching and sparse and moe.balance_weight:
    raise ValueError(
      f'moe.balance_weight={moe.balance_weight} with moe.branching='
      f'{moe.branching}: two levels have no balance loss; set it to 0 and use '
      'moe.importance_weight, and moe.load_weight with noisy_top_k'
    )
  estimates = moe.router in ('noisy_top_k', 'strictly_balanced')
  if moe.load_weight and not estimates and sparse:
    raise ValueError(
      f'moe.load_weight={moe.load_weight} with moe.router={moe.router!r}: only '
      "['noisy_top_k', 'strictly_balanced'] have a loss of that weight"
    )
  return LossWeights(
    balance=moe.balance_weight,
    z=moe.z_weight,
    importance=moe.importance_weight,
    load=moe.load_weight,
    logits_z=config.logits_z_weight,
    layer_reduce=moe.layer_reduce,
    num_sparse=sparse,
    encoder_layers=len(model.config.sparse) - config.model.num_layers,
  )


def state_shardings(
  mesh, rules, params, axes, optimizer, router_state
) -> TrainState:
  """Where each array of the train state lives."""
  whole = partitioning.sharding(mesh, rules, ())
  param_shardings = partitioning.tree_shardings(mesh, rules, axes, params)
  opt_state = jax.eval_shape(optimizer.init, params)
  return TrainState(
    step=whole,
    seed=whole,
    params=param_shardings,
    opt_state=partitioning.like_params(
      mesh, opt_state, params, param_shardings
    ),
    router_state=jax.tree.map(lambda _: whole, router_state),
  )
