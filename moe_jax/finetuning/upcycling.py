"""One model's parameters as another's: sparse from dense, or more experts.

Sparse upcycling (https://arxiv.org/abs/2212.05055): each expert begins as a
copy of the dense feed-forward in its place, the router is new, all else is
copied. Experts of a sparse model are copied by number, with their columns of
the router.

What is kept of the function, where there is room for every token and no noise:

- From dense: all of it if gates sum to one (`gates='renormalized'`, K >= 2; at
  K = 1 too, but then no gradient reaches the router). Raw gates shrink what a
  layer adds.
- n times the experts: all of it if K is n times as large too. With K as it was
  a token meets copies of fewer experts, each at 1/n of its raw gate.
- Fewer experts: nothing is promised.

Not here: which parameter is made of which (`matching.py`), and reading the
other run (`start.py`).
"""

import collections
import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from moe_jax import models
from moe_jax.layers.initializers import axis_names
from moe_jax.models import Model
from moe_jax.shapes import Array, PRNGKey

Path = tuple[str, ...]
ROUTER = ('moe', 'router')
# Of the experts' kernels, and of the router's outputs.
EXPERT_AXES = ('expert', 'expert_choice')


@dataclasses.dataclass(frozen=True)
class Copies:
  """How copies of experts come to differ.

  Attributes:
    experts: The source of each expert; () is `sources_of` their numbers.
    router_std: Standard deviation of routers that are new (0.02 in sparse
      upcycling); 0.0: as the model draws them.
    expert_noise: Of normal noise on each copy of an expert but the first, as a
      fraction of the kernel's root mean square.
    router_noise: The same for their router columns, which otherwise tie: then
      the expert of the lower number is chosen.
  """

  experts: tuple[int, ...] = ()
  router_std: float = 0.0
  expert_noise: float = 0.0
  router_noise: float = 0.0

  def __post_init__(self):
    for name in ('router_std', 'expert_noise', 'router_noise'):
      if getattr(self, name) < 0:
        raise ValueError(f'{name}={getattr(self, name)} is negative')


class Piece(NamedTuple):
  """Where a layer's parameter comes from.

  Attributes:
    path: Of the source's array; None: it is new.
    period: Its index there; None: the array as a whole.
    stacked: Whether it becomes one copy an expert.
  """

  path: Path | None
  period: int | None = None
  stacked: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
  """How a model's parameters are made of another's.

  Attributes:
    model: That begins.
    pieces: Of each parameter, one a period of its layers.
    experts: The source of each expert of layers that were sparse.
    num_source_experts: How many those had; 0: the source is dense.
    copies: The rest of what was asked.
    upcycled: The layers that were dense, the encoder's first.
  """

  model: Model
  pieces: dict[Path, list[Piece]]
  experts: tuple[int, ...]
  num_source_experts: int
  copies: Copies
  upcycled: tuple[int, ...]

  @property
  def copies_all(self) -> bool:
    """Whether every array is the source's own, but for its type."""
    return all(
      [piece.path for piece in pieces] == [path] * len(pieces)
      and [piece.period for piece in pieces] in ([None], [*range(len(pieces))])
      for path, pieces in self.pieces.items()
    ) and self.experts == tuple(range(self.num_source_experts))

  def describe(self) -> str:
    """What becomes of the parameters, in a line."""
    c, said = self.copies, []
    if self.upcycled:
      E = self.model.config.moe.router.num_experts
      drawn = f' with std {c.router_std:g}' if c.router_std else ''
      said.append(
        f'layers {list(self.upcycled)} made sparse, {E} copies of each dense '
        f'feed-forward, routers drawn{drawn}'
      )
    if self.experts != tuple(range(self.num_source_experts)):
      said.append(
        f'{self.num_source_experts} experts made {len(self.experts)}, copies '
        f'of {list(self.experts)}'
      )
    for name in ('expert_noise', 'router_noise'):
      if getattr(c, name):
        said.append(f'{name} {getattr(c, name):g}')
    return '; '.join([*said, 'the rest copied' if said else 'all copied'])

  def apply(
    self, params: Mapping[str, Any], key: PRNGKey, seq_len: int
  ) -> dict[str, Any]:
    """The parameters: a pure function, to be jitted with shardings.

    Args:
      params: The source's, unboxed.
      key: As a run draws its own parameters from; new ones are the same.
      seq_len: Of the run.
    """
    boxed = models.init_params(self.model, key, seq_len)
    axes = flat(axis_names(boxed))
    source, new = flat(params), flat(nn.meta.unbox(boxed))
    made = {
      path: self._make(path, source, new[path], axes[path], key) for path in new
    }
    return traverse_util.unflatten_dict(made)

  def _make(self, path, source, new, axes, key) -> Array:
    key = jax.random.fold_in(key, zlib.crc32('/'.join(path).encode()))
    pieces = self.pieces[path]
    if self.copies.router_std and path[-3:] == (*ROUTER, 'w'):
      new = self.copies.router_std * jax.random.normal(key, new.shape)
    if pieces == [Piece(path)]:
      return source[path].astype(new.dtype)
    pieces = [
      self._piece(piece, period, source, new, axes[1:], key)
      for period, piece in enumerate(pieces)
    ]
    return jnp.stack(pieces).astype(new.dtype)

  def _piece(self, piece, period, source, new, axes, key) -> Array:
    if piece.path is None:
      return new[period]
    value = source[piece.path][piece.period]
    if piece.stacked:
      experts = (0,) * new.shape[1]
      value = jnp.broadcast_to(value[None], new.shape[1:])
    elif (axis := expert_axis(axes)) is not None:
      experts = self.experts
      if experts != tuple(range(value.shape[axis])):
        value = jnp.take(value, jnp.array(experts), axis)
    else:
      return value
    is_router = axes[expert_axis(axes)] == 'expert_choice'
    noise = self.copies.router_noise if is_router else self.copies.expert_noise
    key = jax.random.fold_in(key, period)
    return _noisy(value, experts, expert_axis(axes), noise, key)


def sources_of(num_experts: int, source_experts: int) -> tuple[int, ...]:
  """The source of each of E experts: those there are, in order, again."""
  return tuple(i % source_experts for i in range(num_experts))


def _noisy(
  value: Array, experts: Sequence[int], axis: int, noise: float, key: PRNGKey
) -> Array:
  """Noise on every copy but the first of each expert."""
  first = collections.Counter()
  copy = [first.update([e]) or first[e] > 1 for e in experts]
  if not noise or not any(copy):
    return value
  std = noise * jnp.sqrt(jnp.mean(jnp.square(value.astype(jnp.float32))))
  shape = [1] * value.ndim
  shape[axis] = len(copy)
  draw = std * jax.random.normal(key, value.shape)
  return value + jnp.array(copy).reshape(shape) * draw


def expert_axis(axes: Sequence[str | None]) -> int | None:
  """The dimension that numbers experts, if there is one."""
  return next((i for i, name in enumerate(axes) if name in EXPERT_AXES), None)


def flat(tree) -> dict[Path, Any]:
  """The leaves by path."""
  return traverse_util.flatten_dict(tree)
