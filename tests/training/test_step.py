"""The loss, its gradient, and accumulation, on a tiny sparse model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax.analysis import sharded
from moe_jax.layers.parameters import Role
from moe_jax.layers.shared import Numerics, Shared
from moe_jax.models.base import Model, TokenLosses
from moe_jax.models.embeddings import (
  EmbeddingConfig,
  EmbeddingOptions,
  Embeddings,
)
from moe_jax.routing import empty_aux
from moe_jax.runs.summary import LossSums
from moe_jax.training import losses
from moe_jax.training.programs import make_programs
from moe_jax.training.schedules import Constant
from moe_jax.training.step import TrainState, make_grad_fn, train_step
from tests.models import tiny as tiny_models
from tests.own_kinds import SignSgd
from tests.training import tiny

# Losses are large, so that a wrong normaliser shows.
HEAVY = tiny.router(balance_weight=0.5, z_weight=0.3)
OPTIONS = tiny.options(batch_size=8, model=HEAVY)


def assert_close(a, b, tolerance=2e-6):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=tolerance)


@pytest.fixture(scope='module')
def whole_batch():
  params, batch = tiny.params_of(OPTIONS), tiny.batch(OPTIONS)
  return params, batch, tiny.grads_of(OPTIONS, params, batch)


@pytest.mark.as_users_compile
def test_loss_is_cross_entropy_plus_weighted_losses(whole_batch):
  params, batch, ((loss, sums), _) = whole_batch
  logits, aux = tiny_models.apply(tiny.model_of(OPTIONS))(
    params, batch['tokens'], batch['segment_ids'], batch['positions']
  )
  batch = jax.device_get(batch)
  # The loss by hand is the weighted sum of nats over the sum of weights of the
  # batch.
  log_probs = np.asarray(jax.nn.log_softmax(logits))
  nats, weight = 0.0, 0.0
  for b, t in np.ndindex(*batch['tokens'].shape):
    w = float(batch['loss_weights'][b, t])
    nats -= w * log_probs[b, t, int(batch['targets'][b, t])]
    weight += w
  tokens = float((batch['segment_ids'] > 0).sum())
  routers = 0.5 * aux.balance_loss.sum() + 0.3 * aux.z_loss.sum()
  expected = nats / weight + float(routers) / tokens
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_allclose(sums.cross_entropy, nats, rtol=1e-5)


@pytest.mark.as_users_compile
def test_padding_changes_nothing(whole_batch):
  params, batch, before = whole_batch
  batch = jax.device_get(batch)
  padding = batch['segment_ids'] == 0
  assert padding.any()
  other = dict(
    batch,
    tokens=np.where(padding, 13, batch['tokens']),
    targets=np.where(padding, 14, batch['targets']),
    positions=np.where(padding, 3, batch['positions']),
  )
  other = jax.tree.map(jnp.asarray, other)
  after = tiny.grads_of(OPTIONS, params, other)
  for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    np.testing.assert_array_equal(a, b)


def aux_of(load):
  """The aux of one layer with this load, [1, E] as every leaf."""
  aux = jax.tree.map(lambda leaf: leaf[None], empty_aux(len(load), 1))
  return aux._replace(stats=aux.stats._replace(load=jnp.array([load])))


def test_a_step_by_hand():
  # Plain descent at a rate of 0.5, and a state of routers that sums the load.
  # The loss is a draw, so that it tells keys of steps apart.
  def grad_fn(params, batch, divisors, key, router_state, step):
    sums = LossSums(0.0, 1.0, 0.0, aux_of([3.0, 1.0]))
    grads = {'w': batch['x'] / divisors - step}
    return (jax.random.uniform(key), sums), grads

  @jax.jit
  def stepped(state):
    return train_step(
      state,
      {'x': jnp.array([14.0, 0.0])},
      grad_fn=grad_fn,
      normalize=lambda batch: batch['x'].sum() / 7,
      optimizer=optax.sgd(0.5),
      rate=lambda opt_state: 10.0,
      move_router_state=lambda state, load: state + load,
    )

  def state_at(step, seed=0):
    params = {'w': jnp.zeros(2)}
    return TrainState(
      jnp.int32(step),
      jnp.uint32(seed),
      params,
      optax.sgd(0.5).init(params),
      jnp.array([[1.0, 2.0]]),
    )

  new, metrics = stepped(state_at(4))
  assert new.step == 5 and new.seed == 0
  # The gradient is 14 / 2 - 4 and 0 - 4.
  assert new.params['w'].tolist() == [-1.5, 2.0]
  assert new.router_state.tolist() == [[4.0, 3.0]]
  assert metrics.grad_norm == 5.0  # that of the gradient
  draws = [
    float(stepped(state_at(*at))[1].loss) for at in ((4,), (5,), (4, 1), (4,))
  ]
  assert len(set(draws)) == 3 and draws[0] == draws[-1]


def test_the_rate_in_the_metrics_is_the_applied_one():
  # A step was skipped, so that the third makes the second of four updates of
  # the warm-up.
  options = SignSgd(
    schedule=Constant(warmup_steps=4),
    learning_rate=1.0,
    clip_norm=0.0,
    weight_decay=0.0,
  )
  optimizer = options.transformation(
    8, {'b': ('mlp',)}, {'b': Role('ffn', 'bias')}
  )
  params = {'b': jnp.zeros(1)}
  _, opt_state = optimizer.update(params, optimizer.init(params), params)
  sums = LossSums(0.0, 1.0, 0.0, aux_of([1.0]))
  new, metrics = train_step(
    TrainState(jnp.int32(2), jnp.uint32(0), params, opt_state),
    {},
    grad_fn=lambda *args: ((0.0, sums), {'b': jnp.ones(1)}),
    normalize=lambda batch: None,
    optimizer=optimizer,
    rate=options.next_rate(8),
  )
  assert new.params['b'] == -0.5
  assert metrics.learning_rate == 0.5


class Blind(Model):
  """A model that reads nothing of a batch."""

  def inputs(self, batch):
    return {}


def grads_of(params, batch, microbatches, apply, loss):
  """((loss, sums), gradient) of a model that is replaced by its function."""
  grad_fn = make_grad_fn(
    Blind(), losses.LossWeights(), microbatches, apply=apply, loss=loss
  )
  divisors = losses.Normalizers(1.0, jnp.ones(1))
  return grad_fn(params, batch, divisors, tiny_models.key(0))


def test_microbatches_have_noise_of_their_own():
  def apply(model, variables, train, rngs):
    draws = [jax.random.uniform(rngs[name]) for name in ('router', 'dropout')]
    return ((), aux_of([1.0])), jnp.stack(draws)[None]

  n = 3

  def loss(outputs, batch):
    return TokenLosses(batch['loss_weights'], None)

  batch = {'loss_weights': jnp.ones((2 * n, 1))}
  (_, sums), _ = grads_of({'w': jnp.zeros(2)}, batch, n, apply, loss)
  assert sums.choices.shape == (n, 2)
  assert len(np.unique(sums.choices)) == 2 * n


def test_gradients_of_bfloat16_parameters_are_added_in_float32():
  # In bfloat16 256 + 1 is 256.
  def apply(model, variables, train, rngs):
    return (variables['params']['w'], aux_of([1.0])), None

  n = 300

  def loss(w, batch):
    return TokenLosses(w * batch['loss_weights'], None)

  batch = {'loss_weights': jnp.ones((n, 1))}
  _, grads = grads_of({'w': jnp.bfloat16(2)}, batch, n, apply, loss)
  assert grads['w'] == n


@pytest.mark.slow
def test_gradients_are_exchanged_once_a_step():
  sent, results = [], []
  for once in (False, True):
    options = tiny.options(
      batch_size=16,
      microbatches=4,
      exchange_once=once,
      trace={'every_steps': 1},
      mesh={'data': 2, 'fsdp': 2},
      model={'num_layers': 1, 'moe': {**HEAVY['moe'], 'layers': 'all'}},
    ).filled(257)
    mesh = options.mesh.make(jax.devices()[:4])
    programs = make_programs(options, options.build(), mesh)
    state, batch = tiny.first_state(programs), tiny.batch(options)
    batch = programs.put(jax.device_get(batch))
    step = programs.train_step.lower(state, batch).compile()
    traffic = sharded.read_collectives(step.as_text()).by_kind.values()
    sent.append(sum(kind.num_bytes for kind in traffic))
    results.append(jax.device_get(step(state, batch)))
  assert sent[1] < 0.4 * sent[0]
  (state, metrics), (state_once, metrics_once) = results
  assert_close(state_once.params, state.params)
  assert_close(metrics_once, metrics, 1e-3)  # the choices, too, in order


@pytest.mark.slow
def test_one_exchange_a_step_goes_with_experts_that_gather_tokens():
  gather = {'kind': 'gather', 'gather': {'exchange': {'kind': 'all_gather'}}}
  options = tiny.options(
    batch_size=8,
    microbatches=2,
    exchange_once=True,
    mesh={'expert': 4},
    model={'num_layers': 1, 'moe': {'layers': 'all', 'dispatch': gather}},
  ).filled(257)
  mesh = options.mesh.make(jax.devices()[:4])
  programs = make_programs(options, options.build(), mesh)
  batch = programs.put(jax.device_get(tiny.batch(options)))
  _, metrics = programs.train_step(tiny.first_state(programs), batch)
  assert np.isfinite(metrics.loss)


@pytest.mark.parametrize('tie', [True, False])
def test_the_gradient_of_logits_kernels_is_summed_in_float32(tie):
  # In bfloat16 257 is 256.
  n = 257
  config = EmbeddingConfig(
    EmbeddingOptions(tie=tie), Shared(Numerics('bfloat16')), 2, 1
  )
  params = {'embedding': jnp.ones((2, 1)), 'w_logits': jnp.ones((1, 2))}

  def total(params):
    x = jnp.ones((1, n, 1), jnp.bfloat16)
    logits = Embeddings(config).apply({'params': params}, x, method='logits')
    return logits.sum()

  grads = jax.grad(total)(params)
  assert set(grads['embedding' if tie else 'w_logits'].ravel().tolist()) == {n}


def test_bfloat16_model_has_float32_losses_and_gradients():
  options = tiny.options(model={'numerics': {'dtype': 'bfloat16'}})
  params, batch = tiny.params_of(options), tiny.batch(options)
  weights = losses.loss_weights(tiny.model_of(options))
  grad_fn = make_grad_fn(tiny.model_of(options), weights, 1)
  totals = losses.normalizers(tiny.model_of(options), batch)
  jaxpr, results = jax.make_jaxpr(grad_fn, return_shape=True)(
    params, batch, totals, tiny_models.key(0)
  )
  assert {leaf.dtype for leaf in jax.tree.leaves(results)} == {np.dtype('f4')}
  assert 'bf16' in str(jaxpr)
