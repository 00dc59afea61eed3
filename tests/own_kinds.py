"""A user's module with classes for the choices that a config has.

Those of tokenizers and tasks are in `tests/data/own_kinds.py`.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from moe_jax import routing
from moe_jax.config import option
from moe_jax.data.contracts import Selection, SourceOptions, Texts
from moe_jax.layers.experts import ExpertOptions
from moe_jax.layers.routers.contract import Causality, Router, RouterOptions
from moe_jax.training.evaluate import EvaluationOptions
from moe_jax.training.optimizer import Optimizer
from moe_jax.training.schedules import Schedule


@dataclasses.dataclass(frozen=True)
class InTurn(RouterOptions):
  """Options of a router that gives tokens to experts in turn."""

  first: int = option(0, 'Number of the first expert.', minimum=0)
  step: int = option(1, 'Number of experts to the next token.', minimum=0)

  def module(self, sizes, shared, name=None):
    return InTurnRouter(self, sizes, shared, name=name)

  def causality(self, sizes):
    return Causality.of_queues(sizes)


class InTurnRouter(Router):
  """The module of the router `InTurn`."""

  options: InTurn

  def route(self, x, mask, train, token_info, layer):
    E, K, S = self.sizes.num_experts, self.sizes.num_selected, mask.shape[1]
    turn = self.options.step * np.arange(S)
    index = self.options.first + np.add.outer(turn, np.arange(K))
    chosen = routing.even_choice(
      jnp.broadcast_to(jnp.int32(index % E), (*mask.shape, K)),
      num_experts=E,
      capacity=self.sizes.slots(S),
      mask=mask,
    )
    stats = routing.routing_stats(chosen, None, mask)
    return chosen, routing.empty_aux(E, K)._replace(stats=stats)


@dataclasses.dataclass(frozen=True)
class Promised(InTurn):
  """Options of a router that does not return the loss that has a weight."""

  depth_weight: float = option(0.25, 'Weight of the depth.', minimum=0)


@dataclasses.dataclass(frozen=True)
class Deep(Promised):
  """Options of a router with a loss of its own, the depth, which it learns."""

  def module(self, sizes, shared, name=None):
    return DeepRouter(self, sizes, shared, name=name)


class DeepRouter(InTurnRouter):
  """The module of the router `Deep`."""

  def route(self, x, mask, train, token_info, layer):
    depth = self.param('depth', nn.initializers.constant(3.0), ())
    chosen, aux = super().route(x, mask, train, token_info, layer)
    return chosen, aux._replace(losses={'depth_loss': depth * mask.sum()})


@dataclasses.dataclass(frozen=True)
class Linear(ExpertOptions):
  """Options of an expert that is a single product."""

  std: float = option(0.1, 'Standard deviation of the kernel.', above=0)

  def module(self, shared, name):
    return LinearExpert(self.std, name=name)


class LinearExpert(nn.Module):
  """The module of the expert `Linear`."""

  std: float

  @nn.compact
  def __call__(self, rows, train):
    init = nn.initializers.normal(self.std)
    return nn.Dense(rows.shape[-1], kernel_init=init)(rows)


@dataclasses.dataclass(frozen=True)
class Counting(SourceOptions):
  """A source of documents of numbers, spelled digit by digit."""

  count: int = option(300, 'Number of documents.', minimum=2)

  def texts(self, selection=Selection()):
    def documents(split):
      numbers = range(0, self.count, 2) if split == 'train' else range(9)
      return (f'{n} and {n + 1} ' * 9 for n in numbers)

    return Texts('counting', f'counting {self.count}', documents)


@dataclasses.dataclass(frozen=True)
class Norm(EvaluationOptions):
  """An evaluation that measures the norm of the parameters."""

  power: int = option(2, 'Power of the norm.', minimum=1)

  def measure(self, setting):
    def row(variables, step):
      norm = optax.tree.norm(variables['params'])
      return {'norm': float(norm) ** self.power, 'step': step}

    return row


@dataclasses.dataclass(frozen=True)
class SignSgd(Optimizer):
  """An optimizer that steps by the sign of the gradient."""

  def preconditioner(self, axes, roles):
    return optax.scale_by_sign()


@dataclasses.dataclass(frozen=True)
class Steps(Schedule):
  """A schedule whose rate halves every few steps."""

  every: int = option(2, 'Number of steps at one rate.', minimum=1)

  def after_warmup(self, peak, steps):
    return optax.exponential_decay(peak, self.every, 0.5, staircase=True)


@dataclasses.dataclass(frozen=True)
class Unfinished(RouterOptions):
  """A router that lacks a method of its contract."""

  def causality(self, sizes):
    return Causality.of_queues(sizes)


class Undecorated(InTurn):
  """A router without the decorator `dataclass`."""

  other: int = option(1, 'Another number.', minimum=0)
