"""The description of a model's layers, which the model gives once.

Losses, the state of routers, generation, replay, analysis and changes of
parameters derive from this description all that they need to know of layers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.models.pattern import layer_name, period_name, segments
from moe_jax.models.stack import Padding, StackConfig
from moe_jax.shapes import Array, Float32

Path = tuple[str, ...]


class Layer(NamedTuple):
  """One layer of a stack.

  Attributes:
    moe: The mixture of experts of the layer; None for a dense layer. Sizes that
      a config leaves at 0 are filled in.
    path: The path of the layer's variables in the variables of the model.
    index: The index of the layer in arrays that several layers share, stacked;
      None if it has arrays of its own.
  """

  moe: MoeOptions | None = None
  path: Path = ()
  index: int | None = None


class LayerPlace(NamedTuple):
  """The layers that a stacked parameter belongs to.

  Attributes:
    stack: The path of the stack; () in a model with a single stack.
    name: The parameter's path within a layer.
    layers: The indices of the layers in their stack, in the order in which
      they are stacked.
    numbers: The indices of the same layers in the model, where an encoder's
      layers come first.
  """

  stack: Path
  name: Path
  layers: tuple[int, ...]
  numbers: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class LayerStack:
  """Layers that tokens pass one after the other: a decoder, or an encoder.

  Attributes:
    layers: The layers, in order.
    path: The path of the stack's variables in the variables of the model.
    prefix: The prefix of the batch keys that hold the stack's tokens.
    causal: Whether a token sees no later tokens, as in a decoder.
    padding: The rule for whether routers see padding.
    blocks: The configuration of the layers if they are Transformer blocks; None
      if they are not.
  """

  layers: tuple[Layer, ...] = ()
  path: Path = ()
  prefix: str = ''
  causal: bool = True
  padding: Padding = Padding()
  blocks: StackConfig | None = None

  @classmethod
  def of_blocks(
    cls, blocks: StackConfig, path: Path = (), prefix: str = ''
  ) -> 'LayerStack':
    """The description of a stack of blocks, compiled to loops over layers.

    `path` is where the stack's variables are in those of the model, and
    `prefix` that of the batch keys of its tokens.
    """
    layers, moes = [], iter(blocks.moes)
    for segment in segments(blocks.kinds):
      for i in range(segment.repeats):
        period, index = segment.name, i
        if not blocks.stacked:
          period, index = period_name(segment, i), None
        for j in range(len(segment.pattern)):
          place = (*path, period, layer_name(j))
          layers.append(Layer(next(moes), place, index))
    causal = blocks.block.causal
    return cls(tuple(layers), path, prefix, causal, blocks.padding, blocks)


class Stacks(tuple[LayerStack, ...]):
  """The stacks of a model, an encoder's first.

  A layer's index in the model counts from the first layer of the first stack.
  """

  __slots__ = ()

  @property
  def blocks(self) -> tuple[StackConfig, ...]:
    """The configuration of each stack of blocks; () in a model without any."""
    return tuple(stack.blocks for stack in self if stack.blocks is not None)

  @property
  def layers(self) -> tuple[Layer, ...]:
    """The layers of all stacks, in order."""
    return tuple(layer for stack in self for layer in stack.layers)

  @property
  def moes(self) -> tuple[MoeOptions | None, ...]:
    """The mixture of experts of each layer; None for a dense layer."""
    return tuple(layer.moe for layer in self.layers)

  @property
  def num_layers(self) -> int:
    """L, the number of layers."""
    return len(self.moes)

  @property
  def sparse_layers(self) -> tuple[int, ...]:
    """The indices of the layers that have experts."""
    return tuple(i for i, moe in enumerate(self.moes) if moe is not None)

  @property
  def mixtures(self) -> tuple[MoeOptions, ...]:
    """The mixtures of experts of the sparse layers; () in a dense model."""
    return tuple(moe for moe in self.moes if moe is not None)

  @property
  def moe(self) -> MoeOptions | None:
    """The mixture of the last layer that has experts; None in a dense model."""
    return self.mixtures[-1] if self.mixtures else None

  def moe_of(self, layer: int) -> MoeOptions:
    """The mixture of experts of a layer.

    Raises:
      ValueError: The layer has no experts.
    """
    moe = self.moes[layer] if 0 <= layer < self.num_layers else None
    if moe is None:
      raise InputError(
        f'layer {layer} has no experts; sparse layers are {self.sparse_layers}'
      )
    return moe

  @property
  def sequences(self) -> tuple[str, ...]:
    """The prefix of each stack's batch keys: 'encoder_', or '' in a decoder."""
    return tuple(stack.prefix for stack in self)

  def sequence_of(self, layer: int) -> str:
    """The prefix of the batch keys that hold the tokens of a layer."""
    return [stack.prefix for stack in self for _ in stack.layers][layer]

  @property
  def task_sequences(self) -> tuple[str, ...]:
    """The prefixes of those `sequences` whose tokens are routed by task."""
    return tuple(
      stack.prefix
      for stack in self
      if any('task_ids' in m.router.reads for m in Stacks([stack]).mixtures)
    )

  @property
  def num_tasks(self) -> int:
    """The number of tasks that routers tell apart; 0 if none routes by task."""
    return max((c.block.shared.num_tasks for c in self.blocks), default=0)

  @property
  def leaks_future(self) -> bool:
    """Whether later tokens can change a decoder's earlier outputs.

    Encoders do not count, as each of their tokens sees all tokens anyway.
    """
    decoders = Stacks(stack for stack in self if stack.causal)
    return any(moe.leak() is not None for moe in decoders.mixtures)

  @property
  def capacity_binds(self) -> bool:
    """Whether some layer can drop a token because an expert is full."""
    return any(moe.capacity.binds for moe in self.mixtures)

  @property
  def forced_balance(self) -> str:
    """The warning that `moe.force_balance` forces choices; '' if not set."""
    return next(filter(None, (moe.forced for moe in self.mixtures)), '')

  @property
  def keeps_router_state(self) -> bool:
    """Whether routers keep variables in the collection `router_state`."""
    return any(moe.router.keeps_state for moe in self.mixtures)

  def loss_weights(self) -> dict[str, float]:
    """The weight of each loss of the layers' `MoeAux`, by the loss's name.

    A name is such as 'balance_loss'; a dense model has {}.
    """
    weights = {}
    for moe in self.mixtures:
      weights |= moe.router.loss_weights()
    return weights

  def routed_tokens(self, batch: Mapping[str, Array]) -> Float32[Array, ' L']:
    """The number of a batch's tokens that each layer's router sees, at least 1.

    The routers' losses are divided by this number. Padding counts if routers
    see it.
    """
    counts = []
    for stack in self:
      routed = stack.padding.routed(batch[f'{stack.prefix}segment_ids'])
      tokens = jnp.maximum(routed.sum().astype(jnp.float32), 1.0)
      counts.append(jnp.full(len(stack.layers), tokens))
    return jnp.concatenate(counts)

  def layer_trees(self, collection: Mapping[str, Any]) -> tuple[Any, ...]:
    """Each layer's variables in a collection; {} for a layer that has none.

    `collection` is one of the model, such as its parameters. Slices are taken
    of arrays that several layers share.
    """
    trees = []
    for layer in self.layers:
      tree = subtree(collection, layer.path)
      if (i := layer.index) is not None:
        tree = jax.tree.map(lambda leaf, i=i: leaf[i], tree)
      trees.append(tree)
    return tuple(trees)

  def place_of(self, path: Path) -> LayerPlace | None:
    """The layers of the stacked parameter at a path; None for any other one."""
    first = 0
    for stack in self:
      numbers, name = [], path
      for i, layer in enumerate(stack.layers):
        start, rest = path[: len(layer.path)], path[len(layer.path) :]
        if layer.index is not None and start == layer.path:
          numbers.append(i)
          name = rest
      if numbers:
        in_model = tuple(first + i for i in numbers)
        return LayerPlace(stack.path, name, tuple(numbers), in_model)
      first += len(stack.layers)
    return None


def with_subtree(tree: dict[str, Any], path: Path, part: Any) -> dict[str, Any]:
  """A model's tree of variables with `part` as those of the stack at `path`.

  The path is one name, or () in a model with a single stack: then the result is
  `part`.
  """
  return {**tree, path[0]: part} if path else part


def subtree(tree: Mapping[str, Any], path: Path) -> Any:
  """The part of a tree at a path; {} where there is none."""
  for name in path:
    tree = tree.get(name, {})
  return tree
