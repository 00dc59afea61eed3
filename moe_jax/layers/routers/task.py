"""Task routing: a token goes where its task goes, whatever the token is.

https://arxiv.org/abs/2110.03742. A task is a source of the data's mixture, such
as a pair of languages. The embedding of a task is its E logits in the layer: a
linear layer on a wider embedding would give the same functions. As a fixed task
always has the same experts and gates, they can be taken out as a dense layer
(`moe_jax.compression.extract`).
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax import routing
from moe_jax.errors import InputError
from moe_jax.layers import parameters
from moe_jax.layers.routers.balancing import BalanceLoss, ZLoss
from moe_jax.layers.routers.by_token import Roomy, serve
from moe_jax.layers.routers.contract import LOGITS, SOWN, Router
from moe_jax.layers.routers.linear_gate import AXES, ROLE, Jitter, jittered
from moe_jax.shapes import Array, Bool, Float32

# The parameter that holds the logits of each task, [N, E].
TABLE = 'tasks'


@dataclasses.dataclass(frozen=True)
class Task(ZLoss, BalanceLoss, Jitter, Roomy):
  """The options of routing by task.

  Balance loss and z-loss are those of a group that has each task of the model
  once. So a task counts once, however many tokens it has, and whether or not
  the batch has it: no split of a batch into groups, microbatches or devices
  changes the losses. In groups of tokens, whose rows have one task each, the
  balance loss would even out the gates of each task by itself.
  """

  needs_ids: ClassVar[bool] = True
  needs_tasks: ClassVar[bool] = True
  takes_choices: ClassVar[bool] = True

  def module(self, sizes, shared, name=None):
    """The router's linen module."""
    return TaskRouter(self, sizes, shared, name=name)

  def leak(self, sizes):
    """Nothing: a token's task is known before the first token."""
    del sizes
    return None

  def multiply_adds(self, sizes, width):
    """Zero: there is no product."""
    return 0

  def ids_of(self, tokens):
    """The tasks of the tokens."""
    return tokens.task_ids.astype(jnp.uint32)

  def of_task(self, sizes, params, task):
    """The experts of the K largest logits of the task, and their gates."""
    logits = params[TABLE][task][None, None]  # [1, 1, E]
    index = routing.choose(logits, sizes.num_selected)
    gate = routing.gates_before_drop(logits, index, self.gates)
    return index[0, 0], gate[0, 0]


class TaskRouter(Router):
  """A table of logits with a row for each task, then token choice."""

  options: Task

  def route(self, x, mask, train, router_ids, layer, given=None):
    """Routes each group by itself; see `Router`."""
    del x, layer
    N, E = self.shared.num_tasks, self.sizes.num_experts
    if not N:
      raise InputError(
        'the task router needs shared.num_tasks above 0; in a model it is '
        'model.num_tasks'
      )
    init = parameters.boxed(
      nn.initializers.normal(1.0), (None, AXES[1]), role=ROLE, form='table'
    )
    table = self.param(TABLE, init, (N, E), jnp.float32)[None]  # [1, N, E]
    noisy = jittered(self, table, train)[0]
    chosen, _ = serve(self, noisy[router_ids], mask, train, given=given)
    aux = _each_task_once(self, table, mask)
    clean = table[0][router_ids]
    self.sow(SOWN, LOGITS, clean)
    stats = routing.routing_stats(chosen, clean, mask)
    return chosen, aux._replace(stats=stats)


def _each_task_once(
  module: Router,
  table: Float32[Array, '1 N E'],
  mask: Bool[Array, 'G S'],
) -> routing.MoeAux:
  """The losses of a group of one token a task, for all real tokens."""
  sizes = module.sizes
  E, K = sizes.num_experts, sizes.num_selected
  task_mask = jnp.ones(table.shape[:2], bool)
  balance = routing.balance_loss(
    jax.nn.softmax(table),
    routing.choose(table, K),
    task_mask,
    module.options.balance_choices,
  )
  tokens = mask.sum().astype(jnp.float32)
  return routing.empty_aux(E, K)._replace(
    losses={
      'balance_loss': balance[0] * tokens,
      'z_loss': routing.z_loss(table, task_mask)[0] * tokens,
    },
  )
