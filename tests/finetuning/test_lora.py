"""Low-rank adapters: changes by a step, and outputs of a merged model."""

import functools

import jax
import numpy as np
import pytest

from moe_jax import models, partitioning
from moe_jax.config import OptionError
from moe_jax.models import lora
from moe_jax.models.lora import LoraOptions
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


def test_the_base_keeps_its_bits_and_has_no_state():
  before, after, state, _ = train_three_steps()
  for name, value in after.items():
    assert (value == before[name]).all() == (not name.startswith('lora/')), name
  moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
  factors = sum(x.size for n, x in after.items() if n.startswith('lora/'))
  assert moments == 2 * factors  # AdamW has two


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


def test_parts_without_a_kernel_are_refused():
  trees = models.describe(build_programs()[0].build())
  with pytest.raises(ValueError, match="'embeddings' selects no kernel"):
    lora.adapt(LoraOptions(rank=2, parts='embeddings'), trees)
  with pytest.raises(
    OptionError, match=r"'router' has no.*set trainable='all'"
  ):
    tiny.options(lora=dict(rank=2), trainable='router')
