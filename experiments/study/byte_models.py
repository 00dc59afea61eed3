"""The small byte-level models that studies train on two cores."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ml_collections import ConfigDict

from experiments.study.jobs import layered, nested
from experiments.study.parts import POSITIVE, Arm, Column, percent
from moe_jax import run_config
from moe_jax.analysis import cost
from moe_jax.configs import base
from moe_jax.run_config import RunConfig

# Name of the evaluation of the validation loss, with training's capacity.
EVAL = 'main'
LOSS = Column('loss', f'eval/{EVAL}/loss', 'nats/byte', bounds=POSITIVE)
TOKEN_LOSS = dataclasses.replace(LOSS, unit='nats/token')
# Keys of the share of choices that this evaluation drops, and of the largest
# load of an expert over the mean, in each layer.
DROP_RATE = f'eval/{EVAL}/drop_rate'
MAX_LOAD = f'eval/{EVAL}/layer_*/load_max_over_mean'
# Number of batches of the validation split of an evaluation.
_BATCHES = 40
# Options of `model.moe` with which no token is dropped, by the names that they
# have there and in the whole config.
ROOM = {'capacity.kind': 'all', 'dispatch.kind': 'dropless'}
DROPLESS = {f'model.moe.{key}': kind for key, kind in ROOM.items()}
# Rates that are tried for `switch_decoder`. In trials of `switch_table3` 0.03
# was too low and 0.3 too high for models of either kind.
SWITCH_RATES = (0.03, 0.06, 0.12, 0.24)


def columns_of(evaluation: str) -> list[Column]:
  """Columns 'loss' and 'dropped', in %, of one of a config's evaluations."""
  dropped = percent('dropped', f'eval/{evaluation}/drop_rate')
  return [Column('loss', f'eval/{evaluation}/loss'), dropped]


def max_violation(name: str) -> Column:
  """A column of MaxVio, (largest load - mean) / mean, over all batches."""
  return Column(name, MAX_LOAD, '', 3, lambda ratio: ratio - 1)


def decoder(
  steps: int,
  *,
  width: int = 64,
  hidden: int = 256,
  num_layers: int = 2,
  num_experts: int = 8,
  num_selected: int = 1,
  expert_hidden: int = 0,
  drops: bool = True,
) -> ConfigDict:
  """Config of a causal model of the embedded corpus, with all layers sparse.

  An expert's capacity is its average number of choices times the capacity
  factor.

  Args:
    steps: Length of the run; the learning rate falls to a twentieth over it.
    width: Model width M.
    hidden: Hidden width F of a dense feed-forward and, unless `expert_hidden`
      is given, of an expert.
    num_layers: Number of layers L.
    num_experts: Number of experts E of every layer.
    num_selected: Number of selected experts K.
    expert_hidden: Hidden width of an expert; 0 takes that of the feed-forward.
    drops: Whether experts have a capacity; otherwise no token is ever dropped.
  """
  config = base.get_config()
  shorten(config, steps)
  config.batch_size = 32
  config.data.seq_len = 64
  m = config.model
  m.update(num_layers=num_layers, width=width)
  m.attention.num_heads = 4
  m.ffn.hidden = hidden
  # A CPU would copy each layer's slice of scanned kernels.
  m.scan_layers = False
  m.moe.update(num_experts=num_experts, num_selected=num_selected, layers='all')
  m.moe.expert.hidden = expert_hidden
  # One group for the whole batch: the load of experts is then the most even.
  m.moe.group_size = -1
  m.moe.capacity.kind = 'per_assignment' if drops else 'all'
  if not drops:
    m.moe.dispatch.kind = 'dropless'
  config.optimizer.learning_rate = 3e-3
  config.optimizer.schedule.final_fraction = 0.05
  config.evals = {EVAL: evaluation()}
  return config


def shorten(config: ConfigDict, steps: int) -> None:
  """Changes a config to runs of so many steps, which keep no checkpoint."""
  config.total_steps = steps
  config.log_every_steps = max(steps // 10, 1)
  config.optimizer.schedule.warmup_steps = min(100, steps // 8)
  config.checkpoint.update(every_steps=0, keep_best=False)


def switch_decoder(
  steps: int, *, rate: float = 0.01, **sizes: int
) -> ConfigDict:
  """Config of a decoder that is trained and served as Switch Transformers are.

  Updates of Adafactor are relative to the size of a kernel. Embeddings have a
  deviation of 1, and logits are divided by the root of the width. Experts have
  room for 1.25 times their share of tokens in training, and twice in
  evaluation; there is no router z-loss. Unlike in the paper, the learning rate
  falls over the run, and no router has noise.

  Args:
    steps: Length of the run.
    rate: Peak of the learning rate; that of T5 is 0.01.
    **sizes: Other arguments of `decoder`.
  """
  config = decoder(steps, **sizes)
  m = config.model
  m.numerics.init.update(embedding_std=1.0, scale=0.1)
  m.embedding.logits_scale = 'inverse_sqrt_width'
  m.moe.capacity.update(kind='per_token', per_token={'factor': 1.25})
  m.moe.router.token_choice.update(balance_weight=0.01, z_weight=0.0)
  optimizer = config.optimizer
  optimizer.kind = 'adafactor'
  optimizer.update(learning_rate=rate, b1=0.0, clip_norm=0.0, weight_decay=0.0)
  config.evals = {EVAL: with_slots(2.0)}
  return config


def sparse_encoder(steps: int, **sizes: Any) -> ConfigDict:
  """Config of an encoder-decoder whose encoder alone is sparse.

  An encoder sees all of its input at once, so that no router leaks anything
  there. The decoder has one dense layer.

  Args:
    steps: Length of the run.
    **sizes: Other arguments of `decoder`.
  """
  config = decoder(steps, num_layers=1, **sizes)
  m = config.model
  m.kind, m.positions.kind = 'encoder_decoder', 'relative'
  m.encoder.num_layers = 2  # both are sparse
  m.encoder.overrides = dict(moe=dict(layers='all'))
  m.moe.layers = 'none'
  return config


def serve_as_gshard(moe: ConfigDict) -> None:
  """Changes a section `model.moe` to top-2 as GShard's Algorithm 1 serves it.

  First choices are served before second ones, which are sent by chance, two
  slots a token; the balance loss is of first choices. Which second choices find
  a slot depends on later tokens.
  """
  moe.update(num_selected=2, allow_future_leak=True)
  moe.capacity.update(kind='per_token', per_token={'factor': 2.0})
  router = moe.router.token_choice
  router.update(gates='renormalized', slot_priority='choice_major')
  router.update(second_policy='sampled', balance_choices='first', z_weight=0.0)


def evaluation(**model: Any) -> ConfigDict:
  """Config of an evaluation at the end of a run.

  Args:
    **model: Nested values that the evaluation changes in `config.model`, and
      `split`, as in `base.evaluation`.
  """
  return base.evaluation(every_steps=0, num_batches=_BATCHES, **model)


def with_slots(number: float, **keys: str) -> ConfigDict:
  """Config of an evaluation with a number of slots for each token.

  Args:
    number: The number; capacities of the config are `per_token`.
    **keys: Other options of the evaluation, such as `split`.
  """
  return evaluation(moe={'capacity': {'per_token': {'factor': number}}}, **keys)


def no_drops() -> ConfigDict:
  """Config of an evaluation that drops no token."""
  return evaluation(moe=nested(ROOM))


def dense(name: str = 'dense', **overrides: Any) -> Arm:
  """The arm of the dense twin, which has no experts.

  Args:
    name: Name of the arm.
    **overrides: Other values that the arm changes, by dotted name.
  """
  return Arm(name, {'model.moe.num_experts': 0, **overrides})


def top_k(
  name: str,
  K: int,
  hidden: int,
  overrides: Mapping[str, Any] = MappingProxyType({}),
) -> Arm:
  """An arm in which each token chooses K experts.

  The gate of a single choice is its softmax probability; gates of several
  choices are renormalised to sum to one.

  Args:
    name: Name of the arm.
    K: Number of experts of a token.
    hidden: K times an expert's F; for equal FLOPs, the dense model's F.
    overrides: Other values that the arm changes in `model.moe`, by dotted name.
  """
  moe = {
    'num_selected': K,
    'expert.hidden': hidden // K,
    'router.token_choice.gates': 'raw' if K == 1 else 'renormalized',
  }
  return of_moe(name, {**moe, **overrides})


def expert_choice(
  name: str,
  factor: int,
  hidden: int,
  overrides: Mapping[str, Any] = MappingProxyType({}),
) -> Arm:
  """An arm in which each expert chooses tokens.

  Args:
    name: Name of the arm.
    factor: Number of experts that take a token on average.
    hidden: `factor` times an expert's F, as in `top_k`.
    overrides: Other values that the arm changes in `model.moe`, by dotted name.
  """
  moe = {
    'num_selected': factor,
    'expert.hidden': hidden // factor,
    'router.kind': 'expert_choice',
    'capacity.kind': 'per_token',
    'capacity.per_token.factor': float(factor),
    'dispatch.kind': 'gather',
  }
  return of_moe(name, {**moe, **overrides})


def of_moe(
  name: str, moe: Mapping[str, Any], line: str = '', x: float | None = None
) -> Arm:
  """An arm that changes `model.moe`.

  Args:
    name: Name of the arm.
    moe: Values by dotted name in that section.
    line: Name of the figure's line, as in `Arm`.
    x: Coordinate along the x axis, as in `Arm`.
  """
  return Arm(name, {f'model.moe.{k}': v for k, v in moe.items()}, line, x)


def training_flops(config: ConfigDict, overrides: Mapping[str, Any]) -> int:
  """FLOPs of a training step for a token; see `cost.Cost.training_flops`.

  Args:
    config: The config that the arms of a study share.
    overrides: Values that an arm changes in the config, by dotted name.

  Raises:
    ValueError: The overrides do not fit, or the model reads no tokens.
  """
  options = run_config.read(layered(RunConfig, config, overrides))
  options = cost.with_own_vocabulary(options)
  lengths = options.data.seq_len, options.data.target_len
  return cost.count(options.build(), *lengths).training_flops
