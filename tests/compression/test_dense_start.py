"""Feed-forwards made of experts: the rule by hand, and the models they make."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.compression import dense_start
from moe_jax.routing import Routing
from tests.compression.test_distill import begin_run, config_of
from tests.generation import folders
from tests.training import tiny

E = 5
TEACHER = {
  'ffn': {'activation': 'swiglu'},
  'use_bias': True,
  'moe': {
    'num_experts': 4,
    'num_selected': 2,
    'router': {'token_choice': {'gates': 'renormalized'}},
    'capacity': {'kind': 'all'},
  },
}


def test_experts_are_ranked_by_their_mean_gate():
  # Three tokens choose two of five experts. Expert 4 serves one token with 0.9;
  # expert 2 serves three, with 0.5, 0.4 and 0.3, the last of which is dropped;
  # expert 0 has 0.6 once, 1 and 3 nothing.
  routing = Routing(
    expert_index=jnp.array([[[2, 4], [0, 2], [2, 3]]]),
    slot=jnp.zeros((1, 3, 2), jnp.int32),
    gate=jnp.array([[[0.5, 0.9], [0.6, 0.4], [0.0, 0.0]]]),
    kept=jnp.array([[[True, True], [True, True], [False, False]]]),
    num_experts=E,
    capacity=None,
  )
  gates, tokens = map(np.asarray, dense_start.gate_sums(routing))
  np.testing.assert_allclose(gates, [0.6, 0, 0.9, 0, 0.9], rtol=1e-6)
  np.testing.assert_array_equal(tokens, [1, 0, 2, 0, 1])
  # By sums 2 and 4 would tie; by means it is 0.9, 0.6, 0.45.
  assert dense_start.rank(gates, tokens) == (4, 0, 2, 1, 3)


# Both halves of an encoder-decoder are a sparse layer.
PAIR = {
  'model': {'kind': 'encoder_decoder', 'num_layers': 1},
  'data': {
    'task': {'kind': 'seq2seq'},
    'source': {
      'kind': 'python_stdlib_docstrings',
      'python_stdlib_docstrings': {'modules': tiny.MODULES},
    },
    'target_len': 16,
  },
}


def with_even_routers(params):
  """The parameters with zeros as the kernels of routers."""

  def even(path, leaf):
    return 0 * leaf if any(key.key == 'router' for key in path) else leaf

  return jax.tree_util.tree_map_with_path(even, params)


@pytest.mark.parametrize(
  ('student', 'teacher', 'message'),
  [
    ({'moe': {'num_experts': 0, 'num_selected': 8}}, {}, 'width 160 of a feed'),
    ({'moe': {'num_experts': 0}, 'ffn': {'activation': 'relu'}}, {}, "'relu'"),
    # Experts that the teacher has merged are fewer than its columns.
    (
      {'moe': {'num_experts': 0, 'num_selected': 3}},
      {'retained': {'expert_of': '1: 0 1 1 0'}},
      'not that of 1 to 2 experts of width',
    ),
  ],
)
def test_what_cannot_be_concatenated_is_refused(student, teacher, message):
  teacher = {**TEACHER, 'moe': TEACHER['moe'] | teacher}
  options = (tiny.options(model=m) for m in ({**TEACHER, **student}, teacher))
  with pytest.raises(ValueError, match=message):
    dense_start.best_experts(*map(tiny.model_of, options), {}, [])


@pytest.mark.slow
def test_a_twin_of_a_teacher_with_even_gates_is_the_teacher(tmp_path):
  # A router without weights sends every token to experts 0 and 1 with gates of
  # one half, so that the concatenated twin computes what the teacher does.
  teacher = tmp_path / 'teacher'
  sparse = {**TEACHER, **PAIR['model']}
  sparse['moe'] = {**TEACHER['moe'], 'layers': 'all'}
  pair = {**PAIR, 'model': sparse}
  params = folders.write(teacher, change=with_even_routers, **pair)[3]
  twin = {'num_experts': 0, 'num_selected': 2, 'layers': 'all'}
  dense = {**sparse, 'moe': twin}
  options = {'start': 'concatenated', 'start_batches': 2}
  run, student_params, line = begin_run(
    config_of(teacher, **{**pair, 'model': dense}, distil=options),
    tmp_path / 'run',
  )
  assert 'experts [0, 1] of layer 0, [0, 1] of layer 1' in line
  batch = next(run.batches(0))
  sparse = tiny.model_of(tiny.options(**pair), run.dataset.vocab_size)
  outputs = [
    jax.jit(lambda p, m=m: m.apply({'params': p}, **m.inputs(batch)))(p)[0]
    for m, p in ((run.model, student_params), (sparse, params))
  ]
  is_real = np.asarray(batch['segment_ids']) > 0
  np.testing.assert_allclose(
    outputs[0][is_real], outputs[1][is_real], atol=2e-5
  )
