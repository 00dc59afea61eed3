"""The model of `colab/one_file_moe.py` is the library's `tiny_switch`."""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax import run_config
from moe_jax.configs import tiny_switch
from tests.training import tiny

COLAB = pathlib.Path(__file__).parents[1] / 'colab'


@pytest.fixture(autouse=True)
def ranks_may_differ():
  """The one file broadcasts as most code does, and as tests forbid."""
  with jax.numpy_rank_promotion('allow'):
    yield


@pytest.fixture
def one_file(monkeypatch):
  monkeypatch.syspath_prepend(COLAB)
  return importlib.import_module('one_file_moe')


def library_options(config):
  """The options of `tiny_switch`, with the one file's length and no noise."""
  c = tiny_switch.get_config()
  c.total_steps = config.total_steps
  c.optimizer.schedule.warmup_steps = config.warmup_steps
  c.model.moe.router.token_choice.jitter = 0.0
  c.model.moe.num_selected = config.num_selected
  if config.num_selected > 1:
    c.model.moe.router.token_choice.gates = 'renormalized'
    c.model.moe.capacity.per_token.factor *= config.num_selected
  return run_config.read(c)


def in_library(tree, config):
  """Parameters or gradients of the one file under the library's names."""
  M, H = config.width, config.num_heads
  layers, D = tree['layers'], config.width // config.num_heads

  def attention(i):
    kernels = {n: p['kernel'] for n, p in layers[f'attention_{i}'].items()}
    out = kernels.pop('out').reshape(-1, H, D, M)
    heads = {f'w_{n}': w.reshape(-1, M, H, D) for n, w in kernels.items()}
    return {**heads, 'w_out': out}

  ffn = {f'w_{name}': layers[name]['kernel'] for name in ('in', 'out')}
  moe = layers['moe']
  experts = {name: moe[name] for name in ('w_in', 'w_out')}
  halves = (
    {'ffn': ffn},
    {'moe': {'experts': experts, 'router': {'w': moe['router']['kernel']}}},
  )
  return {
    'embedding': tree['embedding'],
    'final_norm': tree['final_norm'],
    'layers': {
      f'layer_{i}': {
        'attention': attention(i),
        'attention_norm': layers[f'norm_{2 * i}'],
        'ffn_norm': layers[f'norm_{2 * i + 1}'],
        **half,
      }
      for i, half in enumerate(halves)
    },
  }


@pytest.mark.parametrize(
  'num_selected', [1, pytest.param(2, marks=pytest.mark.slow)]
)
def test_the_one_file_computes_what_the_library_does(one_file, num_selected):
  config = one_file.Config(
    vocab_size=257, num_selected=num_selected, total_steps=6, warmup_steps=2
  )
  options = library_options(config)
  B, T = config.batch_size, config.seq_len
  tokens = np.random.default_rng(0).integers(0, 256, (B, T + 1))
  tokens[:, 1::3] = tokens[:, ::3]  # something to learn, and uneven loads
  tokens = jnp.asarray(tokens, jnp.int32)
  params = one_file.Decoder(config).init(jax.random.key(0), tokens[:, :-1])[
    'params'
  ]
  router = params['layers']['moe']['router']
  router['kernel'] = 4 * router['kernel']  # uneven loads
  batch = {
    'tokens': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'segment_ids': jnp.ones((B, T), jnp.int32),
    'positions': jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T)),
    'loss_weights': jnp.ones((B, T)),
  }
  model, theirs = tiny.model_of(options), in_library(params, config)
  decoder = one_file.Decoder(config)
  logits, aux = decoder.apply({'params': params}, tokens[:, :-1])
  expected, expected_aux = model.apply({'params': theirs}, batch['tokens'])
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=2e-5)
  load = expected_aux.stats.load[1::2] / (B * T * num_selected)
  np.testing.assert_allclose(aux['load'], load, rtol=1e-6)
  dropped = 1 - expected_aux.stats.kept_load[1::2].sum() / (
    2 * B * T * num_selected
  )
  np.testing.assert_allclose(aux['dropped'].mean(), dropped, rtol=1e-5)
  assert 0.05 < dropped < 0.6
  (loss, sums), gradient = tiny.grads_of(options, theirs, batch)
  grad_fn = jax.value_and_grad(one_file.loss_fn, has_aux=True)
  (own_loss, numbers), own_gradient = grad_fn(params, tokens, config)
  np.testing.assert_allclose(own_loss, loss, rtol=1e-6)
  np.testing.assert_allclose(
    numbers['nats'], sums.cross_entropy / (B * T), rtol=1e-6
  )
  assert_close(in_library(own_gradient, config), gradient)
  # All steps, whose rates rise and fall, on equal gradients.
  theirs_gradient = in_library(own_gradient, config)
  optimizer, own_optimizer = (
    tiny.optimizer_of(options),
    one_file.optimizer_of(config),
  )
  state, own_state = optimizer.init(theirs), own_optimizer.init(params)
  for _ in range(config.total_steps):
    updates, state = optimizer.update(theirs_gradient, state, theirs)
    theirs = optax.apply_updates(theirs, updates)
    updates, own_state = own_optimizer.update(own_gradient, own_state, params)
    params = optax.apply_updates(params, updates)
  assert_close(in_library(params, config), theirs)


def assert_close(tree, expected):
  """Each array is as expected, but for two millionths of its largest number."""

  def check(path, x, y):
    np.testing.assert_allclose(
      x, y, rtol=1e-5, atol=2e-6 * np.abs(y).max(), err_msg=str(path)
    )

  jax.tree_util.tree_map_with_path(check, tree, expected)


@pytest.mark.slow
def test_devices_that_share_the_experts_equal_one(one_file):
  sharded = importlib.import_module('one_file_sharded')
  config = one_file.Config(
    width=32, hidden=64, seq_len=32, group_size=64, total_steps=4
  )
  of_losses, of_params = sharded.main(config, steps=2)
  assert of_losses < 1e-5 and of_params < 1e-5


@pytest.mark.slow
def test_the_one_file_trains_samples_and_draws(one_file, monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  config = one_file.Config(width=32, hidden=64, seq_len=32, total_steps=3)
  one_file.main(config)
  page = (tmp_path / 'routing.html').read_text()
  assert page.count('</span>') == 2 * config.seq_len
