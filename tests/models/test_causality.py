"""No output up to t changes when the row's tokens after t do.

The tests perturb tokens instead of taking gradients, since a drop has no
gradient. Capacity binds in every case, so that later tokens could evict earlier
ones.
"""

import jax
import numpy as np
import pytest

from moe_jax.layers.routers import (
  ExpertChoice,
  Hash,
  NoisyTopK,
  Random,
  TokenChoice,
)
from moe_jax.routing.capacity import PerToken
from tests.models import tiny
from tests.models.tiny import B, T, V

TIGHT = dict(capacity=PerToken(factor=0.75))
CAUSAL = {
  'switch': dict(num_selected=1, router=TokenChoice()),
  'token_major': dict(group_size=2 * T),
  'noisy': dict(router=NoisyTopK(gates='renormalized_after_drop')),
  'threshold': dict(
    router=TokenChoice(
      gates='renormalized', second_policy='threshold', jitter=0.1
    ),
    group_size=5,
  ),
  'bigram': dict(router=Hash(of='bigram')),
  'random': dict(router=Random(), group_size=2 * T),
}
LEAKING = {
  'choice_major': dict(
    router=TokenChoice(gates='renormalized', slot_priority='choice_major')
  ),
  'batch_priority': dict(
    num_selected=1, router=TokenChoice(slot_priority='batch_priority')
  ),
  'expert_choice': dict(router=ExpertChoice()),
}


def compiled(model, train):
  """Compiles (params, tokens) -> (logits, aux); every call has equal noise."""

  @jax.jit
  def run(params, tokens):
    rngs = {'router': tiny.key(0), 'dropout': tiny.key(1)}
    return model.apply({'params': params}, tokens, train=train, rngs=rngs)

  return run


def trials(model, num_trials, train=False):
  """Yields (largest change up to t, largest change after t, drops).

  The tokens of one row after t are replaced; other rows stay.
  """
  run, params = compiled(model, train), tiny.params_of(model)
  rng = np.random.default_rng(0)
  for _ in range(num_trials):
    tokens = rng.integers(0, V, (B, T), np.int32)
    edited = tokens.copy()
    row, t = rng.integers(B), rng.integers(T - 1)
    edited[row, t + 1 :] = (tokens[row, t + 1 :] + 1 + rng.integers(V - 1)) % V
    (logits, aux), (changed_logits, _) = (
      run(params, tokens),
      run(params, edited),
    )
    change = np.abs(
      np.asarray(logits[row]) - np.asarray(changed_logits[row])
    ).max(-1)
    dropped = float(aux.stats.overflowed.sum())
    yield change[: t + 1].max(), change[t + 1 :].max(), dropped


# The others choose by the same rules with fewer options.
FAST = ('threshold', 'bigram', 'random')


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
    for name in CAUSAL
  ],
)
def test_earlier_outputs_do_not_change(name):
  model = tiny.build(moe=TIGHT | CAUSAL[name])
  # These routers have noise in training.
  train = name in ('noisy', 'threshold', 'random')
  before, after, dropped = zip(*trials(model, 20, train))
  assert max(before) <= 1e-6
  assert min(after) > 1e-3
  assert min(dropped) > 0


@pytest.mark.parametrize('name', LEAKING)
def test_what_needs_the_flag_does_leak(name):
  model = tiny.build(moe=TIGHT | LEAKING[name] | dict(allow_future_leak=True))
  before, _, _ = zip(*trials(model, 20))
  assert max(before) > 1e-3
