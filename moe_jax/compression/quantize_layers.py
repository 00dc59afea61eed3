"""Layers whose kernels are rounded in turn, each after those before it.

The whole model is run with the kernels as rounded so far, so that the outputs
of rounded layers are the inputs of the next. Not here: the rounding of kernels
(`quantize_kernels.py`), and the command (`quantize.py`).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.compression import calibration, kernel_inputs
from moe_jax.compression.gptq import hessian
from moe_jax.compression.grids import Rounded
from moe_jax.compression.kernel_inputs import ExpertTokens, Rows
from moe_jax.compression.quantize_kernels import (
  Outcome,
  compensated,
  feed_forwards,
  joined,
  to_nearest,
)
from moe_jax.compression.whole_run import WholeRun
from moe_jax.layers.block import CROSS_ATTENTION
from moe_jax.layers.experts.serving import SCOPE
from moe_jax.layers.experts.shared_expert import SHARED_EXPERT
from moe_jax.layers.ffn import FfnLayer
from moe_jax.layers.kernel_format import KernelFormat
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
    module: The path of the kernel's module within a layer.
    name: The name of the kernel in its module.
  """

  path: Path
  index: int
  module: Path
  name: str


Spots = dict[Path, dict[str, Spot]]  # by module, then by the kernel's name
Outcomes = dict[Spot, Outcome]


class Layers:
  """The layers of a model whose kernels are rounded in place.

  Attributes:
    spots: The kernels of each layer that are rounded, by the layer's number.
    without_tokens: The experts that no token that counts reaches, of each layer
      whose experts were rounded by their inputs.
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

  def format_of(self, spot: Spot) -> KernelFormat:
    """The format that a kernel gets."""
    return self._kernels[spot.path].format

  def quantize(self, layer: int) -> Outcomes:
    """Rounds the kernels of a layer, from the first on."""
    outcomes: Outcomes = {}
    for module, spots in self.spots[layer].items():
      for group in self._rounded(layer, module, spots):
        for name, outcome in group.items():
          outcomes[spots[name]] = outcome
          self.replace(spots[name], outcome.rounded)
    return outcomes

  def replace(self, spot: Spot, rounded: Rounded) -> None:
    """Replaces a kernel by its rounded values."""
    stacked = self._stacked(spot)
    values = np.asarray(rounded.values).reshape(stacked.shape[1:])
    stacked[spot.index] = values.astype(stacked.dtype)

  def _stacked(self, spot: Spot) -> np.ndarray:
    tree: Any = self._params
    for name in spot.path:
      tree = tree[name]
    return tree

  def _matrix(self, spot: Spot) -> np.ndarray:
    """A kernel [E, I, O], with E = 1 for a kernel outside of experts."""
    shape = self._kernels[spot.path].matrix
    return self._stacked(spot)[spot.index].reshape(-1, *shape[-2:])

  def _rounded(self, layer, module, spots) -> Iterator[dict[str, Outcome]]:
    """The outcomes of a module's kernels, grouped by equal inputs."""
    format = self.format_of(next(iter(spots.values())))
    if not self._batches:
      yield {
        name: to_nearest(self._matrix(spot), format)
        for name, spot in spots.items()
      }
    elif module[-1] == SCOPE:
      yield self._experts(layer, module, spots, format)
    elif 'w_query' in spots:
      inner = {name: spots[name] for name in spots if name != 'w_out'}
      for group in (inner, {'w_out': spots['w_out']}):
        yield self._projections(layer, module[0], group, format)
    else:
      x, mask = self._inputs(layer, '/'.join(module), 'in')
      rows = Rows(x[None], mask[None])
      p = self._feed_forward(module, spots)
      yield feed_forwards(self._ffn(layer, module), p, rows, format)

  def _projections(self, layer, module, spots, format) -> dict[str, Outcome]:
    # Keys and values have the same inputs, in self-attention those of queries.
    # To get inputs the whole model runs, so equal inputs are computed once.
    key = 'key' if module == CROSS_ATTENTION else 'query'
    inputs = {'w_query': 'query', 'w_key': key, 'w_value': key, 'w_out': 'out'}
    hessians = {
      name: self._hessian(layer, module, name)
      for name in dict.fromkeys(inputs[name] for name in spots)
    }
    return {
      name: compensated(self._matrix(spot), hessians[inputs[name]], format)
      for name, spot in spots.items()
    }

  def _experts(self, layer, module, spots, format) -> dict[str, Outcome]:
    masks = self._masks(self._run.model.sequence_of(layer))
    batches = self._run_batches(layer, calibration.capture)
    tokens = ExpertTokens(batches, masks)
    self.without_tokens[layer] = tokens.without_tokens
    p = self._feed_forward(module, spots)
    outcomes = []
    for first in range(0, tokens.num_experts, _GROUP_SIZE):
      group = slice(first, first + _GROUP_SIZE)
      params = {name: x[group] for name, x in p.items()}
      rows, ffn = tokens.rows(group), self._ffn(layer, module)
      outcomes.append(feed_forwards(ffn, params, rows, format))
    return {name: joined(group[name] for group in outcomes) for name in spots}

  def _feed_forward(self, module, spots) -> dict[str, np.ndarray]:
    """The parameters of a feed-forward, biases included, each [E, ...]."""
    spot = next(iter(spots.values()))
    tree: Any = self._params
    for name in spot.path[:-1]:
      tree = tree[name]
    stacked = len(self._kernels[spot.path].matrix) - 3
    p = {name: x[spot.index] for name, x in tree.items()}
    return p if stacked else {name: x[None] for name, x in p.items()}

  def _ffn(self, layer: int, module: Path) -> FfnLayer:
    """The computation of the feed-forward of a module of a layer."""
    first = 0
    for _, stack in self._run.model.stacks:
      if layer < first + len(stack.sparse):
        break
      first += len(stack.sparse)
    block, sparse = stack.block, stack.sparse[layer - first]
    ffn = block.ffn
    if sparse and block.moe is not None and module != ('extra_ffn',):
      ffn = block.moe.expert.twin(1).ffn
      if not block.moe.num_experts:
        ffn = block.moe.twin().ffn
      elif SHARED_EXPERT in module and (twin := block.moe.shared_twin):
        ffn = twin.ffn
    return FfnLayer(ffn, block.shared)

  def _hessian(self, layer: int, module: str, name: str) -> jax.Array:
    x, mask = self._inputs(layer, module, name)
    return hessian(jnp.asarray(x[None]), jnp.asarray(mask[None]))

  def _inputs(self, layer, module, name) -> tuple[np.ndarray, np.ndarray]:
    """The inputs [N, I] of a kernel over all batches, and their mask [N]."""
    capture = functools.partial(kernel_inputs.capture, module=module, name=name)
    x = map(np.asarray, self._run_batches(layer, capture))
    prefix = self._run.model.sequence_of(layer)
    if module == CROSS_ATTENTION and name == 'key':
      prefix = self._run.model.sequence_of(0)
    masks = self._masks(prefix)
    rows = [array.reshape(mask.size, -1) for array, mask in zip(x, masks)]
    return np.concatenate(rows), np.concatenate([m.ravel() for m in masks])

  def _masks(self, prefix: str) -> list[np.ndarray]:
    tokenizer = self._run.options.tokenizer
    return [
      kernel_inputs.counted(batch, prefix, tokenizer) for batch in self._batches
    ]

  def _run_batches(self, layer: int, capture: Callable[..., Any]) -> list[Any]:
    """The results of `capture` for a layer, one for each batch."""
    variables = {**self._run.variables, 'params': self._params}
    return [
      capture(self._run.model, variables, batch)[layer]
      for batch in self._batches
    ]


def _spots(run: WholeRun, kernels: dict[Path, Coded]) -> dict[int, Spots]:
  """The kernels of each layer, in the order in which a block uses modules."""
  first, count = {}, 0
  for path, stack in run.model.stacks:
    first[path] = count
    count += len(stack.sparse)
  spots: dict[int, Spots] = {}
  for path in kernels:
    layer_place = cast(LayerPlace, run.model.place_of(path))
    for index, layer in enumerate(layer_place.layers):
      *module, name = layer_place.name
      spot = Spot(path, index, tuple(module), name)
      by_module = spots.setdefault(first[layer_place.stack] + layer, {})
      by_module.setdefault(tuple(module), {})[name] = spot
  order = ('attention', CROSS_ATTENTION, 'moe', 'ffn', 'extra_ffn')
  return {
    layer: dict(sorted(by_module.items(), key=lambda x: order.index(x[0][0])))
    for layer, by_module in sorted(spots.items())
  }
