"""The loss of a split: each row counts once, whatever the batches are."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.data import PackedRows
from moe_jax.devices import Placing
from moe_jax.models.base import Model, TokenLosses
from moe_jax.models.recorded import recording
from moe_jax.routing import empty_aux
from moe_jax.training.evaluate import (
  Evaluation,
  Losses,
  Stopped,
  behind,
  compiled_eval_step,
  evaluation_rows,
)
from moe_jax.training.programs import make_programs
from tests.training import tiny


class TokenNumbers(Model):
  """A model without layers, whose loss at a token is the token's number."""

  def inputs(self, batch):
    return {'tokens': batch['tokens']}

  def __call__(self, tokens):
    no_layers = jax.tree.map(lambda leaf: leaf[None][:0], empty_aux(1, 1))
    return tokens.astype(jnp.float32), no_layers

  def loss(self, outputs, batch):
    return TokenLosses(outputs)


@functools.cache
def rows_and_place():
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  rows = PackedRows(np.arange(1, 24), np.array([0, 7]), 4)
  return rows, Placing(sharding, 4)


def losses(num_batches):
  return Losses(TokenNumbers(), num_batches, *rows_and_place())


def test_the_loss_of_a_split_by_hand_measured_once():
  measured, entries = [], {'whole': 0, 'again': 0, 'first': 1}

  def showing(name):
    measured.append(name)
    return contextlib.nullcontext()

  rows = evaluation_rows(
    [Evaluation(name, 0, losses(n)) for name, n in entries.items()],
    {},
    0,
    showing=showing,
  )
  # A document ends with token 7, at which there is no loss. The last batch
  # has two rows, and the last row is half padding; 23 is only a target.
  mean = np.mean([*range(1, 7), *range(8, 23)])
  assert rows['whole'] == rows['again'] == {'loss': pytest.approx(mean)}
  mean = np.mean([*range(1, 7), *range(8, 17)])
  assert rows['first'] == {'loss': pytest.approx(mean)}
  assert measured == ['whole', 'first']


def stopped_before(batch, measure, variables):
  """Asserts that a signal stops a measurement before its batch of a number."""
  answers = iter([False] * batch + [True])
  with pytest.raises(Stopped):
    evaluation_rows(
      [Evaluation('name', 0, measure)],
      variables,
      0,
      should_stop=lambda: next(answers),
    )
  assert not [*answers]


def test_a_signal_stops_a_measurement_between_two_batches():
  stopped_before(1, losses(0), {})


@pytest.mark.as_users_compile
def test_an_evaluation_takes_the_memory_of_a_microbatch():
  sums, temp_bytes = {}, {}
  for n in (1, 4):
    options = tiny.options(batch_size=8, microbatches=n).filled(257)
    model = options.build()
    mesh = options.mesh.make(jax.devices()[:1])
    put = make_programs(options, model, mesh).put
    variables, batch = {'params': tiny.params_of(options)}, tiny.batch(options)
    step = compiled_eval_step(model, put, recording)
    compiled = step.lower(variables, batch).compile()
    temp_bytes[n] = compiled.memory_analysis().temp_size_in_bytes
    sums[n] = compiled(variables, batch)
  assert temp_bytes[4] < 0.4 * temp_bytes[1]
  chosen = {n: sums[n].choices[1].expert for n in sums}
  np.testing.assert_array_equal(chosen[4], chosen[1])
  assert len(np.unique(chosen[1], axis=0)) > 4  # the order of rows shows
  for part, whole in zip(jax.tree.leaves(sums[4]), jax.tree.leaves(sums[1])):
    np.testing.assert_allclose(part, whole, rtol=2e-5, atol=1e-5)


def test_batches_are_dispatched_before_the_sums_of_earlier_ones_are_read():
  dispatched = []

  def dispatch(number):
    dispatched.append(number)
    return number

  read = [
    (number, len(dispatched)) for number in behind(map(dispatch, range(5)))
  ]
  assert read == [(0, 3), (1, 4), (2, 5), (3, 5), (4, 5)]
