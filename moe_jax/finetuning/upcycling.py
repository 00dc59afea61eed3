"""One model's parameters as another's: sparse from dense, or more experts.

Sparse upcycling (https://arxiv.org/abs/2212.05055): each expert begins as a
copy of the dense feed-forward in its place, the router is new, all else is
copied. Experts of a sparse model are copied by number, with their columns of
the router.

What is kept of the function, where there is room for every token and no noise:

- From a dense model: all of it if gates sum to one (`gates='renormalized'`,
  K >= 2; at K = 1 too, but then no gradient reaches the router). Raw gates
  shrink what a layer adds.
- With n times the experts: all of it if K is n times as large too. With K as it
  was a token meets copies of fewer experts, each at 1/n of its raw gate.
- With fewer experts: nothing is promised.

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
from moe_jax.layers.parameters import Role, axes_of, roles_of
from moe_jax.models import Model
from moe_jax.shapes import Array, PRNGKey

Path = tuple[str, ...]
# The logical names of the dimensions that number experts: of the experts' own
# parameters, and of what a router chooses among.
EXPERT_AXES = ('expert', 'expert_choice')


@dataclasses.dataclass(frozen=True)
class Copies:
  """How copies of experts come to differ.

  Attributes:
    experts: The source of each expert; () is `sources_of` their numbers.
    router_std: Standard deviation of the kernels of routers that are new (0.02
      in sparse upcycling); with 0.0 they are as the model draws them.
    expert_noise: Standard deviation of the normal noise on each copy of an
      expert but the first, as a fraction of the kernel's root mean square.
    router_noise: The same for the columns of the router that belong to copies
      of an expert. Without noise they tie, and the expert of the lower number
      is chosen.
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
    path: The path of the source's array; None where the parameter is new.
    period: The index of the layer in that array; None is the array as a whole.
    stacked: Whether it becomes one copy for each expert.
  """

  path: Path | None
  period: int | None = None
  stacked: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
  """How a model's parameters are made of another's.

  Attributes:
    model: The model that begins.
    pieces: The sources of each parameter, one for each period of its layers.
    experts: The source of each expert of layers that were sparse.
    num_source_experts: The number of experts in the source; 0 where it is
      dense.
    copies: How copies of experts come to differ.
    upcycled: The numbers of the layers that were dense, the encoder's first.
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
      E = self.model.moe.num_experts
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
      params: The source's parameters, unboxed.
      key: The key that the run draws its own parameters from; new ones are the
        same.
      seq_len: The length of the run's rows.
    """
    boxed = models.init_params(self.model, key, seq_len)
    axes, roles = flat(axes_of(boxed)), flat(roles_of(boxed))
    source, new = flat(params), flat(nn.meta.unbox(boxed))
    made = {
      path: self._make(path, source, new[path], axes[path], roles[path], key)
      for path in new
    }
    return traverse_util.unflatten_dict(made)

  def _make(self, path, source, new, axes, role, key) -> Array:
    key = jax.random.fold_in(key, zlib.crc32('/'.join(path).encode()))
    pieces = self.pieces[path]
    if self.copies.router_std and role == Role('router', 'kernel'):
      new = self.copies.router_std * jax.random.normal(key, new.shape)
    if pieces == [Piece(path)]:
      return source[path].astype(new.dtype)
    pieces = [
      self._piece(piece, period, source, new, axes[1:], role, key)
      for period, piece in enumerate(pieces)
    ]
    return jnp.stack(pieces).astype(new.dtype)

  def _piece(self, piece, period, source, new, axes, role, key) -> Array:
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
    is_router = role.role == 'router'
    noise = self.copies.router_noise if is_router else self.copies.expert_noise
    key = jax.random.fold_in(key, period)
    return _noisy(value, experts, expert_axis(axes), noise, key)


def sources_of(num_experts: int, source_experts: int) -> tuple[int, ...]:
  """The source of each of E experts: those of the source, in turn."""
  return tuple(i % source_experts for i in range(num_experts))


def _noisy(
  value: Array, experts: Sequence[int], axis: int, noise: float, key: PRNGKey
) -> Array:
  """The value with noise on every copy but the first of each expert."""
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
  """The leaves of a tree by path."""
  return traverse_util.flatten_dict(tree)
