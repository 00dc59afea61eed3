"""Optax optimizers from a config: schedules, clipping, rules by name.

Not here: gradient accumulation (`step.py`).
"""

import re
from collections.abc import Sequence

import jax
import ml_collections
import optax

from moe_jax.config import unknown
from moe_jax.partitioning import path_name

OPTIMIZERS = ('adafactor', 'adamw')
SCHEDULES = ('constant', 'cosine', 'inverse_sqrt')
# Axes along which matrices are stacked: no statistic is shared across them.
STACKED_AXES = ('layers', 'expert')


def make_schedule(
  config: ml_collections.ConfigDict, total_steps: int
) -> optax.Schedule:
  """The learning rate at each step, after a linear warm-up from 0.

  'cosine' falls to final_fraction at total_steps, 'inverse_sqrt' is
  learning_rate * sqrt(warmup_steps / step), 'constant' stays.

  Raises:
    ValueError: The schedule is unknown, or the warm-up is longer than the run.
  """
  peak, warmup = config.learning_rate, config.warmup_steps
  if config.schedule not in SCHEDULES:
    raise unknown('optimizer.schedule', config.schedule, SCHEDULES)
  if not 0 <= warmup <= total_steps:
    raise ValueError(
      f'optimizer.warmup_steps={warmup} not in [0, total_steps={total_steps}]'
    )
  if config.schedule == 'cosine':
    after = optax.cosine_decay_schedule(
      peak, max(total_steps - warmup, 1), alpha=config.final_fraction
    )
  elif config.schedule == 'inverse_sqrt':
    start = max(warmup, 1)

    def after(step):
      return peak * (start / (step + start)) ** 0.5
  else:
    after = optax.constant_schedule(peak)
  rise = optax.linear_schedule(0.0, peak, max(warmup, 1))
  return optax.join_schedules([lambda step: rise(step + 1), after], [warmup])


def make_optimizer(
  config: ml_collections.ConfigDict, total_steps: int, axes
) -> optax.GradientTransformation:
  """Clip, precondition, decay, scale by rule, scale by schedule.

  Args:
    config: The `optimizer` section.
    total_steps: Length of the run, for the schedule.
    axes: A tree like the parameters with a tuple of logical axes a leaf.

  Raises:
    ValueError: The optimizer is unknown or a value is out of range.
  """
  if config.name not in OPTIMIZERS:
    raise unknown('optimizer.name', config.name, OPTIMIZERS)
  for name in ('learning_rate', 'clip_norm', 'weight_decay'):
    if config[name] < 0:
      raise ValueError(f'optimizer.{name}={config[name]} must not be negative')
  schedule = make_schedule(config, total_steps)
  steps = []
  if config.clip_norm:
    steps.append(optax.clip_by_global_norm(config.clip_norm))
  if config.name == 'adamw':
    steps.append(optax.scale_by_adam(config.b1, config.b2, config.epsilon))
  else:
    steps.append(per_matrix(_adafactor(config), axes))
  if config.weight_decay:
    decay = by_name(config.weight_decay_rules, 'optimizer.weight_decay_rules')
    steps.append(_decayed(config.weight_decay, decay))
  rate = by_name(config.learning_rate_rules, 'optimizer.learning_rate_rules')
  steps.append(_scaled(rate))
  steps.append(optax.scale_by_learning_rate(schedule))
  return optax.chain(*steps)


def by_name(rules: Sequence[tuple[str, float]], what: str):
  """A function from a parameter tree to a tree of factors, first match wins.

  Raises:
    ValueError: A rule is no pattern and factor, or (when called) a parameter
      matches none.
  """
  try:
    compiled = [(re.compile(pattern), float(f)) for pattern, f in rules]
  except (re.error, TypeError, ValueError) as error:
    raise ValueError(
      f'{what}={rules!r} are not pairs of a regular expression and a factor: '
      f'{error}'
    ) from None

  def factors(params):
    def one(path, _):
      name = path_name(path)
      for pattern, factor in compiled:
        if pattern.search(name):
          return factor
      raise ValueError(f'no rule of {what} matches parameter {name!r}')

    return jax.tree_util.tree_map_with_path(one, params)

  return factors


def _decayed(weight_decay, factors) -> optax.GradientTransformation:
  def update(updates, params):
    return jax.tree.map(
      lambda u, p, f: u + (weight_decay * f * p if f else 0),
      updates,
      params,
      factors(params),
    )

  return optax.stateless(update)


def _scaled(factors) -> optax.GradientTransformation:
  def update(updates, params):
    return jax.tree.map(
      lambda u, f: u if f == 1 else f * u, updates, factors(params)
    )

  return optax.stateless(update)


def _adafactor(config) -> optax.GradientTransformation:
  """Adafactor's preconditioner for one matrix (arXiv:1804.04235)."""
  steps = [
    optax.scale_by_factored_rms(
      decay_rate=config.adafactor_decay_rate,
      min_dim_size_to_factor=config.adafactor_min_dim_size,
    ),
    optax.clip_by_block_rms(1.0),
    optax.scale_by_param_block_rms(),
  ]
  if config.b1:
    steps.append(optax.ema(config.b1, debias=False))
  return optax.chain(*steps)


def per_matrix(
  transform: optax.GradientTransformation, axes
) -> optax.GradientTransformation:
  """`transform` on every matrix of every stacked parameter by itself.

  A parameter [L, E, M, F] is L * E matrices: what the transform factors,
  clips or measures is never shared along `layers` and `expert`.

  Args:
    transform: Of one array.
    axes: A tree like the parameters with a tuple of logical axes a leaf;
      stacked axes lead.
  """

  def lifted(function, names):
    for name in names:
      if name not in STACKED_AXES:
        break
      function = jax.vmap(function)
    return function

  def init(params):
    return jax.tree.map(lambda p, n: lifted(transform.init, n)(p), params, axes)

  def update(updates, state, params):
    leaves, tree = jax.tree.flatten(updates)
    pairs = [
      lifted(transform.update, names)(u, s, p)
      for u, s, p, names in zip(
        leaves,
        tree.flatten_up_to(state),
        tree.flatten_up_to(params),
        tree.flatten_up_to(axes),
        strict=True,
      )
    ]
    updates, state = zip(*pairs, strict=True)
    return tree.unflatten(updates), tree.unflatten(state)

  return optax.GradientTransformation(init, update)
