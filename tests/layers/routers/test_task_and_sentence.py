"""Routing by task and by sentence, told by hand and against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import All
from moe_jax.layers.routers import Sentence, Sizes, Task, TokenChoice
from moe_jax.models.base import RunShape
from moe_jax.routing.sentence_rule import sentence_ids, sentence_means, spread
from tests.layers.routers import run
from tests.models import tiny

E, K, M = 3, 2, run.M
# Three tasks: the first likes expert 0, then 1; the others 2, then 0.
TABLE = np.log([[6.0, 3.0, 1.0], [2.0, 1.0, 7.0], [3.0, 2.0, 5.0]])
TABLE = np.asarray(np.pad(TABLE, ((0, 6), (0, 0))), np.float32)  # nine tasks
TASKS = np.array([[0, 0, 1], [2, 2, 2]], np.int32)
X = run.draw(2, 3, M)


def routed(options=Task(), mask=None, ids=TASKS, x=X, **kwargs):
  kwargs |= dict(num_experts=E, num_selected=K, ids=ids)
  return run.route(options, {'tasks': jnp.asarray(TABLE)}, x, mask, **kwargs)


def test_tokens_go_where_their_task_goes():
  chosen, aux = routed()
  index = [[[0, 1], [0, 1], [2, 0]], [[2, 0]] * 3]
  assert chosen.expert_index.tolist() == index
  gate = [[[0.6, 0.3], [0.6, 0.3], [0.7, 0.2]], [[0.5, 0.3]] * 3]
  np.testing.assert_allclose(chosen.gate, gate, rtol=1e-6)
  assert aux.stats.load.tolist() == [6.0, 2.0, 4.0]
  other, _ = routed(x=run.draw(2, 3, M, seed=1))  # contents do not matter
  np.testing.assert_array_equal(other.gate, chosen.gate)
  even, _ = routed(Task(gates='renormalized'))
  np.testing.assert_allclose(even.gate[0, 0], [2 / 3, 1 / 3], rtol=1e-6)


def test_each_task_counts_once_in_the_losses():
  # By hand, over the table of nine tasks, six of which are like each other.
  _, aux = routed()
  probs = np.exp(TABLE) / np.exp(TABLE).sum(1, keepdims=True)
  load = np.array([1 + 1 + 1 + 6, 1 + 6, 2]) / (9 * K)
  tokens = 6
  np.testing.assert_allclose(
    aux.balance_loss, tokens * E * (load * probs.mean(0)).sum(), rtol=1e-5
  )
  z = (np.log(np.exp(TABLE).sum(1)) ** 2).mean()
  np.testing.assert_allclose(aux.z_loss, tokens * z, rtol=1e-5)
  # Other tasks in the batch, and padding, change no more than the weight.
  mask = np.array([[True, True, False], [True, False, False]])
  _, other = routed(mask=mask, ids=np.full_like(TASKS, 7))
  np.testing.assert_allclose(
    other.balance_loss / 3, aux.balance_loss / tokens, rtol=1e-6
  )


def test_a_sentences_tokens_share_the_mean_of_its_real_ones():
  x = np.arange(7.0, dtype=np.float32)[None, :, None] ** 2  # 0 1 4 9 16 25 36
  ids = np.array([[5, 5, 5, 6, 6, 5, 5]], np.uint32)
  mask = np.array([[True, True, True, True, True, False, True]])
  mean_of_each = jax.jit(lambda *args: spread(*sentence_means(*args)))
  means = mean_of_each(x, ids, mask)
  real = np.asarray(means)[0, :, 0][mask[0]]
  third = 5 / 3
  # The last 5 is another sentence; padding in it does not matter.
  np.testing.assert_allclose(
    real, [third, third, third, 12.5, 12.5, 36.0], rtol=1e-6
  )
  ids[0, 5] = 9
  new_means = mean_of_each(x, ids, mask)
  np.testing.assert_array_equal(np.asarray(new_means)[0][mask[0]][:, 0], real)


def test_sentences_of_neighbouring_rows_are_apart():
  segment_ids = jnp.array([[1, 1, 2, 2, 2, 3]])  # two rows of three tokens
  ids = np.asarray(sentence_ids(segment_ids, 3))[0]
  assert (ids[1:] != ids[:-1]).tolist() == [False, True, True, False, True]
  np.testing.assert_array_equal(sentence_ids(segment_ids, 0), segment_ids)


def test_a_sentence_is_routed_as_one_token_that_is_its_mean():
  x, mask = run.draw(2, 4, M, seed=3), np.ones((2, 4), bool)
  ids = np.array([[1, 1, 1, 2], [8, 8, 9, 9]], np.int32)
  sizes = Sizes(E, K, All())
  params = run.start(Sentence(), sizes, x, mask)['params']
  first = [x[0, :3].mean(0)] * 3 + [x[0, 3]]
  second = [x[1, :2].mean(0)] * 2 + [x[1, 2:].mean(0)] * 2
  means = np.stack([first, second])
  args = dict(mask=mask, num_experts=E, num_selected=K)
  chosen, aux = run.route(Sentence(), params, x, ids=ids, **args)
  expected, mean_aux = run.route(TokenChoice(), params, means, ids=None, **args)
  np.testing.assert_array_equal(chosen.expert_index, expected.expert_index)
  np.testing.assert_allclose(chosen.gate, expected.gate, rtol=1e-5)
  # Token choice has losses of other scopes, too.
  losses = {name: mean_aux.losses[name] for name in aux.losses}
  mean_aux = mean_aux._replace(losses=losses)
  for a, b in zip(jax.tree.leaves(aux), jax.tree.leaves(mean_aux)):
    np.testing.assert_allclose(a, b, rtol=1e-4)


@pytest.mark.parametrize('router', [Task, Sentence])
def test_noise_is_of_the_task_or_sentence_not_of_its_tokens(router):
  x, ids = run.draw(2, 4, M), np.array([[1, 1, 1, 2], [8, 8, 7, 7]], np.int32)
  params = run.start(router(), Sizes(E, K, All()), x)['params']
  kwargs = dict(num_experts=E, num_selected=K, ids=ids)
  chosen, _ = run.route(
    router(jitter=0.5), params, x, train=True, key=0, **kwargs
  )
  clean, _ = run.route(router(), params, x, **kwargs)
  gates = np.asarray(chosen.gate)
  np.testing.assert_array_equal(gates[0, 0], gates[0, 2])
  assert (gates != np.asarray(clean.gate)).any()


def test_a_sentence_must_be_whole_in_its_group():
  shape = RunShape(total_steps=1, rows=4, microbatches=1, seq_len=8)
  moe = dict(router=Sentence(), capacity=All(), allow_future_leak=True)
  for size, refused in ((4, True), (8, False), (16, False), (0, False)):
    options = tiny.options(moe | dict(group_size=size))
    problems = list(options.problems_in(shape))
    assert ['whole sentences' in p for p in problems] == [True] * refused
