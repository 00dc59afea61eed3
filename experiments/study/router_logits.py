"""Logits of trained routers: their size, and choices that change.

Logits and choices are those of validation batches.
"""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.study import routing
from moe_jax.analysis.recording import header_of, records_of
from moe_jax.analysis.routing_measures import Layers, layers_of
from moe_jax.layers.routers.contract import NOISE
from moe_jax.models import Model
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

_BATCHES = 20


def rounding(run: Run, state: TrainState) -> dict[str, float]:
  """The size of the trained model's logits, and what rounding them changes.

  Returns:
    `routing/layer_<i>/<name>` for the names of `sizes`, and for `rounded`, the
    share of tokens whose first choice is another where their logits are rounded
    to bfloat16.
  """
  measures = {}
  for number, layer in _layers(run, state, run.model).items():
    logits = np.asarray(layer.logits)
    measures[number] = {**sizes(logits), 'rounded': rounded_choices(logits)}
  return routing.named(measures)


def sizes(logits: np.ndarray) -> dict[str, float]:
  """Two sizes of logits [N, E].

  Returns:
    `squared_lse`, the mean of log(sum(exp(logits))) squared over tokens, which
    a z-loss penalises; and `centred`, the largest absolute logit after each
    token's mean, on which no choice or gate depends, is taken away.
  """
  centred = logits - logits.mean(-1, keepdims=True)
  lse = np.logaddexp.reduce(logits, axis=-1)
  return {
    'squared_lse': float((lse**2).mean()),
    'centred': float(np.abs(centred).max()),
  }


def rounded_choices(logits: np.ndarray) -> float:
  """The share of tokens whose largest logit is another one in bfloat16.

  Args:
    logits: float32 [N, E], the logits of the tokens. Of equal ones the first is
      the largest, as in routers.
  """
  rounded = logits.astype(jnp.bfloat16).astype(np.float32)
  return float((logits.argmax(-1) != rounded.argmax(-1)).mean())


def changed(
  run: Run, state: TrainState, one: Model, other: Model, train: bool = False
) -> dict[int, float]:
  """The share of tokens whose first choices differ in two models, by layer.

  Args:
    run: A trained run.
    state: Its last state, whose parameters both models have.
    one: A model, such as that of an evaluation in another precision.
    other: The other model.
    train: Whether the other model's routers have the noise of training.
  """
  others = _layers(run, state, other, train)
  return {
    number: float((layer.first != others[number].first).mean())
    for number, layer in _layers(run, state, one).items()
  }


def explored(run: Run, state: TrainState) -> dict[str, float]:
  """The share of tokens that noise sends elsewhere in training.

  Returns:
    `routing/layer_<i>/explored`, the share of tokens whose first choice in
    training is not that of an evaluation by the same parameters.
  """
  noisy = changed(run, state, run.model, run.model, train=True)
  return routing.named({i: {'explored': share} for i, share in noisy.items()})


def _layers(
  run: Run, state: TrainState, model: Model, train: bool = False
) -> Layers:
  """The choices of each sparse layer in validation batches, with logits."""
  variables, recorded = run.programs.variables(state), []
  key = jax.random.key(run.options.seed)
  for number, batch in enumerate(routing.batches(run, _BATCHES)):
    router, dropout = jax.random.split(jax.random.fold_in(key, number))
    rngs = {NOISE: router, 'dropout': dropout}
    chosen = routing.choices(model, variables, batch, rngs, train, logits=True)
    chosen = jax.device_get(chosen)
    recorded += records_of(model, 'validation', 0, number, batch, chosen)
  return layers_of(header_of(run), recorded) if recorded else {}
