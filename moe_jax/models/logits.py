"""Logits of a vocabulary, and functions of them that need few at a time.

A float32 logit of each token for each word of a large vocabulary is the largest
array of many training steps. What is computed of logits for each token alone,
such as losses, is computed here for one block of tokens after another, and once
more for the gradient.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moe_jax.partitioning import spread
from moe_jax.shapes import Array, Float, Float32


def _static() -> Any:
  return dataclasses.field(metadata={'static': True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
  """The product that makes logits.

  Attributes:
    kernel: [M, V], in the type of parameters.
    bias: [V], added to the products; None: no bias.
    divisor: The number that logits are divided by.
    block_mb: The most MiB of logits that a device computes at once; 0: all.
    row_axes: The mesh axes that split the rows of a batch.
    vocab_axes: The mesh axes that split the vocabulary.
  """

  kernel: Float[Array, 'M V']
  bias: Float[Array, ' V'] | None
  divisor: float = _static()
  block_mb: int = _static()
  row_axes: tuple[str, ...] = _static()
  vocab_axes: tuple[str, ...] = _static()

  def __call__(self, x: Float[Array, '*B M']) -> Float32[Array, '*B V']:
    *shape, M = x.shape
    logits = _float32_product(x.reshape(-1, M), self.kernel)
    if self.bias is not None:
      logits = logits + self.bias.astype(jnp.float32)[None]
    if self.divisor != 1:
      logits = logits / self.divisor
    return logits.reshape(*shape, -1)

  def mb(self, num_tokens: int, sizes: Mapping[str, int]) -> float:
    """The MiB of a device's logits.

    Args:
      num_tokens: The number of the device's tokens.
      sizes: The sizes of the mesh axes, some of which split the vocabulary.
    """
    parts = math.prod(sizes.get(axis, 1) for axis in self.vocab_axes)
    return 4 * num_tokens * self.kernel.shape[1] / parts / 2**20


class Logits(NamedTuple):
  """The logits head(x), [B, T, V] in float32, before they are computed.

  Attributes:
    x: [B, T, M], the output of the last block.
    head: The product.
  """

  x: Float[Array, 'B T M']
  head: Head


def by_blocks(
  function: Callable[[Any, Mapping[str, Array]], Any],
  outputs: Any,
  rows: Mapping[str, Array],
) -> Any:
  """The tree function(outputs, rows), in which all `Logits` are computed.

  Its leaves are [B, T, ...], and their values at a token must depend on that
  token's alone. The function is called once if the logits fit in the MiB of the
  first head. Otherwise it is called for blocks of tokens, with one dimension in
  place of [B, T], and a gradient calls it again.

  Args:
    function: A pure function, which is given arrays [..., V] for `Logits`.
    outputs: A tree of `Logits` and arrays [B, T, ...].
    rows: Arrays [B, T, ...].
  """
  leaves, tree = jax.tree.flatten(outputs, lambda x: isinstance(x, Logits))
  heads = [x.head if isinstance(x, Logits) else None for x in leaves]
  arrays = [x.x if isinstance(x, Logits) else x for x in leaves]

  def of_tokens(heads, arrays, rows):
    computed = [
      x if head is None else head(x) for head, x in zip(heads, arrays)
    ]
    return function(tree.unflatten(computed), rows)

  axes, num_tokens, num_blocks = _division(heads, arrays[0])

  def looped(heads, arrays, rows):
    # In float32, the gradients of all blocks can be added.
    heads = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), heads)
    shape, size = arrays[0].shape[:2], num_tokens // num_blocks
    blocks = jax.tree.map(
      lambda x: x.reshape(num_blocks, size, *x.shape[2:]), (arrays, rows)
    )
    of_block = jax.checkpoint(functools.partial(of_tokens, heads))
    results = jax.lax.map(lambda block: of_block(*block), blocks)
    return jax.tree.map(lambda y: y.reshape(*shape, *y.shape[2:]), results)

  if num_blocks == 1:
    return of_tokens(heads, arrays, rows)
  if not axes:
    return looped(heads, arrays, rows)
  # Each device loops over its own rows, and gradients of kernels are exchanged
  # once instead of once for each block.
  split = PartitionSpec(axes)
  return jax.shard_map(
    looped,
    mesh=jax.typeof(arrays[0]).sharding.mesh,
    in_specs=(PartitionSpec(), split, split),
    out_specs=split,
    axis_names=set(axes),
    check_vma=False,
  )(heads, arrays, rows)


def _division(
  heads: list[Head | None], x: Array
) -> tuple[tuple[str, ...], int, int]:
  """How the tokens of x [B, T, ...] are divided, for logits by all heads.

  Returns the mesh axes that split the rows, the number of a device's tokens,
  and the number of equal blocks of them: (), 0 and 1 if no logits are divided.
  `heads` has None where `by_blocks` is given an array in place of `Logits`.
  """
  present = [head for head in heads if head is not None]
  if not present or not present[0].block_mb:
    return (), 0, 1
  sizes = spread(x)
  axes = tuple(name for name in present[0].row_axes if name in sizes)
  if x.shape[0] % math.prod(sizes[name] for name in axes):
    axes = ()
  B, T = x.shape[:2]
  num_tokens = B * T // math.prod(sizes[name] for name in axes)
  mb = sum(head.mb(num_tokens, sizes) for head in present)
  least = mb / present[0].block_mb
  counts = (n for n in range(1, num_tokens) if not num_tokens % n)
  return axes, num_tokens, next((n for n in counts if n >= least), num_tokens)


def _product(x: Array, kernel: Array) -> Array:
  return jnp.dot(x, kernel, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _float32_product(x, kernel):
  """x [N, M] of N tokens @ kernel [M, V] in the type of x, giving float32.

  The gradient has a rule of its own, since JAX would round a float32 kernel's
  gradient to the type of x.
  """
  return _product(x, kernel.astype(x.dtype))


def _forward(x, kernel):
  return _float32_product(x, kernel), (x, kernel)


def _backward(saved, dy):
  x, kernel = saved
  _, x_vjp = jax.vjp(lambda x: _product(x, kernel.astype(x.dtype)), x)
  x, w = x.astype(jnp.float32), kernel.astype(jnp.float32)
  _, kernel_vjp = jax.vjp(lambda w: _product(x, w), w)
  return *x_vjp(dy), kernel_vjp(dy)[0].astype(kernel.dtype)


_float32_product.defvjp(_forward, _backward)
