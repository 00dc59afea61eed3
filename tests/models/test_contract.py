"""Every kind of model keeps the contract of `moe_jax/models/base.py`.

A kind is covered as soon as it stands in `MODELS`; a user's own is that of the
README. Oracles are the model itself on other rows: documents alone, rows with
other tokens later or in the padding, layers that are unrolled or recomputed.
"""

import dataclasses
import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from moe_jax import models, run_config
from moe_jax.config import OptionError, merge
from moe_jax.configs import base
from moe_jax.layers.norms import LayerNorm
from moe_jax.layers.parameters import Role
from moe_jax.layers.positions import Learned, NoPositions, Relative
from moe_jax.layers.routers import Hash, TokenChoice
from moe_jax.models.encoder_decoder import EncoderOptions
from moe_jax.routing.capacity import All, PerToken
from tests.models import tiny
from tests.models.tiny import B, T, V

S = 7  # the length of an encoder's rows
README = pathlib.Path(models.__file__).parent / 'README.md'
CODE = re.findall(r'```python\n(.*?)```', README.read_text(), re.DOTALL)
KINDS = [*models.MODELS.builtin, 'own']
# Options with which a kind shows most; those of a new kind are its defaults.
OPTIONS = {
  'decoder': dict(positions=Learned()),
  'encoder_decoder': dict(
    positions=Relative(), encoder=EncoderOptions(3, {'moe': {'layers': '1'}})
  ),
  'lstm': dict(positions=NoPositions(), num_layers=3, moe=dict(layers='1')),
}
# A decoder whose experts fill, so that later tokens could evict earlier ones.
DROPS = 'decoder that drops'
OPTIONS[DROPS] = dict(
  moe=dict(
    capacity=PerToken(factor=0.75), group_size=2 * T, router=Hash(of='bigram')
  )
)
# Options of sparse layers that have parameters of their own.
MORE_MOE = {
  'decoder': dict(
    extra_ffn=True,
    router=TokenChoice(
      gates='renormalized_after_drop', second_policy='threshold', jitter=0.1
    ),
  ),
  'encoder_decoder': dict(
    router=TokenChoice(gates='renormalized', use_bias=True)
  ),
}


@functools.cache
def own_kind():
  scope = {'__name__': 'readme'}
  exec(compile(CODE[1], str(README), 'exec'), scope)
  return scope['BagOfTokensOptions']


def options_of(kind, **changes):
  if kind == 'own':
    # The README's model has no layer, and so no option of one.
    return own_kind()(width=12, **changes).filled(V, T)
  options = OPTIONS.get(kind, {}) | changes
  moe = OPTIONS.get(kind, {}).get('moe', {}) | options.pop('moe', {})
  kind = kind.split()[0]
  return tiny.options(dict(capacity=All()) | moe, kind, **options)


@functools.cache
def program(kind):
  """A model, its parameters, and a compiled function from a batch."""
  model = options_of(kind).build()
  run = jax.jit(lambda p, b: model.apply({'params': p}, **model.inputs(b)))
  return model, tiny.params_of(model), run


def outputs(kind, batch):
  _, params, run = program(kind)
  logits, aux = run(params, batch)
  return np.asarray(logits), aux


# Two documents, of three and of five tokens, and padding; one; one and padding.
IDS = np.int32([[1] * 3 + [2] * 5 + [0] * 2, [1] * T, [1] * 6 + [0] * 4])
SOURCE_IDS = np.int32([[1] * 4 + [2] * 3, [1] * 5 + [0] * 2, [1] * S])


def positions_of(ids):
  rows = ids.tolist()
  return np.int32([[r[:i].count(x) for i, x in enumerate(r)] for r in rows])


def make_batch(kind):
  """The batch of these documents that the model takes."""
  model = program(kind)[0]
  prefixes = model.stacks.sequences
  batch = {'targets': tiny.tokens(3), 'loss_weights': np.float32(IDS > 0)}
  for prefix, ids in zip(prefixes[::-1], (IDS, SOURCE_IDS)):
    batch |= {
      f'{prefix}tokens': tiny.tokens(len(prefix), ids.shape),
      f'{prefix}segment_ids': ids,
      f'{prefix}positions': positions_of(ids),
    }
  shapes = model.batch_shapes(B, S if len(prefixes) > 1 else T, T)
  assert {n: (x.shape, x.dtype) for n, x in shapes.items()} == {
    n: (x.shape, x.dtype) for n, x in batch.items()
  }
  inputs = model.inputs(on_device(batch))
  assert {*batch} - {*inputs} == {'targets', 'loss_weights'}
  return batch


def on_device(batch):
  """The batch as arrays of JAX, which a model takes."""
  return jax.tree.map(jnp.asarray, batch)


def edited(batch, name, *places):
  """The batch with other tokens at the places (row, slice)."""
  tokens = batch[name].copy()
  for place in places:
    tokens[place] = (tokens[place] + 1) % V
  return batch | {name: tokens}


@pytest.mark.parametrize('kind', KINDS)
def test_outputs_losses_and_layers_are_as_described(kind):
  model, params, _ = program(kind)
  batch = make_batch(kind)
  logits, aux = outputs(kind, batch)
  assert logits.shape == (B, T, V) and logits.dtype == np.float32
  L = model.stacks.num_layers
  assert {leaf.shape[0] for leaf in jax.tree.leaves(aux)} == {L}
  # Sparse layers count real tokens, and what the model says that they count.
  counts = model.stacks.routed_tokens(on_device(batch))
  assert len(counts) == L
  real = {
    p: (batch[f'{p}segment_ids'] > 0).sum() for p in model.stacks.sequences
  }
  for i in model.stacks.sparse_layers:
    expected = real[model.stacks.sequence_of(i)]
    assert aux.stats.tokens[i] == counts[i] == expected
  empty = {n: jnp.zeros_like(x) for n, x in batch.items()}
  np.testing.assert_array_equal(model.stacks.routed_tokens(empty), np.ones(L))
  losses = model.loss(jnp.asarray(logits), on_device(batch))
  log_probs = jax.nn.log_softmax(logits)
  nats = -np.take_along_axis(log_probs, batch['targets'][..., None], -1)
  weighted = batch['loss_weights'] > 0
  np.testing.assert_allclose(
    losses.nats[weighted], nats[..., 0][weighted], rtol=1e-5
  )
  # Every parameter has a role, a form and its axes.
  trees = models.describe(model)
  roles = jax.tree.leaves(trees.roles, is_leaf=lambda x: isinstance(x, Role))
  axes = jax.tree.leaves(trees.axes, is_leaf=lambda x: isinstance(x, tuple))
  shapes = jax.tree.leaves(params)
  for role, names, leaf in zip(roles, axes, shapes, strict=True):
    assert role.role and role.form and len(names) == leaf.ndim


@pytest.mark.parametrize('kind', models.MODELS.builtin)
def test_packed_documents_have_the_outputs_they_have_alone(kind):
  batch = make_batch(kind)
  packed, packed_aux = outputs(kind, batch)
  documents = [(0, 1), (0, 2), (1, 1), (2, 1)]
  alone_loads = 0
  for row, number in documents:
    alone = {n: np.zeros_like(x) for n, x in batch.items()}
    for prefix in program(kind)[0].stacks.sequences:
      place = batch[f'{prefix}segment_ids'][row] == number
      for name in ('tokens', 'positions'):
        values = batch[f'{prefix}{name}'][row, place]
        alone[f'{prefix}{name}'][0, : place.sum()] = values
      alone[f'{prefix}segment_ids'][0, : place.sum()] = 1
    logits, aux = outputs(kind, alone)
    place = IDS[row] == number
    np.testing.assert_allclose(
      logits[0, : place.sum()], packed[row, place], rtol=1e-4, atol=1e-4
    )
    alone_loads += aux.stats.load
  np.testing.assert_allclose(packed_aux.stats.load, alone_loads)
  # Documents do change each other where nothing separates them.
  joined = {
    n: np.minimum(x, 1) if 'segment' in n else x for n, x in batch.items()
  }
  change = np.abs(outputs(kind, joined)[0] - packed)[0, 3:8]
  assert packed.std() > 0.1 and change.max() > 0.01


@pytest.mark.parametrize('kind', [*KINDS, DROPS])
def test_later_tokens_and_padding_change_nothing(kind):
  batch = make_batch(kind)
  before, aux = outputs(kind, batch)
  assert (aux.stats.overflowed.sum() > 0) == (kind == DROPS)
  after, _ = outputs(kind, edited(batch, 'tokens', np.s_[1, 6:], np.s_[2, 6:]))
  np.testing.assert_array_equal(after[1, :6], before[1, :6])
  np.testing.assert_array_equal(after[2, :6], before[2, :6])
  np.testing.assert_array_equal(after[0], before[0])
  assert np.abs(after[1, 6:] - before[1, 6:]).max(-1).min() > 1e-4
  if 'encoder_tokens' in batch:
    # All of its encoder's real tokens change a row, and padding does not.
    after, _ = outputs(
      kind, edited(batch, 'encoder_tokens', np.s_[1, 5:], np.s_[2, S - 1])
    )
    np.testing.assert_array_equal(after[1], before[1])
    assert np.abs(after[2, :6] - before[2, :6]).max(-1).min() > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize('kind', models.MODELS.builtin)
def test_gradients_dropout_scan_and_remat(kind):
  has_blocks = models.MODELS.get(kind).has_blocks
  changes = dict(dropout=0.5, moe=MORE_MOE.get(kind, {}))
  if has_blocks:
    untied = dict(embedding=dict(tie=False))
    changes |= dict(use_bias=True, norm=LayerNorm(), **untied)
  options, batch = options_of(kind, **changes), make_batch(kind)
  params = tiny.params_of(options.build())
  rngs = {'router': tiny.key(0), 'dropout': tiny.key(1)}

  def run(train, **changes):
    """Gradients of a loss, and the logits."""
    model = dataclasses.replace(options, **changes).build()

    def loss(params):
      logits, aux = model.apply(
        {'params': params}, **model.inputs(batch), train=train, rngs=rngs
      )
      losses = sum(jnp.sum(loss) for loss in aux.losses.values())
      return (logits**2).mean() + losses, logits

    return jax.jit(jax.grad(loss, has_aux=True))(params)

  grads, train_logits = run(True)
  for name, leaf in tiny.leaves(grads).items():
    size = np.abs(np.asarray(leaf))
    assert np.isfinite(size).all(), name
    # Adding one vector to all keys changes all scores of a query equally.
    if not name.endswith('b_key'):
      layers = size if '/layer_' in name else size[None]
      assert (layers.reshape(len(layers), -1).max(1) > 1e-9).all(), name
  # Dropout is of training alone.
  logits = run(False)[1]
  np.testing.assert_allclose(logits, run(False, dropout=0.0)[1], atol=1e-5)
  assert np.abs(train_logits - logits).max() > 0.1
  if has_blocks:
    other = run(True, scan_layers=False, remat='full')
    tiny.assert_trees_close(other, (grads, train_logits), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('kind', models.MODELS.builtin)
def test_what_is_float32_in_a_bfloat16_model(kind):
  types = dict(dtype='bfloat16', param_dtype='bfloat16')
  model = options_of(kind, numerics=types).build()
  trees, batch = models.describe(model), on_device(make_batch(kind))
  roles = jax.tree.leaves(trees.roles, is_leaf=lambda x: isinstance(x, Role))
  for role, leaf in zip(roles, jax.tree.leaves(trees.shapes), strict=True):
    # So is the table of relative positions, a bias of scores.
    table = role.form == 'table' and role.role == 'attention'
    is_float32 = table or role.role in ('router', 'norm')
    assert leaf.dtype == ('float32' if is_float32 else 'bfloat16'), role
  params = tiny.params_of(model)
  results = jax.eval_shape(
    lambda: model.apply({'params': params}, **model.inputs(batch))
  )
  dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(results)}
  assert dtypes == {'float32'}


@pytest.mark.slow
@pytest.mark.parametrize('kind', models.MODELS.builtin)
def test_parameters_are_those_of_rows_of_any_length(kind):
  model, batch = program(kind)[0], on_device(make_batch(kind))
  init = jax.jit(lambda key: model.init(key, **model.inputs(batch)))
  expected = nn.meta.unbox(init(tiny.key(3))['params'])
  params = nn.meta.unbox(models.init_params(model, tiny.key(3)))
  tiny.assert_trees_close(params, expected, rtol=0, atol=0)


@pytest.mark.parametrize('kind', models.MODELS.builtin)
def test_wrong_sparse_layers_hide_no_other_problem(kind):
  model = {'kind': kind, 'moe': {'layers': 'every 5'}}
  flags = {'model': model, 'optimizer': {'epsilon': -1.0}}
  with pytest.raises(OptionError) as error:
    run_config.read(merge(base.get_config(), flags))
  problems = error.value.problems
  assert "model.moe.layers='every 5' with num_layers=4" in problems
  assert any(text.startswith('optimizer.epsilon=-1.0') for text in problems)


def test_a_model_is_built_of_its_options(capsys):
  exec(compile(CODE[0], str(README), 'exec'), {})
  assert capsys.readouterr().out == '(1,)\n'
