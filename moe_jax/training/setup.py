"""Everything a run needs, built and checked before anything compiles."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from moe_jax import data, models, partitioning
from moe_jax.config import merge, to_dataclass
from moe_jax.layers.initializers import axis_names
from moe_jax.models import Decoder
from moe_jax.training import step as step_lib
from moe_jax.training import workdir as workdir_lib
from moe_jax.training.checkpoint import Checkpointer
from moe_jax.training.evaluate import Evaluation, Evaluator, make_evaluations
from moe_jax.training.losses import LossSums, LossWeights
from moe_jax.training.optimizer import make_optimizer, make_schedule
from moe_jax.training.step import StepMetrics, TrainState


@dataclasses.dataclass
class Run:
  """One run, ready to go; what hooks are given.

  Attributes:
    config: Locked, with the vocabulary's size filled in.
    workdir: The run's folder.
    dataset: The tokenized corpus.
    model: The training model.
    mesh: The devices.
    init_state: () -> the state before the first step, sharded.
    abstract_state: Shapes and shardings of the state.
    train_step: (state, batch) -> (state, metrics), compiled at first use; the
      state is donated.
    batches: (steps taken) -> the batches from there on, on devices.
    evaluations: All of `config.evals`.
    evaluate: (evaluations, params) -> sums by name.
    checkpoints: The run's checkpoints.
    message: Prints a line; the progress display puts itself in its place.
  """

  config: ml_collections.ConfigDict
  workdir: pathlib.Path
  dataset: data.Dataset
  model: Decoder
  mesh: Mesh
  init_state: Callable[[], TrainState]
  abstract_state: TrainState
  train_step: Callable[[TrainState, Any], tuple[TrainState, StepMetrics]]
  batches: Callable[[int], Iterator[dict[str, jax.Array]]]
  evaluations: list[Evaluation]
  evaluate: Callable[[Sequence[Evaluation], Any], dict[str, LossSums]]
  checkpoints: Checkpointer
  message: Callable[[str], None] = print


class Hook:
  """What a caller adds to a run; both methods do nothing by default."""

  def start(self, run: Run) -> None:
    """Called before the first step, after a restore."""

  def end(self, run: Run, state: TrainState) -> None:
    """Called once the last step is taken, evaluated and saved."""


def set_up(
  config: ml_collections.ConfigDict,
  workdir: str | os.PathLike[str],
  *,
  resume: bool = False,
  devices: Sequence[jax.Device] | None = None,
) -> Run:
  """Builds a `Run`. See `loop.train_and_evaluate` for what it raises."""
  given = config
  mesh = partitioning.make_mesh(config.mesh.to_dict(), devices)
  check_batch(config, mesh)
  dataset = data.load(to_dataclass(data.DataConfig, config.data))
  config = with_vocabulary(config, dataset.tokenizer.vocab_size)
  model = models.build(config)
  evaluations = make_evaluations(config, model)
  _check_best(config)
  weights = loss_weights(config, model)
  rules = partitioning.make_rules(config.sharding.to_dict())
  boxed = models.abstract_params(model, config.data.seq_len)
  axes = axis_names(boxed)
  params = nn.meta.unbox(boxed)
  optimizer = make_optimizer(config.optimizer, config.total_steps, axes)
  shardings = state_shardings(mesh, rules, params, axes, optimizer)
  init = functools.partial(
    step_lib.init_state,
    model=model,
    optimizer=optimizer,
    seq_len=config.data.seq_len,
  )
  init = jax.jit(init, out_shardings=shardings)
  seed = jnp.asarray(config.seed, jnp.uint32)
  abstract = jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=place
    ),
    jax.eval_shape(init, seed),
    shardings,
  )
  batch_sharding = partitioning.sharding(mesh, rules, ('batch', None))
  put = functools.partial(_put, batch_sharding)
  step = functools.partial(
    step_lib.train_step,
    grad_fn=step_lib.make_grad_fn(model, weights, config.microbatches),
    optimizer=optimizer,
    schedule=make_schedule(config.optimizer, config.total_steps),
  )
  folder = workdir_lib.claim(workdir, given, resume=resume)
  dataset.tokenizer.save(folder / workdir_lib.TOKENIZER)
  return Run(
    config=config,
    workdir=folder,
    dataset=dataset,
    model=model,
    mesh=mesh,
    init_state=lambda: init(seed),
    abstract_state=abstract,
    train_step=jax.jit(
      step,
      in_shardings=(shardings, batch_sharding),
      out_shardings=(shardings, None),
      donate_argnums=0,
    ),
    batches=functools.partial(_batches, config, dataset, put),
    evaluations=evaluations,
    evaluate=Evaluator(dataset.splits['validation'], config.batch_size, put),
    checkpoints=Checkpointer(
      folder / workdir_lib.CHECKPOINTS,
      keep_newest=config.checkpoint.keep_newest,
      keep_best=config.checkpoint.keep_best,
      best_metric=config.checkpoint.best_eval,
    ),
  )


def restore_or_init(run: Run) -> TrainState:
  """The newest good checkpoint's state, said in one line, or the first.

  Raises:
    ValueError: The checkpoint was made on other data, or for another model.
    CheckpointError: There are checkpoints and none is good.
  """
  restored = run.checkpoints.restore(run.abstract_state)
  if restored is None:
    return run.init_state()
  digest = restored.extra.get('data_digest')
  if digest != run.dataset.digest:
    raise ValueError(
      f'{run.workdir} was trained on data of sha256 {digest}, this is '
      f'{run.dataset.digest}; results of two corpora must not mix'
    )
  for step, reason in restored.skipped:
    run.message(f'passed over the checkpoint of step {step}: {reason}')
  run.message(f'going on from the checkpoint of step {restored.step}')
  return restored.state


def with_vocabulary(
  config: ml_collections.ConfigDict, vocab_size: int
) -> ml_collections.ConfigDict:
  """The config with `model.vocab_size=0` replaced by the tokenizer's size.

  Raises:
    ValueError: The model's own vocabulary is smaller than the tokenizer's.
  """
  if not config.model.vocab_size:
    return merge(config, {'model': {'vocab_size': vocab_size}})
  if config.model.vocab_size < vocab_size:
    raise ValueError(
      f'model.vocab_size={config.model.vocab_size} is smaller than the '
      f"tokenizer's {vocab_size}"
    )
  return merge(config, {})


def check_batch(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
  """Raises ValueError where the batch does not split as the config asks."""
  B, n, T = config.batch_size, config.microbatches, config.data.seq_len
  if not 0 <= config.seed < 2**32:
    raise ValueError(f'seed={config.seed} not in [0, 2**32)')
  for name in ('total_steps', 'batch_size', 'microbatches', 'log_every_steps'):
    if config[name] < 1:
      raise ValueError(f'{name}={config[name]} must be at least 1')
  if T < 1:
    raise ValueError(f'data.seq_len={T} must be at least 1')
  rules = partitioning.make_rules(config.sharding.to_dict())
  parts = int(np.prod([mesh.shape[axis] for axis in rules['batch']]))
  if B % n:
    raise ValueError(f'batch_size={B} does not divide by microbatches={n}')
  if B // n % parts:
    raise ValueError(
      f'batch_size={B} in microbatches={n} leaves {B // n} sequences, which do '
      f'not divide by {parts} devices of mesh axes {rules["batch"]}'
    )
  S = config.model.moe.group_size
  if config.model.moe.num_experts and S and B // n * T % S:
    raise ValueError(
      f'moe.group_size={S} does not divide the {B // n * T} tokens of a '
      f'microbatch (batch_size={B} / microbatches={n} * seq_len={T}): a group '
      'never spans two'
    )


def loss_weights(
  config: ml_collections.ConfigDict, model: Decoder
) -> LossWeights:
  """The coefficients of the routers' losses."""
  moe = config.model.moe
  sparse = sum(model.config.sparse) if model.config.block.moe else 0
  if moe.load_weight and moe.router != 'noisy_top_k' and sparse:
    raise ValueError(
      f"moe.load_weight={moe.load_weight} needs moe.router='noisy_top_k', not "
      f'{moe.router!r}: the load is estimated from the noise'
    )
  if moe.importance_weight and moe.router != 'noisy_top_k' and sparse:
    raise ValueError(
      f'moe.importance_weight={moe.importance_weight} needs '
      f"moe.router='noisy_top_k', not {moe.router!r}"
    )
  return LossWeights(
    balance=moe.balance_weight,
    z=moe.z_weight,
    importance=moe.importance_weight,
    load=moe.load_weight,
    layer_reduce=moe.layer_reduce,
    num_sparse=sparse,
  )


def state_shardings(mesh, rules, params, axes, optimizer) -> TrainState:
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
  )


def _check_best(config):
  best = config.checkpoint.best_eval
  if config.checkpoint.keep_best and best not in config.evals:
    raise ValueError(
      f'checkpoint.best_eval={best!r} is no evaluation; have '
      f'{sorted(config.evals)}; or set checkpoint.keep_best=False'
    )


def _batches(config, dataset, put, start: int):
  return map(
    put,
    data.train_batches(
      dataset.splits['train'],
      batch_size=config.batch_size,
      seed=config.seed,
      start=start,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    ),
  )


def _put(sharding, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  return {
    key: jax.make_array_from_process_local_data(sharding, value)
    for key, value in batch.items()
  }
