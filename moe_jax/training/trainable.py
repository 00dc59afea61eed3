"""The parameters that train, and what a step does to all other parameters.

    config.trainable = 'experts + router'

A parameter that does not train has no gradient computed, no state in the
optimizer and no share in clipping or decay, and a router that does not train
keeps its state, such as a balancing bias.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax.errors import InputError
from moe_jax.models import Model
from moe_jax.models.lora import TREE, Adapters
from moe_jax.models.selection import names_of
from moe_jax.models.trees import ParameterTrees, flatten
from moe_jax.partitioning import path_name


@dataclasses.dataclass(frozen=True)
class Trained:
  """The parameters of a run that train; all others keep their values.

  Attributes:
    expression: The option `trainable`, which selects the parameters; 'lora'
      where adapters train in place of these.
    names: The names of the parameters that train, such as 'layers/layer_0/w'.
    masks: Arrays of booleans, True for experts that train, by the name of the
      parameter, for parameters of which only some experts train; dimensions
      other than those of layers and experts have size 1.
  """

  expression: str
  names: frozenset[str]
  masks: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

  def part(
    self, tree: Any, is_leaf: Callable[[Any], bool] | None = None
  ) -> Any:
    """A tree like the parameters with None for each that does not train.

    Leaves of `tree` may be anything; `is_leaf` is that of `jax.tree.map`.
    """

    def trained_leaf(path, leaf):
      return leaf if path_name(path) in self.names else None

    return jax.tree_util.tree_map_with_path(trained_leaf, tree, is_leaf=is_leaf)

  @property
  def masks_digest(self) -> str:
    """The sha256 of the masks of experts; '' if there is no mask."""
    sha = hashlib.sha256()
    for name, mask in sorted(self.masks.items()):
      sha.update(f'{name} {mask.shape}'.encode() + mask.tobytes())
    return sha.hexdigest() if self.masks else ''

  def count(self, tree: Any) -> int:
    """The number of values in a tree like the parameters.

    None and experts that do not train, by `masks`, count as 0 values.
    """

    def size_of(path, leaf):
      mask = self.masks.get(path_name(path))
      share = 1 if mask is None else mask.mean()
      return round(leaf.size * share)

    return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(size_of, tree)))

  def stop_gradients(self, params: Any) -> Any:
    """The parameters, without a gradient to the experts that do not train.

    The gradient of these experts is exactly zero; it is computed all the same,
    since experts are stacked in one array.
    """
    return self._other_experts(params, jax.lax.stop_gradient)

  def _other_experts(self, tree: Any, change: Callable[[Any], Any]) -> Any:
    """A tree like the parameters, changed in the experts that do not train.

    These experts get their values in `change(leaf)`; all other values stay.
    """

    def one(path, leaf):
      mask = self.masks.get(path_name(path))
      return leaf if mask is None else jnp.where(mask, leaf, change(leaf))

    return jax.tree_util.tree_map_with_path(one, tree) if self.masks else tree

  def optimizer(
    self, inner: optax.GradientTransformation
  ) -> optax.GradientTransformation:
    """An optimizer of all parameters, with state only for those that train.

    Args:
      inner: The optimizer of trees with None for parameters that do not train.
    """

    def init(params):
      return inner.init(self.part(params))

    def update(updates, state, params=None):
      updates, state = inner.update(updates, state, self.part(params))
      # To add -0.0 keeps the bits of every number, those of -0.0 included.
      return self._other_experts(updates, lambda u: -jnp.zeros_like(u)), state

    return optax.GradientTransformation(init, update)

  def moved(self, state: Any, new: Any) -> Any:
    """The new state of routers, or the old where their modules do not train.

    A module trains if one of its parameters or an adapter of one trains; a
    module without parameters trains if all parameters of the model train.

    Args:
      state: The routers' state before a step.
      new: The routers' state after it.
    """
    if self.expression == 'all':
      return new
    names = [name.removeprefix(f'{TREE}/') for name in self.names]

    def one(path, old_leaf, new_leaf):
      module = ''.join(path_name(path).rpartition('/')[:2])
      trains = any(name.startswith(module) for name in names)
      return new_leaf if trains else old_leaf

    return jax.tree_util.tree_map_with_path(one, state, new)


def trained_by(adapters: Adapters, expression: str) -> Trained:
  """The parameters that train: adapters, if any, or what `expression` selects.

  Raises:
    ValueError: The expression selects nothing, or a part that the model lacks.
  """
  if adapters.kernels:
    return Trained(TREE, adapters.names)
  return Trained(expression, names_of(expression, adapters.trees.roles))


_EXPERT, _LAYERS = 'expert', 'layers'


@dataclasses.dataclass(frozen=True)
class ChosenExperts:
  """The experts that train, by layer, while all other experts do not.

  This is expert-specialised fine-tuning, https://arxiv.org/abs/2407.01906.
  Experts are stacked in one array, so a mask tells them apart: gradient and
  update of the experts that do not train are exactly zero and their bits stay.
  The gradient of the array is computed all the same, and the optimizer has
  state for all of its experts.

  Attributes:
    num_experts: E, the number of experts of a layer.
    layers: The indices of the chosen experts of each sparse layer, by the index
      of the layer.
    about: Other values of the file of chosen experts, such as the rule and the
      run by which they were chosen.
  """

  num_experts: int
  layers: Mapping[int, tuple[int, ...]]
  about: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def write(self, path: pathlib.Path) -> None:
    """Writes the chosen experts to a file."""
    values = {
      **self.about,
      'num_experts': self.num_experts,
      'layers': {str(i): list(experts) for i, experts in self.layers.items()},
    }
    path.write_text(json.dumps(values, indent=2) + '\n', encoding='utf-8')

  def describe(self) -> str:
    """A line with the number of experts that train, in all and by layer."""
    count = sum(len(experts) for experts in self.layers.values())
    total = self.num_experts * len(self.layers)
    by_layer = ', '.join(f'layer {i}: {len(e)}' for i, e in self.layers.items())
    return f'{count} of {total} experts chosen ({by_layer})'


def read_chosen(path: str) -> ChosenExperts:
  """Reads a file of chosen experts.

  Raises:
    ValueError: There is no such file, or it holds something else.
  """
  try:
    text = pathlib.Path(path).expanduser().read_text(encoding='utf-8')
    values = json.loads(text)
    E, layers = values.pop('num_experts'), values.pop('layers')
    chosen = {int(i): tuple(experts) for i, experts in layers.items()}
    for i, experts in chosen.items():
      numbers = {e for e in experts if type(e) is int and 0 <= e < E}
      if len(numbers) < len(experts):
        text = f'layer {i} has {list(experts)}, not distinct numbers below {E}'
        raise InputError(text)
    if not any(chosen.values()):
      raise InputError('it chooses no expert')
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise InputError(
      f'trained_experts={path!r} is no file of chosen experts, as `python -m '
      f'moe_jax.finetuning choose` writes one: {error}'
    ) from None
  return ChosenExperts(E, chosen, values)


def chosen_masks(
  chosen: ChosenExperts,
  model: Model,
  trees: ParameterTrees,
  names: frozenset[str],
) -> dict[str, np.ndarray]:
  """Masks, True for experts that train, by the name of the stacked parameter.

  A mask has the parameter's rank, with size 1 in all dimensions but those of
  layers and experts.

  Args:
    chosen: The chosen experts.
    model: The model.
    trees: Shapes, axes and roles of the model's parameters.
    names: The names of the parameters that train.

  Raises:
    ValueError: The model has other sparse layers, or other numbers of experts,
      than `chosen`; or no parameter of experts trains.
  """
  moes = enumerate(model.stacks.moes)
  model_E = {i: moe.num_retained for i, moe in moes if moe is not None}
  file_E = {i: chosen.num_experts for i in chosen.layers}
  if model_E != file_E:
    raise InputError(
      f'trained_experts: the file has numbers of experts by layer {file_E}, '
      f'the model has {model_E}'
    )
  masks = {}
  for path, axes in flatten(trees.axes).items():
    name = '/'.join(path)
    if name not in names or _EXPERT not in axes:
      continue
    kernel_path = path[1:-1] if path[0] == TREE else path
    stack_place = model.stacks.place_of(kernel_path)
    if stack_place is None or axes[0] != _LAYERS:
      raise InputError(f'trained_experts: {name} is in no stack')
    shape, E, layers = [1] * len(axes), chosen.num_experts, chosen.layers
    shape[0], shape[axes.index(_EXPERT)] = len(stack_place.layers), E
    mask = [[e in layers[i] for e in range(E)] for i in stack_place.numbers]
    masks[name] = np.array(mask).reshape(shape)
  if not masks:
    raise InputError(
      'trained_experts has no effect: no parameter of experts trains'
    )
  return masks
