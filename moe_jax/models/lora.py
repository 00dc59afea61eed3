"""Low-rank adapters: a change of kernels that is a product of two thin factors.

    kernel + (alpha / rank) A B

LoRA, https://arxiv.org/abs/2106.09685. The factors A and B are parameters of
their own, in the tree `lora`; a kernel that is stacked by layer or by expert
has a pair for each layer or expert. The sums are computed from the factors
before the model is applied to them, so no layer knows of adapters. The gradient
of a whole adapted kernel is therefore computed on the way to the gradients of
its factors: adapters need no optimizer state for kernels, and no gradients of
kernels without adapters, but the gradients of adapted kernels cost as much time
and memory as without adapters.
"""

import dataclasses
import functools
import math
import string
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.config import Options, option
from moe_jax.errors import InputError
from moe_jax.layers.parameters import Names, Role
from moe_jax.models.description import Path
from moe_jax.models.selection import expression_problems, names_of
from moe_jax.models.trees import ParameterTrees, flatten, unflatten
from moe_jax.shapes import Array, PRNGKey

TREE = 'lora'  # the name of the tree of factors among the parameters
# The name of the rank among the axes that an optimizer is given.
RANK = 'rank'
_STACKED = ('layers', 'expert')


@dataclasses.dataclass(frozen=True)
class LoraOptions(Options):
  """Low-rank adapters of some kernels of a model."""

  rank: int = option(
    0,
    'Rank of low-rank adapters, the width of their factors; with 0 there are '
    'no adapters. With adapters, all parameters of the model itself keep '
    'their values.',
    minimum=0,
  )
  parts: str = option(
    'attention',
    'Parts of the model whose kernels have adapters, an expression like that '
    "of `trainable`: 'attention', 'ffn', 'experts', 'attention + experts' or "
    "'re:' and a regular expression of names.",
  )
  alpha: float = option(
    16.0,
    "Number that, divided by the rank, multiplies the product of an adapter's "
    'factors before it is added to the kernel.',
    above=0,
  )
  dropout: float = option(
    0.0,
    "Rate at which each of an adapter's `rank` directions is left out of a "
    'training step, drawn once for a microbatch, each layer and each expert, '
    'and the others are scaled up. Unlike in the paper, all tokens lose the '
    'same directions; 0 leaves out none.',
    minimum=0,
    below=1,
  )

  def problems(self) -> Iterator[str]:
    if not self.rank:
      yield from self.in_vain('unless rank is at least 1')
    yield from expression_problems('parts', self.parts)


class _Kernel(NamedTuple):
  """A kernel with an adapter.

  Its dimensions are, in order, those that stack kernels (layers and experts),
  those of the inputs and those of the outputs.

  Attributes:
    shape: The shape of the kernel.
    axes: The logical names of its dimensions.
    role: The part of the model that the kernel belongs to, and its use there.
    stacked: The number of leading dimensions that stack kernels.
    inputs: The number of dimensions that are contracted with activations.
  """

  shape: tuple[int, ...]
  axes: Names
  role: Role
  stacked: int
  inputs: int

  def factors(self, values: tuple[Any, ...], rank: Any) -> dict[str, Any]:
    """A value, such as a size or a name, for each dimension of A and of B.

    The result has a tuple for A as 'a' and for B as 'b'. `values` are those of
    the kernel's dimensions; A lacks the outputs, and B the inputs. The
    dimension of the rank, which both share, has the value `rank`.
    """
    stack, rest = values[: self.stacked], values[self.stacked :]
    return {
      'a': (*stack, *rest[: self.inputs], rank),
      'b': (*stack, rank, *rest[self.inputs :]),
    }

  def product(self, a: Array, b: Array) -> Array:
    """The product A B of the two factors, in the shape of the kernel."""
    dims = tuple(string.ascii_lowercase[: len(self.shape)])
    names = self.factors(dims, 'z')
    equation = f'{"".join(names["a"])},{"".join(names["b"])}->{"".join(dims)}'
    return jnp.einsum(equation, a, b, precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True, eq=False)
class Adapters:
  """The adapters of a model; without any, its methods change nothing.

  Attributes:
    options: The options of the adapters.
    kernels: The kernels that have adapters, by path.
    trees: Shapes, axes and roles of all parameters, those of the factors
      included; factors are float32.
  """

  options: LoraOptions
  kernels: Mapping[Path, _Kernel]
  trees: ParameterTrees

  @property
  def names(self) -> frozenset[str]:
    """The names of the factors, such as 'lora/layers/layer_0/w/a'."""
    return frozenset(
      '/'.join((TREE, *path, factor))
      for path in self.kernels
      for factor in 'ab'
    )

  @property
  def matrix_axes(self) -> dict[str, Any]:
    """The axes of all parameters, with `RANK` for the rank of factors.

    An optimizer tells a factor's inputs from its outputs by these axes; no
    sharding table splits the rank.
    """
    axes = flatten(self.trees.axes)
    for path, kernel in self.kernels.items():
      for factor, names in kernel.factors(kernel.axes, RANK).items():
        axes[TREE, *path, factor] = names
    return unflatten(axes)

  def base(self, params: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own parameters, without the factors of the adapters."""
    return {key: value for key, value in params.items() if key != TREE}

  def extend(self, params: Mapping[str, Any], key: PRNGKey) -> dict[str, Any]:
    """The parameters with new factors: A is drawn, B is zero.

    For a kernel of I inputs the variance of A is 1 / I.

    Args:
      params: The model's parameters, without factors.
      key: A key from which the key of each factor is made.
    """
    if not self.kernels:
      return dict(params)
    factors = {}
    for path, kernel in self.kernels.items():
      shapes = kernel.factors(kernel.shape, self.options.rank)
      fan_in = math.prod(kernel.shape[kernel.stacked :][: kernel.inputs])
      draw = jax.random.normal(_key_of(key, path), shapes['a'])
      factors[*path, 'a'] = draw / fan_in**0.5
      factors[*path, 'b'] = jnp.zeros(shapes['b'])
    return {**params, TREE: unflatten(factors)}

  def merged(
    self, params: Mapping[str, Any], key: PRNGKey | None = None
  ) -> dict[str, Any]:
    """The parameters that the model computes with: adapters are added.

    Sums are computed in float32 and rounded to the dtype of the kernel.

    Args:
      params: The parameters with factors.
      key: A key for dropout; None drops nothing.
    """
    if not self.kernels:
      return dict(params)
    kernels = self.merged_kernels(params, key)
    return unflatten(flatten(self.base(params)) | kernels)

  def merged_kernels(
    self, params: Mapping[str, Any], key: PRNGKey | None = None
  ) -> dict[Path, Array]:
    """The kernels that have adapters, by path, with their adapters added.

    `params` has the factors, too; `key` is for dropout, and None drops nothing.
    """
    flat = flatten(params)
    sums = {}
    for path, kernel in self.kernels.items():
      a, b = (flat[TREE, *path, factor] for factor in 'ab')
      if key is not None and self.options.dropout:
        # A dropped direction of the rank is multiplied by 0.
        keep_prob = 1 - self.options.dropout
        stack = kernel.shape[: kernel.stacked]
        shape = (*stack, *(1,) * kernel.inputs, self.options.rank)
        kept = jax.random.bernoulli(_key_of(key, path), keep_prob, shape)
        a = a * (kept / keep_prob)
      scale = self.options.alpha / self.options.rank
      old = flat[path]
      sum_of_both = old.astype(jnp.float32) + scale * kernel.product(a, b)
      sums[path] = sum_of_both.astype(old.dtype)
    return sums

  def merged_on_devices(self, params: Mapping[str, Any]) -> dict[str, Any]:
    """The model's parameters with adapters added, on the mesh of `params`.

    `params` has the factors, too. The sums keep the shardings of their kernels.
    """
    if not self.kernels:
      return dict(params)
    flat = flatten(self.base(params))
    shardings = tuple(flat[path].sharding for path in self.kernels)
    flat |= _compiled_merge(self, shardings)(params)
    return unflatten(flat)


@functools.lru_cache(maxsize=4)
def _compiled_merge(adapters: Adapters, shardings: tuple[Any, ...]):
  """The compiled `merged_kernels`, from parameters to kernels by path.

  `shardings` has that of each kernel with an adapter, in order.
  """
  out_shardings = dict(zip(adapters.kernels, shardings, strict=True))
  return jax.jit(adapters.merged_kernels, out_shardings=out_shardings)


def adapt(options: LoraOptions, trees: ParameterTrees) -> Adapters:
  """The adapters of a model.

  Args:
    options: The options of the adapters.
    trees: Shapes, axes and roles of the model's parameters.

  Raises:
    ValueError: `options.parts` names a part that the model lacks, selects no
      kernel, or selects a kernel whose inputs cannot be told from its outputs.
  """
  if not options.rank:
    return Adapters(options, {}, trees)
  shapes, axes, roles = (flatten(tree) for tree in trees)
  names = names_of(options.parts, trees.roles, 'lora.parts')
  kernels = {
    path: _kernel(path, leaf.shape, axes[path], roles[path])
    for path, leaf in shapes.items()
    if '/'.join(path) in names and roles[path].form == 'kernel'
  }
  if not kernels:
    raise InputError(f'lora.parts={options.parts!r} selects no kernel')
  for path, kernel in kernels.items():
    sizes = kernel.factors(kernel.shape, options.rank)
    names_of_dims = kernel.factors(kernel.axes, None)
    for factor in 'ab':
      factor_path = (TREE, *path, factor)
      shapes[factor_path] = jax.ShapeDtypeStruct(sizes[factor], jnp.float32)
      axes[factor_path], roles[factor_path] = names_of_dims[factor], kernel.role
  extended = map(unflatten, (shapes, axes, roles))
  return Adapters(options, kernels, ParameterTrees(*extended))


def _kernel(path: Path, shape: tuple[int, ...], axes: Names, role: Role):
  """The `_Kernel` at a path, whose inputs and outputs follow from its axes.

  The dimensions that stack kernels come first. Of two others, the first is the
  input. Of more, the first is the only input if its axis is 'embed' or
  'latent'; otherwise the last is the only output if its axis is 'embed'. Other
  axes raise ValueError.
  """
  stacked = 0
  while axes[stacked] in _STACKED:
    stacked += 1
  dims = axes[stacked:]
  if len(dims) == 2 or dims[0] in ('embed', 'latent'):
    inputs = 1
  elif dims[-1] == 'embed':
    inputs = len(dims) - 1
  else:
    raise InputError(
      f'lora.parts: {"/".join(path)} has dimensions {dims}; an adapter needs '
      "two, or 'embed' or 'latent' as the first, or 'embed' as the last"
    )
  return _Kernel(shape, axes, role, stacked, inputs)


def _key_of(key: PRNGKey, path: Path) -> PRNGKey:
  return jax.random.fold_in(key, zlib.crc32('/'.join((TREE, *path)).encode()))
