"""Low-rank adapters: changes by a step, and outputs of a merged model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import models, partitioning
from moe_jax.config import OptionError
from moe_jax.models import lora
from moe_jax.models.lora import LoraOptions
from moe_jax.training import losses, step
from moe_jax.training.programs import make_programs
from tests.training import tiny

V = 264
PARTS = 'attention + ffn + experts'
RANK, ALPHA = 3, 5.0
# One layer has all parts.
MODEL = dict(
  vocab_size=V,
  num_layers=1,
  moe=dict(num_selected=2, layers='all', extra_ffn=True),
)


@functools.cache
def build_programs(devices=1, microbatches=1, dropout=0.0):
  sizes = dict(zip(partitioning.MESH_AXES, (1, 2, 2, 2)))
  options = tiny.options(
    batch_size=8,
    microbatches=microbatches,
    lora=dict(rank=RANK, alpha=ALPHA, parts=PARTS, dropout=dropout),
    model=MODEL,
    optimizer=dict(learning_rate=0.1),
    **(dict(mesh=sizes) if devices == 8 else {}),
  )
  mesh = options.mesh.make(jax.devices()[:devices])
  return options, make_programs(options, options.build(), mesh)


def batch_of(options, programs):
  rows = tiny.batch(options, vocab_size=V)
  return programs.put(jax.tree.map(np.asarray, rows))


def arrays(tree):
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {partitioning.path_name(path): np.asarray(x) for path, x in leaves}


@functools.cache
def train_three_steps(**kwargs):
  """Parameters before and after three steps, the state, and the losses."""
  options, programs = build_programs(**kwargs)
  state = tiny.first_state(programs)
  before, batch, step_losses = (
    arrays(state.params),
    batch_of(options, programs),
    [],
  )
  for _ in range(3):
    state, metrics = programs.train_step(state, batch)
    step_losses.append(float(metrics.loss))
  return before, arrays(state.params), state, step_losses


def test_one_pair_for_each_layer_and_expert():
  _, programs = build_programs()
  shapes = {name: x.shape for name, x in train_three_steps()[0].items()}
  (w_in,) = (
    n for n in shapes if n.endswith('experts/w_in') and n[:4] != 'lora'
  )
  layers, E, M, F = shapes[w_in]
  assert shapes[f'lora/{w_in}/a'] == (layers, E, M, RANK)
  assert shapes[f'lora/{w_in}/b'] == (layers, E, RANK, F)
  # An attention output contracts heads and their width: [H, D, M].
  (w_out,) = (
    n for n in shapes if n.endswith('attention/w_out') and n[:4] != 'lora'
  )
  layers, H, D, M = shapes[w_out]
  assert shapes[f'lora/{w_out}/a'] == (layers, H, D, RANK)
  assert shapes[f'lora/{w_out}/b'] == (layers, RANK, M)
  axes = arrays_of_axes(programs.adapters.trees.axes)
  assert axes[f'lora/{w_in}/a'] == ('layers', 'expert', 'embed', None)
  assert axes[f'lora/{w_in}/b'] == ('layers', 'expert', None, 'expert_mlp')


def arrays_of_axes(tree):
  leaves = jax.tree_util.tree_leaves_with_path(
    tree, is_leaf=lambda leaf: isinstance(leaf, tuple)
  )
  return {partitioning.path_name(path): leaf for path, leaf in leaves}


def test_the_base_keeps_its_bits_and_has_no_state():
  before, after, state, _ = train_three_steps()
  for name, value in after.items():
    assert (value == before[name]).all() == (not name.startswith('lora/')), name
  moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
  factors = sum(x.size for n, x in after.items() if n.startswith('lora/'))
  assert moments == 2 * factors  # AdamW has two


def test_adapters_are_merged_by_one_compiled_function(caplog):
  state, (_, programs) = train_three_steps()[2], build_programs()
  programs.variables(state)
  with jax.log_compiles():
    programs.variables(state)
  assert 'merged_kernels' not in caplog.text


def test_merged_equals_applied_in_logits():
  """Training computes x W + (alpha / rank) (x A) B."""
  options, programs = build_programs()
  state = train_three_steps()[2]
  merged = programs.variables(state)['params']
  plain, unmerged = arrays(merged), arrays(state.params)
  x = np.random.default_rng(0).normal(size=(7, 16)).astype(np.float32)
  changed = [n for n, value in plain.items() if (value != unmerged[n]).any()]
  assert {f'lora/{name}/a' for name in changed} == {
    name
    for name in unmerged
    if name.startswith('lora/') and name.endswith('/a')
  }
  (name,) = (n for n in changed if n.endswith('experts/w_in'))
  for expert in range(4):
    a, b = (unmerged[f'lora/{name}/{f}'][0, expert] for f in 'ab')
    applied = x @ unmerged[name][0, expert] + ALPHA / RANK * (x @ a) @ b
    np.testing.assert_allclose(x @ plain[name][0, expert], applied, atol=1e-5)
  # The model's logits with merged kernels are those of the training loss.
  model, batch = options.build(), batch_of(options, programs)

  def logits(params):
    return model.apply({'params': params}, **model.inputs(batch))[0]

  applied = jax.jit(lambda p: logits(programs.adapters.merged(p)))(state.params)
  np.testing.assert_allclose(jax.jit(logits)(merged), applied, atol=1e-5)


@pytest.mark.slow
def test_the_first_loss_and_the_factors_gradient_follow_from_the_kernels():
  """dA = s dW B^T and dB = s A^T dW, summed over no layer or expert."""
  options, programs = build_programs()
  model, batch = options.build(), batch_of(options, programs)
  weights = losses.loss_weights(model, options.logits_z_weight)
  normalizers = losses.normalizers(model, batch)
  adapters, state = programs.adapters, tiny.first_state(programs)
  kernel_grad_fn = jax.jit(step.make_grad_fn(model, weights))
  # The first loss is that of the base, bit for bit, with the key of the first
  # step, so that routers draw the same.
  key = jax.random.fold_in(jax.random.key(state.seed), 0)
  base = adapters.base(state.params)
  (loss, _), _ = kernel_grad_fn(base, batch, normalizers, key)
  assert float(loss) == train_three_steps()[3][0]
  assert len(set(train_three_steps()[3])) == 3
  params = jax.tree.map(jnp.asarray, train_three_steps()[2].params)
  factor_grad_fn = step.make_grad_fn(
    model, weights, 1, programs.trained.part, adapters.merged
  )
  factor_grads = jax.jit(factor_grad_fn)(params, batch, normalizers, key)[1]
  assert set(arrays(factor_grads)) == adapters.names
  kernel_grads = kernel_grad_fn(
    adapters.merged(params), batch, normalizers, key
  )[1]
  kernel_grads, factor_grads, params_by_name = (
    arrays(kernel_grads),
    arrays(factor_grads),
    arrays(params),
  )
  s = ALPHA / RANK
  for name in (n for n in kernel_grads if f'lora/{n}/a' in params_by_name):
    kernel, g = adapters.kernels[tuple(name.split('/'))], kernel_grads[name]
    stack = g.shape[: kernel.stacked]
    inputs = int(np.prod(g.shape[kernel.stacked :][: kernel.inputs]))
    g = g.reshape(*stack, inputs, -1)
    a = params_by_name[f'lora/{name}/a'].reshape(*stack, inputs, RANK)
    b = params_by_name[f'lora/{name}/b'].reshape(*stack, RANK, -1)
    for factor, expected in (
      ('a', s * g @ b.swapaxes(-1, -2)),
      ('b', s * a.swapaxes(-1, -2) @ g),
    ):
      gradient = factor_grads[f'lora/{name}/{factor}']
      np.testing.assert_allclose(
        gradient.reshape(expected.shape), expected, rtol=1e-4, atol=1e-6
      )
      assert np.abs(gradient).max() > 0


@pytest.mark.slow
def test_a_mesh_and_accumulation_change_nothing():
  kwargs = dict(devices=8, microbatches=2)
  expected, actual = train_three_steps()[1], train_three_steps(**kwargs)[1]
  for name, value in actual.items():
    np.testing.assert_allclose(
      value, expected[name], rtol=2e-3, atol=2e-4, err_msg=name
    )
  state, (_, programs) = (
    train_three_steps(**kwargs)[2],
    build_programs(**kwargs),
  )
  merged = programs.variables(state)['params']
  for base_kernel, kernel in zip(
    jax.tree.leaves(programs.adapters.base(state.params)),
    jax.tree.leaves(merged),
    strict=True,
  ):
    assert base_kernel.sharding == kernel.sharding


def test_dropout_leaves_out_whole_directions():
  _, programs = build_programs(dropout=0.5)
  params = train_three_steps()[2].params
  adapters = programs.adapters
  params_by_name, drawn = (
    arrays(params),
    arrays(adapters.merged(params, jax.random.key(0))),
  )
  kinds = set()
  (name,) = (
    n for n in params_by_name if n.endswith('experts/w_in') and n[:4] != 'lora'
  )
  a, b = (params_by_name[f'lora/{name}/{f}'][0] for f in 'ab')
  for e in range(4):
    delta = drawn[name][0, e] - params_by_name[name][0, e]
    # The sums of directions, each at twice its weight, that explain delta.
    fits = []
    for bits in range(2**RANK):
      is_kept = np.array([bits >> i & 1 for i in range(RANK)])
      expected = 2 * ALPHA / RANK * (a[e] * is_kept) @ b[e]
      if np.abs(delta - expected).max() < 1e-5:
        fits.append(bits)
    assert len(fits) == 1
    kinds |= set(fits)
  assert len(kinds) > 1  # experts draw apart
  undropped = arrays(adapters.merged(params))
  assert (
    undropped[name] == arrays(build_programs()[1].adapters.merged(params))[name]
  ).all()


@pytest.mark.parametrize(
  ('parts', 'message'),
  [
    ('lstm', "lora.parts='lstm': the model has no parameter of 'lstm'"),
    ('embeddings', "lora.parts='embeddings' selects no kernel"),
  ],
)
def test_parts_without_a_kernel_are_refused(parts, message):
  trees = models.describe(build_programs()[0].build())
  with pytest.raises(ValueError, match=message):
    lora.adapt(LoraOptions(rank=2, parts=parts), trees)


def test_what_trains_beside_adapters_is_refused():
  with pytest.raises(
    OptionError, match=r"'router' has no.*set trainable='all'"
  ):
    tiny.options(lora=dict(rank=2), trainable='router')
