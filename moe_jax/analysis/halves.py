"""A model's stacks with the lengths they see, and its parameters by name.

What the counts and the bytes have in common.
"""

from typing import NamedTuple

import jax
from flax import linen as nn

from moe_jax.layers.moe import MoeConfig
from moe_jax.models import Model, abstract_params
from moe_jax.models.stack import StackConfig
from moe_jax.partitioning import path_name


class Half(NamedTuple):
  """One stack of a model, and how long its sequences are.

  Attributes:
    prefix: Of its parameters' names.
    stack: Its config.
    length: Its own tokens in an example.
    memory_len: The tokens of the encoder that it attends to; 0 without one.
  """

  prefix: str
  stack: StackConfig
  length: int
  memory_len: int

  @property
  def keys(self) -> int:
    """Tokens that each of its own attends to, all of them counted."""
    crosses = self.stack.block.cross_attention is not None
    return self.length + (self.memory_len if crosses else 0)

  @property
  def num_sparse(self) -> int:
    """Layers that have experts."""
    return sum(self.stack.sparse) if self.stack.block.moe else 0


def halves(model: Model, seq_len: int, target_len: int = 0) -> list[Half]:
  """The model's stacks at these lengths, the encoder's first.

  Args:
    model: Either kind.
    seq_len: T; of an encoder-decoder T_enc.
    target_len: T_dec; 0 is `seq_len`.
  """
  if len(model.config.stacks) == 1:
    ((_, stack),) = model.config.stacks
    return [Half('', stack, seq_len, 0)]
  (_, encoder), (_, decoder) = model.config.stacks
  return [
    Half('encoder/', encoder, seq_len, 0),
    Half('decoder/', decoder, target_len or seq_len, seq_len),
  ]


def param_shapes(model: Model, seq_len: int) -> dict[str, jax.ShapeDtypeStruct]:
  """Every parameter by name."""
  shapes = nn.meta.unbox(abstract_params(model, seq_len))
  return {
    path_name(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
  }


def group_size(moe: MoeConfig, batch_size: int, length: int) -> int:
  """S, of a batch of so many sequences."""
  if moe.group_size == -1:
    return batch_size * length
  return moe.group_size or length


def capacity(moe: MoeConfig, num_tokens: int) -> int:
  """Slots of an expert in a group of so many tokens."""
  r = moe.router
  if r.kind == 'strictly_balanced':  # of training
    return -(-r.num_selected * num_tokens // r.num_experts)
  return r.capacity(
    group_size=num_tokens,
    num_experts=r.num_experts,
    num_selected=r.num_selected,
  )
