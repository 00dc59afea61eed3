"""The running mean of the parameters, by which a run is evaluated and exported.

    config.optimizer.ema = 0.999

After t optimizer steps it is the mean of the parameters after each step i from
1 to t, with weight ema^(t - i). The values before the first step have no
weight, so that the mean of a short run is not close to these values. The mean
is kept in float32, for the parameters that train.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.runs import finite
from moe_jax.shapes import Leaf
from moe_jax.training.step import TrainState, changed
from moe_jax.training.trainable import Trained


class Averages(NamedTuple):
  """The running mean of the parameters.

  Attributes:
    steps: int32 [], the number of optimizer steps in the mean; steps that were
      skipped do not count.
    mean: A tree like the parameters, float32, with None for those that do not
      train. Before the first step it holds the parameters.
  """

  steps: Leaf
  mean: Any


class AveragedState(TrainState):
  """The state of training of a run that keeps a running mean of parameters.

  Attributes:
    averages: The running mean of the parameters, an `Averages`.
  """

  averages: Any = None


def begun(state: TrainState, decay: float, trained: Trained) -> TrainState:
  """Returns a run's first state with a running mean that covers no step yet.

  The mean is of the parameters in `trained`. `decay` is the option
  `optimizer.ema`; where it is 0, the state is returned as it is.
  """
  if not decay:
    return state
  part = trained.part(state.params)
  mean = jax.tree.map(lambda p: jnp.array(p, jnp.float32), part)
  averages = Averages(jnp.zeros((), jnp.int32), mean)
  return AveragedState(**vars(state), averages=averages)


def averaging(
  train_step: Callable[..., Any], decay: float, trained: Trained
) -> Callable[..., Any]:
  """Wraps a training step so that it updates the running mean, too.

  The result is a step, too, whose states are `AveragedState`s.

  Args:
    train_step: The step, (state, batch) -> (state, metrics).
    decay: The factor by which each later step multiplies a step's weight in the
      mean; with 0 no mean is kept, and `train_step` is returned.
    trained: The parameters that train.
  """
  if not decay:
    return train_step

  def step(state, batch):
    new, metrics = train_step(state, batch)
    steps = state.averages.steps + 1
    # 1 - decay**steps would cancel in float32 where decay is near 1.
    share = (1 - decay) / -jnp.expm1(steps * math.log(decay))
    mean = jax.tree.map(
      lambda mean, p: mean + share * (p - mean),
      state.averages.mean,
      trained.part(new.params),
    )
    averages = Averages(steps, mean)
    new = AveragedState(**vars(new) | {'averages': averages})
    flags = finite.flags(finite.without_opt_state(new))
    return new, metrics._replace(finite=flags)

  return step


def averaged(params: Any, averages: Averages | None) -> Any:
  """The parameters, in which running means replace those that train.

  The means are cast to the parameters' types. `averages` None gives `params`.
  """
  if averages is None:
    return params
  return changed(averages.mean, params, lambda mean, p: mean.astype(p.dtype))


def kept_by_optimizer(state: TrainState) -> Any:
  """The optimizer's state and the running means, None if not kept, as a pair.

  Estimates of memory count both as the optimizer's.
  """
  return state.opt_state, getattr(state, 'averages', None)
