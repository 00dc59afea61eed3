"""Low-rank adapters: changes by a step, and outputs of a merged model."""

import functools

import jax
import numpy as np
import pytest

from moe_jax import models
from moe_jax.config import OptionError
from moe_jax.models import lora
from moe_jax.models.lora import LoraOptions
from tests.finetuning import steps
from tests.finetuning.steps import V, arrays
from tests.models.tiny import assert_trees_close
from tests.training import tiny

PARTS = 'attention + ffn + experts'
RANK, ALPHA = 3, 5.0
# One layer has all parts.
MODEL = dict(
  vocab_size=V,
  num_layers=1,
  moe=dict(num_selected=2, layers='all', extra_ffn=True),
)


W_IN, W_OUT = (
  f'layers/layer_0/{name}' for name in ('moe/experts/w_in', 'attention/w_out')
)


@functools.cache
def build_programs(devices=1, microbatches=1, dropout=0.0):
  return steps.programs_of(
    devices,
    microbatches=microbatches,
    lora=dict(rank=RANK, alpha=ALPHA, parts=PARTS, dropout=dropout),
    model=MODEL,
    optimizer=dict(learning_rate=0.1),
  )


@functools.cache
def train_three_steps(**kwargs):
  """Parameters before and after three steps, and the state."""
  return steps.train(*build_programs(**kwargs), 3)


def test_one_pair_for_each_layer_and_expert():
  shapes = {name: x.shape for name, x in train_three_steps()[0].items()}
  layers, E, M, F = shapes[W_IN]
  assert shapes[f'lora/{W_IN}/a'] == (layers, E, M, RANK)
  assert shapes[f'lora/{W_IN}/b'] == (layers, E, RANK, F)
  # An attention output contracts heads and their width: [H, D, M].
  layers, H, D, M = shapes[W_OUT]
  assert shapes[f'lora/{W_OUT}/a'] == (layers, H, D, RANK)
  assert shapes[f'lora/{W_OUT}/b'] == (layers, RANK, M)


def test_the_base_keeps_its_bits_and_has_no_state():
  before, after, state = train_three_steps()
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
  factors = {n for n in unmerged if n[:5] == 'lora/' and n.endswith('/a')}
  assert {f'lora/{name}/a' for name in changed} == factors
  for expert in range(4):
    a, b = (unmerged[f'lora/{W_IN}/{f}'][0, expert] for f in 'ab')
    applied = x @ unmerged[W_IN][0, expert] + ALPHA / RANK * (x @ a) @ b
    np.testing.assert_allclose(x @ plain[W_IN][0, expert], applied, atol=1e-5)
  # The model's logits with merged kernels are those of the training loss.
  model, batch = options.build(), steps.batch_of(options, programs)

  def logits(params):
    return model.apply({'params': params}, **model.inputs(batch))[0]

  applied = jax.jit(lambda p: logits(programs.adapters.merged(p)))(state.params)
  np.testing.assert_allclose(jax.jit(logits)(merged), applied, atol=1e-5)


@pytest.mark.slow
def test_a_mesh_and_accumulation_change_nothing():
  kwargs = dict(devices=8, microbatches=2)
  _, actual, state = train_three_steps(**kwargs)
  assert_trees_close(actual, train_three_steps()[1], rtol=2e-3, atol=2e-4)
  _, programs = build_programs(**kwargs)
  base, merged = (
    jax.tree.map(lambda x: x.sharding, params)
    for params in (
      programs.adapters.base(state.params), programs.variables(state)['params']
    )
  )  # fmt: skip
  assert base == merged


def test_dropout_leaves_out_whole_directions():
  _, programs = build_programs(dropout=0.5)
  params, adapters = train_three_steps()[2].params, programs.adapters
  drawn = arrays(adapters.merged(params, jax.random.key(0)))[W_IN][0]
  base, a, b = (
    arrays(params)[name][0]
    for name in (W_IN, *(f'lora/{W_IN}/{f}' for f in 'ab'))
  )
  kinds = set()
  for e in range(4):
    delta = drawn[e] - base[e]
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
  undropped, expected = (
    arrays(a.merged(params)) for a in (adapters, build_programs()[1].adapters)
  )
  np.testing.assert_array_equal(undropped[W_IN], expected[W_IN])


def test_parts_without_a_kernel_are_refused():
  trees = models.describe(build_programs()[0].build())
  with pytest.raises(ValueError, match="'embeddings' selects no kernel"):
    lora.adapt(LoraOptions(rank=2, parts='embeddings'), trees)
  with pytest.raises(
    OptionError, match=r"'router' has no.*set trainable='all'"
  ):
    tiny.options(lora=dict(rank=2), trainable='router')
