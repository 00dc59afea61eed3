"""The smallest runs with all features: a sparse model on a little text."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import linen as nn

from moe_jax import models, partitioning, run_config
from moe_jax.config import layered
from moe_jax.configs import base
from moe_jax.run_config import RunConfig
from moe_jax.training import losses, step
from tests.models import tiny as tiny_models

# Overrides of the model to one dense layer, for runs of any model.
ONE_LAYER = {'num_layers': 1, 'moe': {'layers': 'none', 'num_experts': 0}}
MODULES = 'email,json,asyncio'  # modules of the standard library


def config(**overrides) -> ml_collections.ConfigDict:
  """A config of L=2, one sparse layer of 4 experts, six steps, evaluations.

  Overrides are a later layer: settings of what they switch off are dropped.
  """
  c = base.get_config()
  c.total_steps = 6
  c.batch_size = 4
  c.log_every_steps = 2
  c.data.source.python_stdlib.modules = MODULES
  c.data.seq_len = 24
  c.model.num_layers = 2
  c.model.width = 16
  c.model.attention.num_heads = 2
  c.model.ffn.hidden = 20
  c.model.moe.num_experts = 4
  c.optimizer.schedule.kind = 'constant'
  c.optimizer.schedule.warmup_steps = 1
  c.checkpoint.every_steps = 2
  c.mesh.data = 1
  c.evals = {'train_capacity': base.evaluation(every_steps=3, num_batches=2)}
  c.sample.num_tokens = 8
  defaults = base.finish(c)
  return layered(RunConfig, defaults, overrides)


def options(**overrides) -> RunConfig:
  """The options of `config`."""
  return run_config.read(config(**overrides))


def router(**values) -> dict:
  """Overrides of the options of the model's token choice."""
  return {'moe': {'router': {'token_choice': values}}}


def batch(options: RunConfig, *, seed: int = 0, vocab_size: int = 257) -> dict:
  """Random rows with document boundaries and padding, which differ by row."""
  return rows(
    options.batch_size, options.data.seq_len, seed=seed, vocab_size=vocab_size
  )


def rows(B: int, T: int, *, seed: int = 0, vocab_size: int = 257) -> dict:
  """Arrays of random rows; see `batch`."""
  rng = np.random.default_rng(seed)
  length = T - 3 * np.arange(B) % T
  position = np.arange(T)[None]
  real = position < length[:, None]
  segment_ids = np.where(real, 1 + (position > 7), 0)
  weights = real & (position != 7) & (position + 1 < length[:, None])
  return {
    'tokens': jnp.asarray(rng.integers(0, vocab_size, (B, T)), jnp.int32),
    'targets': jnp.asarray(rng.integers(0, vocab_size, (B, T)), jnp.int32),
    'segment_ids': jnp.asarray(segment_ids, jnp.int32),
    'positions': jnp.asarray(
      np.where(position > 7, position - 8, position), jnp.int32
    )
    * jnp.ones((B, 1), jnp.int32),
    'loss_weights': jnp.asarray(weights, jnp.float32),
  }


def model_of(options: RunConfig, vocab_size: int = 257):
  """The model, with the vocabulary of bytes or another."""
  return options.filled(vocab_size).build()


@functools.cache
def _params(model):
  init = jax.jit(functools.partial(models.init_params, model))
  return nn.meta.unbox(init(tiny_models.key(0)))


def params_of(options: RunConfig):
  """Initial parameters of the model with seed 0, computed once."""
  return _params(model_of(options))


def first_state(programs):
  """A state before the first step of programs, for which nothing is compiled.

  Parameters are random; all else, and what adapters add, is zero.
  """
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    values = np.zeros(leaf.shape, leaf.dtype)
    name = partitioning.path_name(path)
    if name.startswith('params/') and not name.endswith('/b'):
      values[...] = rng.normal(0, 0.2, leaf.shape) + name.endswith('/scale')
    return jax.device_put(values, leaf.sharding)

  return jax.tree_util.tree_map_with_path(draw, programs.abstract_state)


def grads_of(options: RunConfig, params, batch, key=0):
  """Computes ((loss, sums), gradient) of one batch."""
  model = model_of(options)
  fn = _grad_fn(model, options.logits_z_weight, options.microbatches)
  totals = losses.normalizers(model, batch)
  return fn(params, batch, totals, jax.random.key(key))


@functools.cache
def _grad_fn(model, logits_z_weight, microbatches):
  weights = losses.loss_weights(model, logits_z_weight)
  return jax.jit(step.make_grad_fn(model, weights, microbatches))


def optimizer_of(options: RunConfig):
  """The optimizer for the model's parameters."""
  trees = models.describe(model_of(options))
  return options.optimizer.transformation(
    options.total_steps, trees.axes, trees.roles
  )
