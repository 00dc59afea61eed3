"""Task routing: the task of a token chooses its experts, whatever the token is.

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
from moe_jax.layers.routers import contract, shared_options, steps


@dataclasses.dataclass(frozen=True)
class Task(contract.RouterOptions):
  """The options of routing by task.

  Balance loss and z-loss are those of a group that has each task of the model
  once. So a task counts once, however many tokens it has, and whether or not
  the batch has it: no split of a batch into groups, microbatches or devices
  changes the losses. Computed for groups of real rows, which have one task
  each, the balance loss would even out the gates within every task.

  All tokens of a task go to the same experts, so that a capacity would drop
  most of them: only a capacity that drops nothing is allowed.
  """

  takes_choices: ClassVar[bool] = True
  has_columns: ClassVar[bool] = True
  reads: ClassVar[tuple[str, ...]] = ('task_ids',)

  gates: str = shared_options.GATES
  jitter: float = shared_options.JITTER
  balance_weight: float = shared_options.BALANCE_WEIGHT
  balance_choices: str = shared_options.BALANCE_CHOICES
  z_weight: float = shared_options.Z_WEIGHT

  def problems_with(self, sizes):
    yield from steps.gate_problems(sizes, self.gates)
    yield from steps.drop_problems(sizes)

  def module(self, sizes, shared, name=None):
    return TaskRouter(self, sizes, shared, name=name)

  def causality(self, sizes):
    """Later tokens change no earlier output: a task is known in advance."""
    return contract.Causality.of_queues(sizes)


class TaskRouter(contract.Router):
  """The router whose logits are a learned table with a row for each task.

  A token chooses by the logits of its task.
  """

  options: Task

  def route(self, x, mask, train, token_info, layer, given=None):
    o = self.options
    N, E = self.shared.num_tasks, self.sizes.num_experts
    K = self.sizes.num_selected
    if not N:
      raise InputError(
        'the task router needs shared.num_tasks above 0; in a model it is '
        'model.num_tasks'
      )
    init, axes = nn.initializers.normal(1.0), (None, steps.AXES[1])
    init = parameters.boxed(init, axes, role=steps.ROLE, form='table')
    table = self.param('tasks', init, (N, E), jnp.float32)[None]  # [1, N, E]
    task = token_info.task_ids.astype(jnp.uint32)
    logits = steps.jittered(self, table, o.jitter, train)[0][task]
    chosen = routing.token_choice(
      logits,
      num_selected=K,
      capacity=self.sizes.slots(mask.shape[1]),
      mask=mask,
      gates=o.gates,
      expert_index=steps.chosen_experts(logits, K, given),
      given=given,
    )
    # The losses are those of a group with one token of each task, whatever the
    # batch has, times the number of real tokens.
    each_task = jnp.ones(table.shape[:2], bool)
    probs, index = jax.nn.softmax(table), routing.choose(table, K)
    balance = routing.balance_loss(probs, index, each_task, o.balance_choices)
    tokens = mask.sum().astype(jnp.float32)
    losses = {
      'balance_loss': balance[0] * tokens,
      'z_loss': routing.z_loss(table, each_task)[0] * tokens,
    }
    clean = table[0][task]
    return chosen, steps.choice_aux(self, losses, chosen, clean, mask)
