"""No number depends on the name of a parameter or of a module."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from moe_jax.analysis import cost, counts, memory
from moe_jax.layers import parameters
from moe_jax.layers.experts import ExpertOptions, FeedForwardExpert, Twin
from moe_jax.layers.ffn import FfnOptions
from moe_jax.layers.positions import Learned, Relative
from moe_jax.layers.routers import TokenChoice
from moe_jax.layers.routers.contract import Router
from moe_jax.models.trees import ParameterTrees, describe
from moe_jax.routing import empty_aux, token_choice
from tests.models import tiny
from tests.models.tiny import B, T


def figures(model):
  """All numbers that are counted for a model."""
  target_len = 7 if model.has_encoder else 0
  return (
    cost.count(model, T, target_len, B),
    [memory.weight_bytes(model, dtype) for dtype in memory.DTYPES],
    cost.without_vocabulary(model, T),
  )


@dataclasses.dataclass(frozen=True)
class OtherNames(TokenChoice):
  """Token choice whose kernel and bias have other names."""

  def module(self, sizes, shared, name=None):
    return OtherNamesRouter(self, sizes, shared, name=name)


class OtherNamesRouter(Router):
  def route(self, x, mask, train, token_info, layer):
    E, K = self.sizes.num_experts, self.sizes.num_selected
    kernel = parameters.kernel(self.shared, ('embed', None), role='router')
    bias = parameters.bias((None,), role='router')
    w = self.param('switchboard', kernel, (x.shape[-1], E), jnp.float32)
    logits = x.astype(jnp.float32) @ w
    if self.options.use_bias:
      logits += self.param('offsets', bias, (E,), jnp.float32)[None, None]
    routing = token_choice(
      logits,
      num_selected=K,
      capacity=self.sizes.slots(x.shape[1]),
      mask=mask,
      gates=self.options.gates,
    )
    return routing, empty_aux(E, K, self.options.loss_weights())


@dataclasses.dataclass(frozen=True)
class OtherExpert(ExpertOptions):
  """The feed-forward layer of width 20, with a user's own names."""

  def module(self, shared, name):
    return TwoLayers(name=name)

  def twin(self, num_selected):
    return Twin(FfnOptions(20 * num_selected), 0.0)


class TwoLayers(nn.Module):
  @nn.compact
  def __call__(self, rows, train):
    del train
    up = self.param('up', nn.initializers.ones, (rows.shape[-1], 20))
    down = self.param('down', nn.initializers.ones, (20, rows.shape[-1]))
    return jax.nn.gelu(rows @ up) @ down


def test_a_router_and_an_expert_with_other_names_cost_the_same():
  options = dict(gates='renormalized', use_bias=True)
  usual_model = tiny.build(
    dict(router=TokenChoice(**options), expert=FeedForwardExpert(hidden=20))
  )
  custom_model = tiny.build(
    dict(router=OtherNames(**options), expert=OtherExpert())
  )
  usual_names, custom_names = (
    set(tiny.leaves(describe(model).shapes))
    for model in (usual_model, custom_model)
  )
  assert any('switchboard' in name for name in custom_names - usual_names)
  assert any('down' in name for name in custom_names - usual_names)
  assert figures(usual_model) == figures(custom_model)


@pytest.mark.parametrize(
  'model',
  [
    tiny.build(
      dict(layers='every 2', extra_ffn=True),
      positions=Learned(),
      use_bias=True,
      embedding=dict(tie=False),
    ),
    tiny.build(kind='encoder_decoder', positions=Relative()),
    tiny.build(dict(layers='1'), kind='lstm', num_layers=3),
  ],
  ids=['decoder', 'encoder_decoder', 'lstm'],
)
def test_names_may_be_scrambled(model, monkeypatch):
  paths = {stack.path for stack in model.stacks if stack.blocks}
  before = figures(model)
  new_names = {}

  def scramble(tree, path=()):
    """The tree with other names, except those of the stacks' scopes."""
    if not isinstance(tree, dict):
      return tree
    new_subtree = {}
    for name, value in tree.items():
      new_name = name
      if (*path, name) not in paths:
        new_name = new_names.setdefault(name, f'name_{len(new_names)}')
      new_subtree[new_name] = scramble(value, (*path, name))
    return new_subtree

  trees = describe(model)
  trees = ParameterTrees(*map(scramble, trees))
  monkeypatch.setattr(counts, 'describe', lambda model: trees)
  assert figures(model) == before
  assert len(new_names) > 10
