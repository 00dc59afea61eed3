"""Layers whose experts are rounded in turn, each after those before it.

The whole model is run with the kernels as rounded so far, so that the outputs
of rounded layers are the inputs of the next.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from moe_jax.compression import calibration, kernel_inputs
from moe_jax.compression.kernel_inputs import ExpertTokens
from moe_jax.compression.quantize_kernels import (
  Outcome,
  feed_forwards,
  joined,
  to_nearest,
)
from moe_jax.compression.whole_run import WholeRun
from moe_jax.layers.ffn import FfnLayer
from moe_jax.layers.kernel_format import KernelFormat
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.models.code_trees import Coded
from moe_jax.models.flat_trees import Path
from moe_jax.models.layer_trees import LayerPlace

# The number of experts that are rounded together, as in QMoE.
_GROUP_SIZE = 16


class Spot(NamedTuple):
  """The place of one layer's kernel.

  Attributes:
    path: The path of the parameter, in which layers are stacked.
    index: The number of the layer among the stacked ones.
  """

  path: Path
  index: int

  @property
  def name(self) -> str:
    """The name of the kernel in its module."""
    return self.path[-1]


class Layers:
  """The layers of a model whose experts are rounded in place.

  Attributes:
    spots: The kernels of each layer that are rounded, by the layer's number.
    without_tokens: The experts that no token that counts reaches, of each layer
      that was rounded by its inputs.
  """

  def __init__(
    self,
    run: WholeRun,
    kernels: dict[Path, Coded],
    batches: Sequence[dict[str, np.ndarray]],
  ):
    """Copies the parameters.

    Args:
      run: The run.
      kernels: The kernels that are rounded.
      batches: Calibration data; none to round to the nearest values.
    """
    self._run, self._kernels, self._batches = run, kernels, batches
    self._params = jax.tree.map(np.array, run.variables['params'])
    self.spots = _spots(run, kernels)
    self.without_tokens: dict[int, list[int]] = {}

  @property
  def by_data(self) -> bool:
    """Whether kernels are rounded by their inputs."""
    return bool(self._batches)

  def format_of(self, layer: int) -> KernelFormat:
    """The format that a layer's kernels get."""
    return self._kernels[self.spots[layer][0].path].format

  def quantize(self, layer: int) -> dict[Spot, Outcome]:
    """Rounds the kernels of a layer."""
    spots, format = self.spots[layer], self.format_of(layer)
    p = {
      name: x[spots[0].index]
      for name, x in self._subtree(spots[0].path[:-1]).items()
    }
    if self._batches:
      by_name = self._by_inputs(layer, p, format)
    else:
      by_name = {x.name: to_nearest(p[x.name], format) for x in spots}
    outcomes = {spot: by_name[spot.name] for spot in spots}
    for spot, outcome in outcomes.items():
      stacked, values = self._subtree(spot.path), outcome.rounded.values
      stacked[spot.index] = np.asarray(values).astype(stacked.dtype)
    return outcomes

  def _subtree(self, path: Path) -> Any:
    tree: Any = self._params
    for name in path:
      tree = tree[name]
    return tree

  def _by_inputs(
    self, layer: int, p: dict[str, np.ndarray], format: KernelFormat
  ) -> dict[str, Outcome]:
    """The kernels of a layer's experts by GPTQ, some experts at a time."""
    model, variables = self._run.model, self._run.variables
    prefix, tokenizer = model.sequence_of(layer), self._run.options.tokenizer
    tokens = ExpertTokens(
      [
        calibration.capture(
          model, {**variables, 'params': self._params}, batch
        )[layer]
        for batch in self._batches
      ],
      [kernel_inputs.counted(b, prefix, tokenizer) for b in self._batches],
    )
    self.without_tokens[layer] = tokens.without_tokens
    groups = [
      feed_forwards(
        self._expert(layer),
        {name: x[first : first + _GROUP_SIZE] for name, x in p.items()},
        tokens.rows(slice(first, first + _GROUP_SIZE)),
        format,
      )
      for first in range(0, tokens.num_experts, _GROUP_SIZE)
    ]
    return {name: joined(x[name] for x in groups) for name in groups[0]}

  def _expert(self, layer: int) -> FfnLayer:
    """The computation of an expert of a layer."""
    blocks = [
      stack.block for _, stack in self._run.model.stacks for _ in stack.sparse
    ]
    moe, shared = cast(MoeOptions, blocks[layer].moe), blocks[layer].shared
    return FfnLayer(moe.expert.twin(1).ffn, shared)


def _spots(run: WholeRun, kernels: dict[Path, Coded]) -> dict[int, list[Spot]]:
  """The kernels of each layer, the layers in order."""
  first, count = {}, 0
  for path, stack in run.model.stacks:
    first[path] = count
    count += len(stack.sparse)
  spots: dict[int, list[Spot]] = {}
  for path in kernels:
    place = cast(LayerPlace, run.model.place_of(path))
    for index, layer in enumerate(place.layers):
      spots.setdefault(first[place.stack] + layer, []).append(Spot(path, index))
  return dict(sorted(spots.items()))
