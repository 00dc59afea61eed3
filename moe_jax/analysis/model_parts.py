"""The parts of a model whose costs are counted: stacks, parameters, groups.

Parameters are told apart by their roles, never by their names.
"""

import math
from typing import NamedTuple

import jax

from moe_jax.errors import InputError
from moe_jax.layers.experts.serving import ROLE as EXPERT
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.parameters import Role
from moe_jax.models import Model
from moe_jax.models.parameter_trees import describe
from moe_jax.models.stack import StackConfig


class Half(NamedTuple):
  """The encoder or the decoder of a model, with the lengths of its sequences.

  Attributes:
    path: Path of the stack's parameters in the tree of all parameters; it is
      empty in a model without an encoder.
    stack: Configuration of the stack of blocks.
    length: Number of tokens of the stack's own sequence in an example.
    memory_len: Number of tokens that the encoder reads in an example, which
      the decoder attends to; 0 in the encoder itself and in a model without
      an encoder.
  """

  path: tuple[str, ...]
  stack: StackConfig
  length: int
  memory_len: int

  @property
  def keys(self) -> int:
    """Number of tokens that each token attends to, masked ones counted."""
    crosses = self.stack.block.cross
    return self.length + (self.memory_len if crosses else 0)

  @property
  def moe(self) -> MoeOptions | None:
    """The mixture of the last layer that has one; None where no layer has."""
    return self.moes[-1] if self.moes else None

  @property
  def moes(self) -> list[MoeOptions]:
    """The mixtures of the layers that have experts."""
    return [moe for moe in self.stack.moes if moe is not None]

  @property
  def num_sparse(self) -> int:
    """The number of layers that have experts."""
    return len(self.moes)


def halves(model: Model, seq_len: int, target_len: int = 0) -> list[Half]:
  """The stacks of a model at these lengths, an encoder's first.

  Args:
    model: A model of blocks.
    seq_len: Number of tokens of a row; of an encoder-decoder, of the encoder's
      row.
    target_len: Number of tokens of a decoder's row in an encoder-decoder; 0
      stands for `seq_len`.
  """
  if len(model.stacks) == 1:
    ((path, stack),) = model.stacks
    return [Half(path, stack, seq_len, 0)]
  (encoder_path, encoder), (decoder_path, decoder) = model.stacks
  return [
    Half(encoder_path, encoder, seq_len, 0),
    Half(decoder_path, decoder, target_len or seq_len, seq_len),
  ]


class SizedParameter(NamedTuple):
  """A parameter with its size, role and number of experts.

  Attributes:
    path: Path of the parameter in the tree of all parameters, which tells the
      stack that it belongs to.
    size: Number of its values.
    role: Part of the model that it belongs to, and its use there.
    num_experts: Number of the experts that have a part of it; 1 unless it is
      one of stacked experts.
  """

  path: tuple[str, ...]
  size: int
  role: Role
  num_experts: int = 1

  @property
  def of_expert(self) -> bool:
    """Whether the parameter belongs to the experts of a sparse layer."""
    return self.role.role == EXPERT

  @property
  def outside_layers(self) -> bool:
    """Whether it belongs to the embedding or to the output projection."""
    return self.role.role in ('embedding', 'head')


def sized_parameters(model: Model) -> list[SizedParameter]:
  """Every parameter of a model, with its size and its role.

  Raises:
    ValueError: Kernels are in codes, whose number is not that of parameters.
  """
  for _, stack in model.stacks:
    formats = [moe.expert.format for moe in stack.moes if moe is not None]
    for format in filter(None, formats):
      raise InputError(
        f'the model has kernels in codes of {format.name!r}, whose number is '
        'not that of its parameters; count the model that they were made of'
      )
  trees = describe(model)
  roles = jax.tree.leaves(
    trees.roles, is_leaf=lambda leaf: isinstance(leaf, Role)
  )
  axes = jax.tree.leaves(trees.axes, is_leaf=lambda x: isinstance(x, tuple))
  shapes = jax.tree_util.tree_leaves_with_path(trees.shapes)
  return [
    SizedParameter(
      tuple(key.key for key in path),
      math.prod(leaf.shape),
      role,
      leaf.shape[names.index('expert')] if 'expert' in names else 1,
    )
    for (path, leaf), role, names in zip(shapes, roles, axes, strict=True)
  ]


def group_size(moe: MoeOptions, batch_size: int, length: int) -> int:
  """The number of tokens of a routing group in a batch of such sequences."""
  if moe.group_size == -1:
    return batch_size * length
  return moe.group_size or length


def is_dropless(moe: MoeOptions) -> bool:
  """Whether experts multiply only rows that were chosen, none empty."""
  return not moe.dispatch.by_slot and not moe.router.by_expert
