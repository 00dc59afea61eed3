"""The file of chosen experts, which alone train among the experts.

Expert-specialised fine-tuning, https://arxiv.org/abs/2407.01906. Experts are
stacked in one array, so a mask tells them apart: gradient and update of the
others are exactly zero and their bits stay. Their gradient is computed all the
same, and the optimizer holds state for all experts of an array.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from moe_jax.errors import InputError
from moe_jax.models import Model, flat_trees
from moe_jax.models.layer_trees import numbers_of
from moe_jax.models.lora import TREE
from moe_jax.models.parameter_trees import ParameterTrees

_EXPERT, _LAYERS = 'expert', 'layers'


@dataclasses.dataclass(frozen=True)
class ChosenExperts:
  """The experts that train, by layer.

  Attributes:
    num_experts: E, the number of experts of a layer.
    layers: The numbers of the experts of each sparse layer, by its number.
    about: Other facts of the file, such as the rule and the run by which the
      experts were chosen.
  """

  num_experts: int
  layers: Mapping[int, tuple[int, ...]]
  about: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  def write(self, path: pathlib.Path) -> None:
    """Writes the file."""
    values = {
      **self.about,
      'num_experts': self.num_experts,
      'layers': {str(i): list(experts) for i, experts in self.layers.items()},
    }
    path.write_text(json.dumps(values, indent=2) + '\n', encoding='utf-8')

  def describe(self) -> str:
    """A line with the counts."""
    count = sum(len(experts) for experts in self.layers.values())
    total = self.num_experts * len(self.layers)
    by_layer = ', '.join(f'layer {i}: {len(e)}' for i, e in self.layers.items())
    return f'{count} of {total} experts chosen ({by_layer})'


def read(path: str) -> ChosenExperts:
  """Reads a file of chosen experts.

  Raises:
    ValueError: There is no such file, or it holds something else.
  """
  file = pathlib.Path(path).expanduser()
  option = f'trained_experts={path!r}'
  if not file.is_file():
    raise InputError(
      f'{option} is no file; `python -m moe_jax.finetuning choose` writes one'
    )
  try:
    values = json.loads(file.read_text(encoding='utf-8'))
    E, layers = values['num_experts'], values['layers']
    chosen = {int(i): tuple(experts) for i, experts in layers.items()}
    for i, experts in chosen.items():
      if len(set(experts)) < len(experts) or any(
        type(e) is not int or not 0 <= e < E for e in experts
      ):
        raise InputError(
          f'layer {i} has {list(experts)}, not numbers below {E}'
        )
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise InputError(
      f'{option} is no file of chosen experts: {error}'
    ) from None
  if not any(chosen.values()):
    raise InputError(f'{option} chooses no expert')
  about = {
    k: v for k, v in values.items() if k not in ('num_experts', 'layers')
  }
  return ChosenExperts(E, chosen, about)


def masks(
  chosen: ChosenExperts,
  model: Model,
  trees: ParameterTrees,
  names: frozenset[str],
) -> dict[str, np.ndarray]:
  """The masks of the parameters of experts that train, by name.

  Args:
    chosen: The chosen experts.
    model: The model.
    trees: Shapes, axes and roles of its parameters.
    names: The names of the parameters that train.

  Raises:
    ValueError: The model has other sparse layers or experts, or no parameter of
      experts trains.
  """
  model_E = {i: model.moe_of(i).num_retained for i in model.sparse_layers}
  file_E = {i: chosen.num_experts for i in chosen.layers}
  if model_E != file_E:
    raise InputError(
      f'trained_experts: the file has numbers of experts by layer {file_E}, '
      f'the model has {model_E}'
    )
  masks_by_name = dict(_masks(chosen, model, trees, names))
  if not masks_by_name:
    raise InputError(
      'trained_experts has no effect: no parameter of experts trains'
    )
  return masks_by_name


def _masks(
  chosen: ChosenExperts, model: Model, trees: ParameterTrees, names
) -> Iterator[tuple[str, np.ndarray]]:
  for path, axes in flat_trees.flatten(trees.axes).items():
    if '/'.join(path) not in names or _EXPERT not in axes:
      continue
    kernel_path = path[1:-1] if path[0] == TREE else path
    stack_place = model.place_of(kernel_path)
    if stack_place is None or axes[0] != _LAYERS:
      raise InputError(f'trained_experts: {"/".join(path)} is in no stack')
    shape = [1] * len(axes)
    shape[0] = len(stack_place.layers)
    shape[axes.index(_EXPERT)] = chosen.num_experts
    mask = [
      [e in chosen.layers[i] for e in range(chosen.num_experts)]
      for i in numbers_of(model.stacks, stack_place)
    ]
    yield '/'.join(path), np.array(mask).reshape(shape)
