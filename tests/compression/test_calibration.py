"""The run that compression reads and writes, and the inputs of its experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.compression import calibration, whole_run
from moe_jax.data import tokenizers
from moe_jax.layers.experts import SCOPE
from moe_jax.layers.routers import ExpertChoice
from moe_jax.routing import token_choice
from tests.compression import sparse_runs
from tests.compression.sparse_runs import E, K, M
from tests.generation import folders
from tests.training import tiny

# Three sparse layers, of which two are one loop and one is in the next.
MODEL = {'num_layers': 5, 'moe': {'layers': '1,3,4', 'num_selected': 2}}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs') / 'run'
  folders.write(folder, model=MODEL)
  return whole_run.read(folder)


@pytest.mark.slow
def test_the_inputs_of_experts_are_captured(run):
  batch = tiny.batch(tiny.options(model=MODEL), vocab_size=run.model.vocab_size)
  inputs_by_layer = calibration.capture(run.model, run.variables, batch)
  assert list(inputs_by_layer) == [1, 3, 4]

  @jax.jit
  def outputs(variables, batch):
    _, collections = run.model.apply(
      variables,
      **run.model.inputs(batch),
      capture_intermediates=lambda module, _: module.name == SCOPE,
      mutable=['intermediates'],
    )
    return run.model.stacks.layer_trees(collections['intermediates'])

  layers = outputs(run.variables, batch)
  params = run.model.stacks.layer_trees(run.variables['params'])
  for i, inputs in inputs_by_layer.items():
    experts = params[i]['moe']['experts']
    h = np.einsum('gsm,emf->gsef', inputs.x, experts['w_in'])
    h = jax.nn.gelu(h, approximate=False)
    y = np.einsum('gsef,efm->gsem', h, experts['w_out'])
    y = np.einsum('gsem,gse->gsm', y, inputs.routing.token_gates())
    expected = layers[i]['moe']['experts']['__call__'][0][0]
    np.testing.assert_allclose(y, expected, atol=1e-5)
  assert np.abs(inputs_by_layer[1].x - inputs_by_layer[3].x).max() > 0.1


def test_batches_are_of_training_with_the_same_tokens(run):
  first, second = calibration.batches(run, 2)
  assert first['tokens'].shape == (run.options.batch_size, 24)
  assert (first['tokens'] != second['tokens']).any()
  np.testing.assert_array_equal(
    calibration.batches(run, 1)[0]['tokens'], first['tokens']
  )
  tokenizer = tokenizers.Chars('abc')
  other_run = run._replace(options=run.options._replace(tokenizer=tokenizer))
  with pytest.raises(ValueError, match='was trained on tokens of'):
    calibration.batches(other_run, 1)


def test_special_tokens_do_not_count():
  t = tokenizers.Extended(
    tokenizers.Bytes(), ['<eos>', '<extra_id_0>'], end_inputs=False
  )
  eos, mask = t.eos_id, t.sentinel_ids[0]
  batch = {
    'tokens': np.array([[5, 6, mask, 7, eos, 9]]),
    'targets': np.array([[6, mask, 7, eos, 9, 0]]),
    'segment_ids': np.array([[1, 1, 1, 1, 1, 0]]),
  }
  # The token before a mask in a decoder, masks, ends and padding do not count.
  counted = calibration.counted(batch, '', t)
  np.testing.assert_array_equal(counted, [[1, 0, 0, 1, 0, 0]])
  encoder = {f'encoder_{name}': value for name, value in batch.items()}
  counted = calibration.counted(encoder, 'encoder_', t)
  np.testing.assert_array_equal(counted, [[1, 1, 0, 1, 0, 0]])


def test_an_expert_has_at_most_four_times_the_mean():
  S, E = 40, 8
  logits = np.zeros((1, S, E), np.float32)
  logits[..., 0], logits[:, 30:, 1] = 1.0, 2.0
  choose = functools.partial(token_choice, num_selected=1, capacity=None)
  routing = jax.jit(choose)(logits)
  x = jnp.asarray(np.arange(S, dtype=np.float32)[None, :, None])
  routed_tokens = calibration.RoutedTokens(x, routing)
  counted = np.arange(S)[None] >= 5
  tokens = calibration.ExpertTokens([routed_tokens], [counted])
  # 35 tokens count, so that the cap is 4 * 35 / 8, rounded up: 18 of 25.
  rows = tokens.rows(slice(0, 3))
  assert rows.filled.sum(1).tolist() == [18, 10, 0]
  assert rows.x[0, :18, 0].tolist() == list(range(5, 23))
  assert rows.x[1, :10, 0].tolist() == list(range(30, 40))
  assert tokens.without_tokens == [2, 3, 4, 5, 6, 7]


def test_statistics_are_those_of_a_loop_over_tokens():
  run = sparse_runs.run_of()
  usage = sparse_runs.calibrated(run).usage
  params = run.model.stacks.layer_trees(run.variables['params'])
  expected = {
    n: dict(tokens=0, output=np.zeros((E, M)))
    | {name: np.zeros(E) for name in ('choices', 'gate', 'gated_norm')}
    for n in (1, 2)
  }
  for batch in sparse_runs.BATCHES:
    captured = calibration.capture(run.model, run.variables, batch)
    for n, inputs in captured.items():
      p = jax.tree.map(np.asarray, params[n]['moe']['experts'])
      is_real = np.asarray(batch['segment_ids']) > 0
      for token in np.argwhere(is_real):
        x, sums = np.asarray(inputs.x)[tuple(token)], expected[n]
        h = x @ p['w_in'] + p['b_in']
        gated = x @ p['w_gate']
        h *= gated / (1 + np.exp(-gated))
        y = np.einsum('ef,efm->em', h, p['w_out']) + p['b_out']
        sums['tokens'] += 1
        sums['output'] += y
        for k in range(K):
          e = int(inputs.routing.expert_index[tuple(token)][k])
          gate = float(inputs.routing.gate[tuple(token)][k])
          sums['choices'][e] += 1
          sums['gate'][e] += gate
          sums['gated_norm'][e] += gate * np.linalg.norm(y[e])
  for n, sums in expected.items():
    for name, value in sums.items():
      np.testing.assert_allclose(
        getattr(usage[n], name), value, rtol=1e-4, atol=1e-4
      )


def test_scores_are_of_all_tokens_or_of_those_of_an_expert():
  sums = calibration.Usage(
    tokens=np.float64(10),
    choices=np.array([8.0, 2, 0]),
    gate=np.array([4.0, 1.5, 0]),
    gated_norm=np.array([16.0, 12, 0]),
    output=np.ones((3, 2)),
  )
  scores = {n: list(score(sums)) for n, score in calibration.SCORES.items()}
  assert scores == {
    'usage': [0.8, 0.2, 0],
    'gate': [0.4, 0.15, 0],
    'reap': [2, 6, 0],
  }
  assert sums.unused == [2]
  np.testing.assert_allclose(sums.mean_output, 0.1)


def test_experts_that_choose_tokens_are_refused():
  run = sparse_runs.run_of(router=ExpertChoice())
  with pytest.raises(ValueError, match='experts of layer 1 choose tokens'):
    calibration.measure(run.model, run.variables, [])
