"""Models small enough to compile in a second; their sizes differ pairwise.

B=3, T=10, M=12, H=4, D=6, F=20, E=5, K=2, V=23. This module has no tests.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from moe_jax import models
from moe_jax.layers.attention import AttentionOptions
from moe_jax.layers.ffn import FfnOptions
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.routers import TokenChoice

B, T, V = 3, 10, 23


def moe_options(**moe):
  """Options of a sparse layer of the sizes above, changed by `moe`."""
  sparse = dict(num_experts=5, num_selected=2, layers='all')
  if moe.get('num_experts') != 0:  # a dense twin has no router
    sparse['router'] = TokenChoice(gates='renormalized')
  return MoeOptions(**{**sparse, **moe})


def options(moe=None, kind='decoder', **model):
  """Options of a model of the sizes above, changed by `moe` and `model`.

  Options that hold other options take changes of those: `attention=dict(...)`.
  """
  cls = models.MODELS.get(kind)
  base = dict(
    vocab_size=V,
    num_layers=2,
    width=12,
    ffn=FfnOptions(hidden=20),
    moe=moe_options(**(moe or {})),
  )
  if hasattr(cls(), 'attention'):
    base['attention'] = AttentionOptions(num_heads=4, head_width=6)
  defaults = cls()
  for name, value in model.items():
    if isinstance(value, dict):
      value = dataclasses.replace(
        base.get(name, getattr(defaults, name)), **value
      )
    base[name] = value
  return cls(**base).filled(V, T)


def build(moe=None, kind='decoder', **model):
  return options(moe, kind, **model).build()


def params_of(model, seed=0):
  """Unboxed random parameters, so that no zero hides a parameter.

  Nothing is compiled; initial values are tested where they are defined.
  """
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    values = rng.normal(0, 0.3, leaf.shape) + (path[-1].key == 'scale')
    return jnp.asarray(values, leaf.dtype)

  shapes = nn.meta.unbox(models.abstract_params(model))
  return jax.tree_util.tree_map_with_path(draw, shapes)


def draw(*shape, seed=0, dtype='float32'):
  values = np.random.default_rng(seed).normal(size=shape)
  return values.astype(jnp.dtype(dtype))


def layer_params(layer, *args, seed=0, **kwargs):
  """Random parameters of a layer that is called with these arguments."""
  shapes = jax.eval_shape(layer.init, jax.random.key(0), *args, **kwargs)
  leaves, tree = jax.tree.flatten(nn.meta.unbox(shapes)['params'])
  return tree.unflatten(
    [draw(*leaf.shape, seed=seed + i) for i, leaf in enumerate(leaves)]
  )


def tokens(seed=0, shape=(B, T)):
  rng = np.random.default_rng(seed)
  return rng.integers(0, V, shape).astype(np.int32)


def key(seed):
  """A key whose random numbers compile three times faster than default ones."""
  return jax.random.key(seed, impl='unsafe_rbg')


@functools.cache
def apply(model):
  """A compiled (params, tokens, segment_ids, positions) -> (logits, aux)."""
  return jax.jit(lambda params, *batch: model.apply({'params': params}, *batch))


def leaves(tree):
  """Leaves of a tree by name, such as {'layers/layer_0/ffn/w_in': array}."""
  paths_and_leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  name = jax.tree_util.keystr
  return {
    name(path, simple=True, separator='/'): leaf
    for path, leaf in paths_and_leaves
  }


def assert_trees_close(a, b, rtol=1e-5, atol=1e-6):
  a, b = leaves(a), leaves(b)
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_allclose(
      a[name], b[name], rtol=rtol, atol=atol, err_msg=name
    )
