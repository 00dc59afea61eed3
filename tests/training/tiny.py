"""The smallest runs that have everything: a sparse model on a little text."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import linen as nn

from configs import base
from moe_jax import models
from moe_jax.config import merge
from moe_jax.training import optimizer as optimizer_lib
from moe_jax.training import setup, step

SOURCE = 'python_stdlib:email,json,asyncio'


def config(**overrides) -> ml_collections.ConfigDict:
  """L=2, one sparse layer of 4 experts, six steps, an evaluation of each."""
  c = base.get_config()
  c.total_steps = 6
  c.batch_size = 4
  c.log_every_steps = 2
  c.data.source = SOURCE
  c.data.seq_len = 24
  c.model.num_layers = 2
  c.model.width = 16
  c.model.num_heads = 2
  c.model.hidden = 20
  c.model.moe.num_experts = 4
  c.optimizer.schedule = 'constant'
  c.optimizer.warmup_steps = 1
  c.checkpoint.every_steps = 2
  c.mesh.data = 1
  c.evals = {'train_capacity': base.evaluation(every_steps=3, num_batches=2)}
  c.sample.num_tokens = 8
  return merge(c, overrides)


def batch(config, *, seed: int = 0, vocab_size: int = 257) -> dict:
  """Random rows with a document boundary and padding, unequal by row."""
  B, T = config.batch_size, config.data.seq_len
  rng = np.random.default_rng(seed)
  length = T - 3 * np.arange(B) % T
  place = np.arange(T)[None]
  real = place < length[:, None]
  segment_ids = np.where(real, 1 + (place > 7), 0)
  weights = real & (place != 7) & (place + 1 < length[:, None])
  return {
    'tokens': jnp.asarray(rng.integers(0, vocab_size, (B, T)), jnp.int32),
    'targets': jnp.asarray(rng.integers(0, vocab_size, (B, T)), jnp.int32),
    'segment_ids': jnp.asarray(segment_ids, jnp.int32),
    'positions': jnp.asarray(np.where(place > 7, place - 8, place), jnp.int32)
    * jnp.ones((B, 1), jnp.int32),
    'loss_weights': jnp.asarray(weights, jnp.float32),
  }


def model_of(config, vocab_size=257):
  """The model, with the bytes' vocabulary or another."""
  return models.build(setup.with_vocabulary(config, vocab_size))


@functools.cache
def _params(model, seq_len):
  init = jax.jit(functools.partial(models.init_params, model, seq_len=seq_len))
  return nn.meta.unbox(init(jax.random.key(0)))


def params_of(config):
  """Parameters of the config's model at seed 0, made once."""
  return _params(model_of(config), config.data.seq_len)


def grads_of(config, params, batch, key=0):
  """((loss, sums), gradient) of one batch under the config."""
  model = model_of(config)
  fn = step.make_grad_fn(
    model, setup.loss_weights(config, model), config.microbatches
  )
  whole = step.losses.normalizers(batch)
  return jax.jit(fn)(params, batch, whole, jax.random.key(key))


def optimizer_of(config):
  """The config's optimizer and schedule."""
  axes = setup.axis_names(
    models.abstract_params(model_of(config), config.data.seq_len)
  )
  return optimizer_lib.make_optimizer(
    config.optimizer, config.total_steps, axes
  )
