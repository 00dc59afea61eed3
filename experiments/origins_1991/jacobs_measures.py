"""Measures of 1991's trained systems: accuracy, and how experts share cases.

Not here: how they learn (`jacobs_runs.py`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.origins_1991.jacobs_problems import Problem
from experiments.origins_1991.jacobs_runs import forward
from moe_jax.models.adaptive import AdaptiveMixture


def correct(prediction, targets):
  """Whether each case is classified correctly, bool [N].

  A single output stands for class 1 above 0.5; of several outputs the largest
  is the predicted class.
  """
  if targets.shape[-1] == 1:
    return ((prediction > 0.5) == (targets > 0.5))[..., 0]
  return jnp.argmax(prediction, -1) == jnp.argmax(targets, -1)


def _entropy(probs):
  """Entropy over the last axis, in nats; never -0, which tables would print."""
  return jnp.sum(jnp.abs(jax.scipy.special.entr(probs)), axis=-1)


@functools.partial(jax.jit, static_argnames='model')
def _measured(model, params, train, test):
  def one(params):
    outputs = forward(model, params, train.features)
    tested = forward(model, params, test.features)
    probs = outputs.gate_probs  # [N, E]
    likeliest = jnp.argmax(probs, axis=-1)
    alone = outputs.expert_outputs[jnp.arange(len(likeliest)), likeliest]
    share = jnp.mean(jax.nn.one_hot(likeliest, probs.shape[-1]), axis=0)
    entropy = jnp.mean(_entropy(probs))
    return {
      'train': 100 * jnp.mean(correct(outputs.prediction, train.targets)),
      'test': 100 * jnp.mean(correct(tested.prediction, test.targets)),
      'alone': 100 * jnp.mean(correct(alone, train.targets)),
      'experts in use': jnp.sum(share > 0.01),
      'experts ever heard': jnp.sum(jnp.max(probs, axis=0) > 0.01),
      'gate entropy': entropy,
      'I(expert; case)': _entropy(jnp.mean(probs, axis=0)) - entropy,
    }

  return jax.vmap(one)(params)


def measured(model: AdaptiveMixture, problem: Problem, params) -> dict:
  """Measures of trained runs by name, each with one value for every run.

  - train, test: per cent of cases that the mixture gets right.
  - alone: per cent of training cases that each case's likeliest expert gets
    right by itself.
  - experts in use: number of experts that are the likeliest of more than 1 % of
    cases.
  - experts ever heard: number of experts with a proportion above 1 % in any
    case.
  - gate entropy: mean entropy of the proportions over cases, in nats.
  - I(expert; case): information about the case in the choice of an expert, in
    nats: the entropy of the mean proportions less the mean entropy. It is 0
    where one expert has all cases or proportions are the same for all cases,
    and at most ln E.

  Args:
    model: The system.
    problem: The problem that was learned.
    params: Weights of the runs, a tree of [S, ...].
  """
  values = _measured(model, params, problem.train, problem.test)
  return {name: np.asarray(v, float) for name, v in values.items()}
