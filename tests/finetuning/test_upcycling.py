"""Parameters of one model converted to another's, and the model's outputs."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import linen as nn

from moe_jax import models
from moe_jax.finetuning import InitFrom, plan, sources_of
from moe_jax.layers.experts import Dropless
from moe_jax.layers.ffn import FfnOptions
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.positions import Relative
from moe_jax.layers.retained import Retained
from moe_jax.layers.routers import TokenChoice
from moe_jax.models.embeddings import EmbeddingOptions
from moe_jax.models.encoder_decoder import EncoderOptions
from moe_jax.routing.capacity import All
from tests.models import tiny as models_tiny
from tests.training import tiny

V, T = 257, 16
TOP2 = {
  'num_experts': 4,
  'num_selected': 2,
  'layers': 'every 2',
  'router': TokenChoice(gates='renormalized'),
  'capacity': All(),
}
RAW = {'router': TokenChoice(gates='raw')}
DENSE = {'layers': 'none'}
TWIN = {'num_experts': 0, 'num_selected': 2}
HALVES = {
  'kind': 'encoder_decoder',
  'num_layers': 2,
  'encoder': EncoderOptions(4),
  'positions': Relative(),
  'embedding': EmbeddingOptions(tie=False),
}
KEY = models_tiny.key(3)


def build(moe, model=None):
  """Makes a model of width 16 and four layers."""
  moe = dict(moe)
  layers = moe.pop('encoder_layers', None)
  options = {'vocab_size': V, 'num_layers': 4, 'width': 16, **(model or {})}
  options = {'ffn': FfnOptions(20), **options, 'moe': MoeOptions(**moe)}
  if layers is not None:
    overrides = {'moe': {'layers': layers}}
    options['encoder'] = dataclasses.replace(
      options['encoder'], overrides=overrides
    )
  kind = options.pop('kind', 'decoder')
  return models.MODELS.get(kind)(**options).build()


def batch_of(model):
  """Random rows, for the encoder too where there is one."""
  return {
    f'{prefix}{name}': values
    for seed, prefix in enumerate(model.stacks.sequences)
    for name, values in tiny.rows(4, T, seed=seed).items()
  }


@functools.cache
def params_of(model):
  """Random parameters: initial norms and biases are equal in all layers."""
  shapes = nn.meta.unbox(models.abstract_params(model))
  rng = np.random.default_rng(0)

  def draw(leaf):
    value = 0.2 * rng.standard_normal(leaf.shape) + 0.7 * (leaf.ndim < 3)
    return value.astype(leaf.dtype)

  return jax.tree.map(draw, shapes)


def logits_of(model, params):
  batch = batch_of(model)
  run = jax.jit(lambda p, b: model.apply({'params': p}, **model.inputs(b)))
  logits, _ = run(params, batch)
  # Padding is left out: a sparse layer adds nothing to it, a dense one does.
  return np.asarray(logits)[np.asarray(batch['segment_ids']) > 0]


def convert(model, source, **copies):
  conversion = plan(model, source, InitFrom('old', **copies))
  return jax.jit(conversion.apply)(params_of(source), KEY)


def change(moe, source_moe, model=None, **copies):
  """Largest change of a logit by the conversion, over the largest logit."""
  target, source = build(moe, model), build(source_moe, model)
  source_logits = logits_of(source, params_of(source))
  target_logits = logits_of(target, convert(target, source, **copies))
  difference = np.abs(target_logits - source_logits).max()
  return difference / np.abs(source_logits).max()


@pytest.mark.parametrize(
  ('moe', 'model'),
  [
    # Ten layers of which the last is sparse are two loops, of nine and of one.
    ({'layers': 'last 1', 'num_selected': 3}, {'num_layers': 10}),
    pytest.param(
      {'layers': 'all', 'encoder_layers': '0,3', 'dispatch': Dropless()},
      {**HALVES, 'use_bias': True, 'ffn': FfnOptions(20, 'swiglu')},
      marks=pytest.mark.slow,
    ),
  ],
)
def test_upcycled_models_begin_as_the_dense_one(moe, model):
  assert change({**TOP2, **moe}, DENSE, model) < 1e-6


def test_what_becomes_of_each_layer():
  dense, sparse = build(DENSE), build(TOP2)
  source, params = params_of(dense), convert(sparse, dense, router_std=0.0)
  # The dense model is one period of one layer, repeated four times.
  dense_layer = source['layers']['layer_0']
  even, odd = (params['layers'][f'layer_{i}'] for i in (0, 1))
  equal = np.testing.assert_array_equal
  equal(params['embedding'], source['embedding'])
  equal(even['ffn']['w_in'], dense_layer['ffn']['w_in'][[0, 2]])
  equal(odd['ffn_norm']['scale'], dense_layer['ffn_norm']['scale'][[1, 3]])
  for name, kernel in odd['moe']['experts'].items():
    for e in range(4):
      equal(kernel[:, e], dense_layer['ffn'][name][[1, 3]])
  # The router has the initial weights of a run that starts from nothing.

  @jax.jit  # parameters that are not returned are not compiled
  def router(key):
    drawn = nn.meta.unbox(models.init_params(sparse, key))
    return drawn['layers']['layer_1']['moe']['router']['w']

  np.testing.assert_allclose(odd['moe']['router']['w'], router(KEY))


def test_the_publications_router():
  w = convert(build(TOP2), build(DENSE), router_std=0.02)
  w = w['layers']['layer_1']['moe']['router']['w']
  np.testing.assert_allclose(w.std(), 0.02, rtol=0.25)


def test_some_layers_sparse_already():
  # Layers 1 and 3 keep their experts and routers; layers 0 and 2 become sparse.
  half = build(TOP2)
  source = params_of(half)['layers']
  layer = convert(build({**TOP2, 'layers': 'all'}), half)['layers']['layer_0']
  source_moe = source['layer_1']['moe']
  equal = np.testing.assert_array_equal
  equal(layer['moe']['router']['w'][1::2], source_moe['router']['w'])
  for name, kernel in layer['moe']['experts'].items():
    equal(kernel[1::2], source_moe['experts'][name])
    for e in range(4):
      equal(kernel[::2, e], source['layer_0']['ffn'][name])


@pytest.mark.slow
def test_twice_the_experts_and_choices_are_the_same_model():
  moe = {**TOP2, **RAW}
  twice = {**moe, 'num_experts': 8, 'num_selected': 4}
  assert change(twice, moe) < 1e-6
  assert change({**twice, 'num_selected': 2}, moe) > 1e-3


def test_new_parameters_between_lstms_are_as_drawn():
  # A student of a sparse model, of which no experts are copied.
  teacher, student = (
    build({'layers': '1', 'num_experts': E}, {'kind': 'lstm'}) for E in (4, 0)
  )
  student_plan = plan(student, teacher, experts=False)
  params = jax.jit(student_plan.apply)(params_of(teacher), KEY)
  drawn = nn.meta.unbox(models.init_params(student, KEY))
  for name, source in (('layers_0', params_of(teacher)), ('layers_1', drawn)):
    jax.tree.map(np.testing.assert_array_equal, params[name], source[name])


def test_noise_tells_copies_apart_and_leaves_the_first():
  source, model = build(TOP2), build({**TOP2, 'num_experts': 6})
  params = convert(model, source, expert_noise=0.1, router_noise=0.2)
  new, old = (
    p['layers']['layer_1']['moe'] for p in (params, params_of(source))
  )
  for part, name, axis, noise in (
    ('router', 'w', -1, 0.2), ('experts', 'w_in', 1, 0.1)
  ):  # fmt: skip
    copied, original = (np.moveaxis(x[part][name], axis, 0) for x in (new, old))
    np.testing.assert_array_equal(copied[:4], original)
    added = copied[4:] - original[:2]
    rms = np.sqrt(np.mean(np.square(original)))
    np.testing.assert_allclose(added.std(), noise * rms, rtol=0.3)
    assert np.abs(added[0] - added[1]).min() > 0


def test_fewer_experts_are_the_first_or_those_named():
  source, model = build(TOP2), build({**TOP2, 'num_experts': 3})
  source_moe = params_of(source)['layers']['layer_1']['moe']
  for experts, source_index in (('', [0, 1, 2]), ('3,1,3', [3, 1, 3])):
    moe = convert(model, source, experts=experts)['layers']['layer_1']['moe']
    np.testing.assert_array_equal(
      moe['experts']['w_out'], source_moe['experts']['w_out'][:, source_index]
    )
    np.testing.assert_array_equal(
      moe['router']['w'], source_moe['router']['w'][..., source_index]
    )
  assert sources_of(7, 3) == (0, 1, 2, 0, 1, 2, 0)


def test_the_same_model_is_copied_whatever_its_experts_are_called():
  sparse = build(TOP2)
  conversion = plan(build({**TOP2, **RAW}), sparse, InitFrom())
  assert conversion.copies_all and conversion.describe() == 'all copied'
  assert not plan(sparse, sparse, InitFrom('old', experts='1,0,2,3')).copies_all
  assert not plan(sparse, build(DENSE), InitFrom()).copies_all


@pytest.mark.parametrize(
  ('moe', 'model', 'source_moe', 'copies', 'message'),
  [
    (DENSE, {}, TOP2, {}, 'moe/experts/w_in: not in this model'),
    ({**TOP2, 'extra_ffn': True}, {}, DENSE, {}, 'extra_ffn/w_in: not in'),
    (TOP2, {'num_layers': 6}, DENSE, {}, '4 layers there, 6 here'),
    (TOP2, HALVES, DENSE, {}, 'one of the two is an encoder-decoder'),
    (TOP2, {}, TOP2, {'experts': '0,1,2,4'}, 'are not 4 numbers'),
    # The dense twin with K=2 is twice as wide as an expert.
    (TOP2, {}, TWIN, {}, r'\[16, 40\] there, \[16, 20'),
    (
      TOP2,
      {'width': 24},
      DENSE,
      {},
      r'embedding: \[257, 16\] there, \[257, 24',
    ),
  ],
)
def test_what_has_no_meaning_is_refused(
  moe, model, source_moe, copies, message
):
  target, source = build(moe, model), build(source_moe)
  with pytest.raises(ValueError, match=message):
    plan(target, source, InitFrom('old', **copies))


def test_columns_must_lead_to_the_same_experts():
  # Both layers have three experts, which are those of other columns.
  source, target = (
    build({**TOP2, 'retained': Retained('', f'1: {row}; 3: {row}')})
    for row in ('0 1 2 2', '0 0 1 2')
  )
  assert plan(source, source).copies_all
  with pytest.raises(ValueError, match=r'1: 0 1 2 2.* there and .*1: 0 0 1 2'):
    plan(target, source)
