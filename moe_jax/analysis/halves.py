"""A model's stacks with the lengths they see, and its parameters by role.

What the counts and the bytes have in common.
"""

import math
from typing import NamedTuple

import jax

from moe_jax.layers.experts.serving import ROLE as EXPERT
from moe_jax.layers.moe import MoeOptions
from moe_jax.layers.parameters import Role
from moe_jax.models import Model
from moe_jax.models.parameters import describe
from moe_jax.models.stack import StackConfig


class Half(NamedTuple):
  """One stack of a model, and how long its sequences are.

  Attributes:
    path: The path of the stack's parameters; () in a decoder-only model.
    stack: The stack's config.
    length: The number of its own tokens in an example.
    memory_len: The number of the encoder's tokens that it attends to; 0
      without an encoder.
  """

  path: tuple[str, ...]
  stack: StackConfig
  length: int
  memory_len: int

  @property
  def keys(self) -> int:
    """Tokens that each of its own attends to, all of them counted."""
    crosses = self.stack.block.cross
    return self.length + (self.memory_len if crosses else 0)

  @property
  def moe(self) -> MoeOptions | None:
    """The mixture of its sparse layers; None without experts."""
    return self.stack.experts

  @property
  def num_sparse(self) -> int:
    """Layers that have experts."""
    return sum(self.stack.sparse) if self.moe else 0


def halves(model: Model, seq_len: int, target_len: int = 0) -> list[Half]:
  """The model's stacks at these lengths, the encoder's first.

  Args:
    model: A model of blocks.
    seq_len: T; of an encoder-decoder T_enc.
    target_len: T_dec; 0 is `seq_len`.
  """
  if len(model.stacks) == 1:
    ((path, stack),) = model.stacks
    return [Half(path, stack, seq_len, 0)]
  (first, encoder), (second, decoder) = model.stacks
  return [
    Half(first, encoder, seq_len, 0),
    Half(second, decoder, target_len or seq_len, seq_len),
  ]


class Counted(NamedTuple):
  """A parameter as it is counted.

  Attributes:
    path: The parameter's path in the tree, which tells its stack.
    size: The number of its values.
    role: What it is for, and what is done with it.
  """

  path: tuple[str, ...]
  size: int
  role: Role

  @property
  def of_expert(self) -> bool:
    """Whether it belongs to the experts of a sparse layer."""
    return self.role.role == EXPERT

  @property
  def outside_layers(self) -> bool:
    """Whether it makes tokens into vectors, or vectors into logits."""
    return self.role.role in ('embedding', 'head')


def counted(model: Model, seq_len: int) -> list[Counted]:
  """Every parameter, with its size and its role."""
  trees = describe(model, seq_len)
  roles = jax.tree.leaves(
    trees.roles, is_leaf=lambda leaf: isinstance(leaf, Role)
  )
  shapes = jax.tree_util.tree_leaves_with_path(trees.shapes)
  return [
    Counted(tuple(key.key for key in path), math.prod(leaf.shape), role)
    for (path, leaf), role in zip(shapes, roles, strict=True)
  ]


def group_size(moe: MoeOptions, batch_size: int, length: int) -> int:
  """S, the tokens of a group, in a batch of so many sequences."""
  if moe.group_size == -1:
    return batch_size * length
  return moe.group_size or length


def is_dropless(moe: MoeOptions) -> bool:
  """Whether experts multiply as many rows as were chosen, and no empty one."""
  return not moe.dispatch.by_slot and not moe.router.by_expert
