"""Runs in memory with sparse layers to merge and prune, and their layers."""

import functools
import pathlib

import jax
import numpy as np

from moe_jax import layers
from moe_jax.compression.calibration import measure
from moe_jax.compression.fewer import Calibrated, smaller
from moe_jax.data import DataOptions
from moe_jax.layers.ffn import FfnOptions
from moe_jax.layers.routers import TokenChoice
from moe_jax.models.expert_arrays import sparse_layers
from moe_jax.partitioning import ShardingOptions
from moe_jax.routing.capacity import All
from moe_jax.training.trained import Described, Loaded
from tests.models import tiny

E, K, M, F = 5, 2, 12, 20
X = np.random.default_rng(7).normal(size=(2, 9, M)).astype(np.float32)


def run_of(change=lambda params: params, **moe):
  """A run of three layers, the last two sparse and gated, with all biases."""
  gates = moe.pop('gates', 'raw')
  options = tiny.options(
    {
      'layers': '1,2',
      'capacity': All(),
      'router': TokenChoice(gates=gates, use_bias=True),
      **moe,
    },
    num_layers=3,
    use_bias=True,
    ffn=FfnOptions(F, 'swiglu'),
  )
  return in_memory(options, change)


def in_memory(options, change):
  """A run with these options, whose random parameters are changed."""
  model = options.build()
  params = change(tiny.params_of(model))
  described = Described(options, DataOptions(), ShardingOptions(), 3, None)
  return Loaded(pathlib.Path('run'), described, model, {'params': params}, 1)


def batch(seed=0):
  tokens = tiny.tokens(seed)
  segment_ids = np.ones_like(tokens)
  segment_ids[0, 7:] = 0
  return {'tokens': tokens, 'segment_ids': segment_ids} | {
    'positions': np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  }


BATCHES = [batch(0), batch(1)]


def calibrated(run):
  layers_by_number = sparse_layers(run.model, run.variables)
  usage = measure(run.model, run.variables, BATCHES)
  return Calibrated(run, layers_by_number, usage)


def smaller_run(run, smaller_layers):
  """The run with fewer experts, which are given for each layer."""
  options, variables = smaller(run, smaller_layers)
  described = run.options._replace(model=options)
  return Loaded(run.folder, described, options.build(), variables, 0)


@functools.cache
def _applied(module, number):
  return jax.jit(lambda v, x: module.apply(v, x, layer=number))


def outputs(run, number):
  """The output of one sparse layer for `X`, and the choices before drops."""
  moe, stack = run.model.stacks.moe_of(number), run.model.stacks.blocks[0]
  module = layers.MoE(moe, stack.block.shared)
  variables = {
    name: run.model.stacks.layer_trees(collection)[number]['moe']
    for name, collection in run.variables.items()
  }
  y, aux = _applied(module, number)(variables, X)
  return np.asarray(y), np.asarray(aux.stats.load)
