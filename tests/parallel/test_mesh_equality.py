"""A step on any mesh equals one device's, and rows are exchanged as planned."""

import dataclasses
import functools
import re
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from moe_jax import models, partitioning
from moe_jax.layers import (
  AttentionOptions,
  Dropless,
  FeedForwardExpert,
  Gather,
  LatentOptions,
  Rotary,
  SharedExpertOptions,
  Yarn,
)
from moe_jax.layers.routers import (
  ExpertChoice,
  Hash,
  Hierarchical,
  Sentence,
  Task,
  TokenChoice,
  TopologyAware,
)
from moe_jax.models.trees import init_router_state, move_router_state
from moe_jax.parallel.exchange import InRing
from moe_jax.parallel.shadowing import Shadowing
from moe_jax.partitioning import ShardingOptions
from moe_jax.routing.capacity import All, PerToken
from moe_jax.training.losses import LossWeights, normalizers
from moe_jax.training.step import TrainState, make_grad_fn, train_step
from tests.models import tiny

B, T, V, E, K = 8, 6, 28, 8, 2
CLIP = 0.01  # far below the gradient's norm
BIASED = TokenChoice(
  gates='renormalized',
  jitter=0.01,
  balance_bias_rate=0.01,
  balance_bias_scores='softmax',
)
TIGHT = PerToken(1.0)
IN_GROUPS = TokenChoice(
  gates='sigmoid_renormalized',
  gate_scale=2.5,
  jitter=0.01,
  balance_bias_rate=0.01,
  expert_groups=4,
  chosen_expert_groups=2,
  expert_group_score='two_best',
  # Rows of one loss lie on one device, on several, and on all.
  sequence_balance_weight=0.1,
  batch_balance_weight=0.1,
  batch_balance_rows=4,
  global_balance_weight=0.1,
)
GATHER = {'router': BIASED}
# Rows cost so much to send that experts are shadowed whatever the counts are.
SHADOWED = Shadowing(experts=3, gigabytes=1e-6)
DROPLESS = {'dispatch': Dropless()}
LEAKY = {'allow_future_leak': True}
BY_EXPERT = {'router': ExpertChoice(jitter=0.01), **LEAKY}
# The devices split heads, and with them norms over all heads, and sinks.
MODELS = {
  'deepseek': dict(
    attention=LatentOptions(
      4, query_rank=8, kv_rank=8, plain_width=4, rotary_width=2, value_width=6
    ),
    positions=Rotary(
      interleaved=True, scaling=Yarn(factor=4.0, original_len=3)
    ),
  ),
  'gpt_oss': dict(
    attention=AttentionOptions(
      4, num_kv_heads=2, head_width=6, window=2, full_layers='every 2',
      sinks=True, qk_norm='all', biases='all',
    ),
  ),
  'lstms': {'kind': 'lstm', 'num_layers': 3, 'lstm': {'hidden': 24}},
  'by_task': {'num_tasks': 4},
}  # fmt: skip
ROOM = {'capacity': All()}
LAYERS = dict(
  gather=GATHER,
  dropless={**GATHER, **ROOM, **DROPLESS},
  ring={**GATHER, 'dispatch': Gather(InRing(), SHADOWED)},
  plain_ring={**GATHER, 'dispatch': Gather(InRing())},
  by_expert_in_ring={**BY_EXPERT, 'dispatch': Gather(InRing(), SHADOWED)},
  by_expert=BY_EXPERT,
  by_expert_dropless={**BY_EXPERT, **DROPLESS},
  lstms={'router': Hierarchical(branching=4, branches_selected=2, noisy=True)},
  topology={
    'router': TopologyAware(
      gates='renormalized', devices=4, per_node=2, outgoing_fraction=0.4,
      jitter=0.01,
    ),
    **LEAKY,
  },
  deepseek={
    'router': IN_GROUPS,
    'shared_expert': SharedExpertOptions(16, gated=True),
  },
  gpt_oss={
    'router': Hash(of='bigram'),
    'expert': FeedForwardExpert(activation='clamped_swiglu', bias='all'),
  },
  by_task={'router': Task(jitter=0.01), **ROOM, **DROPLESS},
  by_sentence={'router': Sentence(jitter=0.01), **ROOM, **LEAKY},
)  # fmt: skip
ROOMY = ('dropless', 'by_task', 'by_sentence')
PLAIN = {
  'ring': 'gather',
  'plain_ring': 'gather',
  'by_expert_dropless': 'by_expert',
  'by_expert_in_ring': 'by_expert',
}


class Result(NamedTuple):
  """Results of one step on the host, and the text of its program."""

  loss: Any
  grads: Any
  update: Any
  sums: Any
  balance_bias: Any
  text: str


def model_of(kind, rules, remat='', vocab_size=V, tie=True, **moe):
  sparse = dict(layers='every 2', num_experts=E, num_selected=K, capacity=TIGHT)
  embedding = {'tie': tie, 'logits_bias': not tie}
  sizes = dict(vocab_size=vocab_size, width=16, ffn={'hidden': 24})
  sizes |= {'embedding': embedding, **({'remat': remat} if remat else {})}
  options = tiny.options(
    {**sparse, **LAYERS[kind], **moe}, **sizes, **MODELS.get(kind, {})
  )
  return options.build(rules)


def make_batch(vocab_size=V):
  rng = np.random.default_rng(0)
  segment_ids = np.ones((B, T), np.int32)
  segment_ids[0, 4:] = 0
  segment_ids[1:, 3:] = 2
  return {
    'task_ids': np.tile(np.arange(B, dtype=np.int32)[:, None] % 3, (1, T)),
    'tokens': rng.integers(0, vocab_size, (B, T), np.int32),
    'targets': rng.integers(0, vocab_size, (B, T), np.int32),
    'segment_ids': segment_ids,
    'positions': np.tile(np.arange(T, dtype=np.int32), (B, 1)),
    'loss_weights': (segment_ids > 0).astype(np.float32),
  }


def kept_gradient() -> optax.GradientTransformation:
  """An optimizer that changes nothing and keeps the gradient as its state."""
  return optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda updates, state, params=None: (updates, updates),
  )


WEIGHTS = {
  **{f'{name}_loss': 0.1 for name in ('balance', 'z', 'importance', 'load')},
  'sequence_balance_loss': 0.1,
  'batch_balance_loss': 0.2,
  'global_balance_loss': 0.4,
}
OPTIMIZER = optax.chain(
  kept_gradient(), optax.clip_by_global_norm(CLIP), optax.scale(-1.0)
)


@functools.cache
def first_state(model):
  """A state whose bias is not zero, so that choices depend on it."""
  params = tiny.params_of(model)
  rng = np.random.default_rng(1)
  bias = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype),
    init_router_state(model),
  )
  step = jnp.zeros((), jnp.int32)
  seed = jnp.zeros((), jnp.uint32)
  return TrainState(step, seed, params, OPTIMIZER.init(params), bias)


@functools.cache
def step_of(
  kind, mesh_shape='', sharding=(), microbatches=1, salt=0.0, **moe
) -> Result:
  """The result of a step on a mesh, or without its shape on one device."""
  rules = ShardingOptions(**dict(sharding)).rules
  model = model_of(kind, rules, **moe)
  # Neither rules nor recomputation change the parameters.
  plain_model = model_of(kind, ShardingOptions().rules, **{**moe, 'remat': ''})
  state = first_state(plain_model)
  batch = make_batch(moe.get('vocab_size', V))
  weights = {name: WEIGHTS[name] for name in model.stacks.loss_weights()}
  shardings = None
  if mesh_shape:
    sizes = dict(zip(partitioning.MESH_AXES, map(int, mesh_shape.split('x'))))
    mesh = partitioning.make_mesh(sizes)
    trees = models.describe(model)
    params = partitioning.tree_shardings(mesh, rules, trees.axes, trees.shapes)
    replicated = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda _: replicated, state)
    shardings = shardings.replace(
      params=params, opt_state=(params, *shardings.opt_state[1:])
    )
    state = jax.device_put(state, shardings)
    batch_sharding = partitioning.sharding(mesh, rules, ('batch', None), (B, T))
    batch = jax.device_put(batch, batch_sharding)
  run = functools.partial(
    train_step,
    grad_fn=make_grad_fn(model, LossWeights(weights, 0.1), microbatches),
    optimizer=OPTIMIZER,
    # This has no effect here, but the compilation cache sees another program.
    rate=optax.constant_schedule(salt),
    normalize=functools.partial(normalizers, model),
    move_router_state=functools.partial(move_router_state, model.stacks),
  )
  run = jax.jit(run, out_shardings=(shardings, None)).lower(state, batch)
  compiled = run.compile()
  new, metrics = jax.device_get(compiled(state, batch))
  return Result(
    loss=metrics.loss,
    grads=new.opt_state[0],
    update=jax.tree.map(np.subtract, new.params, jax.device_get(state.params)),
    sums=metrics.sums,
    balance_bias=new.router_state,
    text=compiled.as_text(),
  )


def assert_equal(result: Result, one: Result):
  np.testing.assert_allclose(result.loss, one.loss, rtol=1e-5)
  # The counts of rows that move between devices depend on the mesh.
  sums = [
    r.sums._replace(aux=r.sums.aux._replace(exchange=())) for r in (result, one)
  ]
  tiny.assert_trees_close(*sums, rtol=1e-4, atol=1e-4)
  tiny.assert_trees_close(result.grads, one.grads, rtol=1e-3, atol=1e-5)
  tiny.assert_trees_close(result.update, one.update, rtol=1e-3, atol=1e-6)
  tiny.assert_trees_close(
    result.balance_bias, one.balance_bias, rtol=0, atol=1e-7
  )


# Other tests cover the exchange of rows on more meshes. Each kind of attention
# and layer has a router of its own.
CASES = [
  ('gather', '1x2x2x2'),
  ('dropless', '1x2x2x2'),
  ('by_expert_in_ring', '1x2x2x2'),
  ('by_expert_dropless', '1x2x2x2'),
  ('by_sentence', '1x2x2x2'),
  ('gpt_oss', '1x2x2x2'),
  ('deepseek', '1x2x2x2'),
  ('lstms', '1x2x2x2'),
  ('topology', '2x2x2x1'),
]
FAST = CASES[0]


@pytest.mark.parametrize(
  ('kind', 'mesh_shape'),
  [
    pytest.param(*case, marks=() if case == FAST else pytest.mark.slow)
    for case in CASES
  ],
)
def test_a_step_equals_one_device(kind, mesh_shape, capfd):
  one = step_of(PLAIN.get(kind, kind))
  stats = one.sums.aux.stats
  assert (stats.overflowed.sum() > 0) == (kind not in ROOMY)
  norm = optax.global_norm(one.grads)
  assert norm > 2 * CLIP
  np.testing.assert_allclose(optax.global_norm(one.update), CLIP, rtol=1e-3)
  assert np.ptp(stats.load) > 0
  capfd.readouterr()
  # The compiler's messages would be missing if the program came from a cache.
  salt = time.time() % 1000 if kind == 'gather' else 0.0
  assert_equal(step_of(kind, mesh_shape, salt=salt), one)
  assert 'rematerialization' not in capfd.readouterr().err


@pytest.mark.parametrize(
  ('mesh_shape', 'vocab_size', 'tie'),
  [
    ('1x2x1x4', 25, False),
    pytest.param('2x2x1x2', 257, True, marks=pytest.mark.slow),
  ],
)
def test_a_vocabulary_that_does_not_divide_is_padded(
  mesh_shape, vocab_size, tie, capfd
):
  sizes = dict(vocab_size=vocab_size, tie=tie)
  one = step_of('gather', **sizes)
  capfd.readouterr()
  result = step_of('gather', mesh_shape, salt=time.time() % 1000, **sizes)
  assert_equal(result, one)
  assert 'rematerialization' not in capfd.readouterr().err
  # Each device has its part of the table, and makes its part of the logits.
  num_parts = int(mesh_shape[-1])
  rows = B * T // (8 // num_parts)
  assert f'f32[{rows},{-(-vocab_size // num_parts)}]' in result.text
  assert f'f32[{rows},{vocab_size}]' not in result.text


# Experts are split over two axes, or over one that no rows travel along.
SPREAD = (('expert', 'expert,tensor'), ('expert_mlp', ''))
STILL = (('expert', 'tensor'), ('expert_mlp', ''))
TWO = dict(microbatches=2)


@pytest.mark.as_users_compile
@pytest.mark.slow
@pytest.mark.parametrize(
  ('kind', 'mesh_shape', 'options'),
  [
    ('plain_ring', '2x1x2x2', dict(sharding=SPREAD)),
    ('dropless', '2x1x2x2', dict(sharding=SPREAD, microbatches=2)),
    ('ring', '2x1x1x4', dict(sharding=STILL)),
    ('by_task', '2x1x2x2', TWO),
    # Shadowed experts are chosen once by each microbatch under remat.
    ('ring', '2x1x4x1', TWO | dict(remat='full')),
  ],
)
def test_layouts_and_microbatches_change_nothing(kind, mesh_shape, options):
  # Each microbatch would draw its own noise.
  router = dataclasses.replace(LAYERS[kind]['router'], jitter=0.0)
  one = step_of(PLAIN.get(kind, kind), router=router)
  assert_equal(step_of(kind, mesh_shape, router=router, **options), one)


@pytest.mark.slow
def test_microbatches_change_no_loss_of_rows_that_they_hold():
  router = dataclasses.replace(IN_GROUPS, jitter=0.0, global_balance_weight=0.0)
  one = step_of('deepseek', router=router)
  assert one.sums.aux.batch_balance_loss.sum() > 0
  assert_equal(step_of('deepseek', microbatches=2, router=router), one)


@pytest.mark.slow
def test_the_program_has_the_stated_all_to_alls_and_gathers_no_kernel(capfd):
  capfd.readouterr()
  result = step_of('gather', '1x1x8x1', salt=time.time() % 1000)
  assert_equal(result, step_of('gather'))
  messages = capfd.readouterr().err
  assert 'rematerialization' not in messages, messages
  assert (
    len(re.findall(r'= .{1,900}? all-to-all(?:-start)?\(', result.text)) == 4
  )
  for kind in ('all-gather', 'collective-permute'):
    assert not re.search(rf' {kind}(-start)?\(', result.text)
  for kernel in ('16,24', '24,16'):
    assert f'f32[{E},{kernel}]' not in result.text


@pytest.mark.slow
def test_dropless_sends_rows_and_gathers_no_kernel():
  result = step_of('dropless', '1x1x8x1')
  assert_equal(result, step_of('dropless'))
  assert re.search(r'= (\S+) all-gather\(', result.text)  # rows, on a CPU
  kernel = r'(16,24|24,16)\]'
  assert not re.search(rf'= f32\[\d+,{kernel}\S* all-gather\(', result.text)
  assert not re.search(rf'f32\[{E},{kernel}', result.text)


@pytest.mark.slow
def test_a_rematerialization_would_be_seen(capfd):
  mesh = partitioning.make_mesh(dict(data=2, expert=4))
  x = jax.device_put(
    np.ones((8, 8, 16), np.float32),
    NamedSharding(mesh, PartitionSpec('expert', 'data')),
  )
  other = NamedSharding(mesh, PartitionSpec(None, None, ('data', 'expert')))
  salt = time.time() % 1000
  capfd.readouterr()
  jax.jit(lambda x: jnp.sin(x) * salt, out_shardings=other).lower(x).compile()
  assert 'rematerialization' in capfd.readouterr().err
