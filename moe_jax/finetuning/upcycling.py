"""Makes a model's parameters from another's: sparse from dense, more experts.

In sparse upcycling (https://arxiv.org/abs/2212.05055) each expert begins as a
copy of the dense feed-forward of its layer; the router is new, and all else is
copied. Experts of a sparse model are copied by their index, with their columns
of the router's kernel.

With room for every token and without noise, the new model computes

- from a dense model: the same function, if gates sum to one
  (`gates='renormalized'`, K >= 2; also at K = 1, but then no gradient reaches
  the router). Raw gates shrink what a layer adds;
- with n times the experts: the same function, if K is n times as large, too.
  With the same K a token is served by copies of fewer experts, and a copy has
  1/n of the raw gate of its expert;
- with fewer experts: another function.
"""

import collections
import dataclasses
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax import models
from moe_jax.config import option
from moe_jax.layers.parameters import Role, axes_of, roles_of
from moe_jax.models import Model
from moe_jax.models.description import Path
from moe_jax.models.trees import flatten, unflatten
from moe_jax.shapes import Array, PRNGKey
from moe_jax.training.run_options import InitFromOptions

# The logical names of dimensions that are indexed by expert: in the parameters
# of the experts, and in those of routers.
EXPERT_AXES = ('expert', 'expert_choice')


@dataclasses.dataclass(frozen=True)
class InitFrom(InitFromOptions):
  """The run whose parameters this run begins with, and how they are taken."""

  keep_optimizer: bool = option(
    False,
    "Whether the optimizer goes on with the other run's moments and their "
    'counts, where all parameters are copied and its optimizer is the same; '
    'the schedule of the learning rate begins anew. Otherwise the optimizer is '
    'new.',
  )
  experts: str = option(
    '',
    "Numbers of the other run's experts that this run's experts are copies of, "
    "separated by commas: '0,1,0,1'; an empty string takes them in turn.",
  )
  router_std: float = option(
    0.0,
    'Standard deviation of the kernels of routers that the other run does not '
    'have (0.02 in sparse upcycling); 0 draws them as the model does.',
    minimum=0,
  )
  expert_noise: float = option(
    0.0,
    'Standard deviation of the noise that is added to all copies of an expert '
    "except the first, as a fraction of a kernel's root mean square; 0 adds "
    'none.',
    minimum=0,
  )
  router_noise: float = option(
    0.0,
    "Standard deviation of the noise that is added to the router's columns for "
    'all copies of an expert except the first, as a fraction of the '
    "router's root mean square; with 0 the copies tie, and the expert of the "
    'lowest index is chosen.',
    minimum=0,
  )

  def problems(self) -> Iterator[str]:
    """A text if `experts` is not a list of indices."""
    yield from super().problems()
    numbers = [part.strip() for part in self.experts.split(',')]
    if self.experts and not all(number.isdigit() for number in numbers):
      yield f"experts={self.experts!r} is no list of numbers, '0,1,0,1'"

  @property
  def sources(self) -> tuple[int, ...]:
    """The indices in `experts`; () takes the other run's experts in turn."""
    return tuple(map(int, self.experts.split(','))) if self.experts else ()


class Piece(NamedTuple):
  """The array, or its part, from which a layer's parameter is made.

  Attributes:
    path: The path of the source's array; None where the parameter is new.
    period: The index of the layer among the layers that the array stacks; None
      is the whole array.
    stacked: Whether every expert gets a copy of the piece.
  """

  path: Path | None
  period: int | None = None
  stacked: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
  """A plan by which a model's parameters are made from another's.

  Attributes:
    model: The new model.
    pieces: The pieces of each parameter, one for each layer that it stacks.
    experts: The index of the source's expert that each expert is a copy of, in
      layers that were sparse.
    num_source_experts: The number of experts in the source; 0 if it is dense.
    copies: Options of how experts are copied and routers begin.
    upcycled: Indices of the layers that were dense and become sparse, an
      encoder's first.
    drawn: Indices of the layers that were sparse and whose feed-forwards are
      new, since no experts are copied.
  """

  model: Model
  pieces: dict[Path, list[Piece]]
  experts: tuple[int, ...]
  num_source_experts: int
  copies: InitFrom
  upcycled: tuple[int, ...]
  drawn: tuple[int, ...] = ()

  @property
  def copies_all(self) -> bool:
    """Whether every array is the source's array unchanged but for its dtype."""
    return all(
      [piece.path for piece in pieces] == [path] * len(pieces)
      and [piece.period for piece in pieces] in ([None], [*range(len(pieces))])
      for path, pieces in self.pieces.items()
    ) and self.experts == tuple(range(self.num_source_experts))

  def describe(self) -> str:
    """A line on how the parameters are made."""
    c, phrases = self.copies, []
    if self.upcycled:
      E = self.model.stacks.mixtures[-1].num_experts
      drawn = f' with std {c.router_std:g}' if c.router_std else ''
      phrases.append(
        f'layers {list(self.upcycled)} made sparse, {E} copies of each dense '
        f'feed-forward, routers drawn{drawn}'
      )
    if self.experts != tuple(range(self.num_source_experts)):
      phrases.append(
        f'{self.num_source_experts} experts made {len(self.experts)}, copies '
        f'of {list(self.experts)}'
      )
    if self.drawn:
      phrases.append(f'feed-forwards of layers {list(self.drawn)} drawn anew')
    for name in ('expert_noise', 'router_noise'):
      if getattr(c, name):
        phrases.append(f'{name} {getattr(c, name):g}')
    return '; '.join([*phrases, 'the rest copied' if phrases else 'all copied'])

  def apply(self, params: Mapping[str, Any], key: PRNGKey) -> dict[str, Any]:
    """The new model's parameters; a pure function, to be jitted.

    Args:
      params: The source's parameters, unboxed.
      key: The key from which the run would draw all its parameters; parameters
        that are not copied are drawn from it in the same way.
    """
    boxed = models.init_params(self.model, key)
    axes, roles = flatten(axes_of(boxed)), flatten(roles_of(boxed))
    source, new = flatten(params), flatten(nn.meta.unbox(boxed))
    arrays = {
      path: self._make(path, source, new[path], axes[path], roles[path], key)
      for path in new
    }
    return unflatten(arrays)

  def _make(self, path, source, new, axes, role, key) -> Array:
    key = jax.random.fold_in(key, zlib.crc32('/'.join(path).encode()))
    pieces = self.pieces[path]
    if self.copies.router_std and role == Role('router', 'kernel'):
      new = self.copies.router_std * jax.random.normal(key, new.shape)
    if pieces == [Piece(path)]:
      return source[path].astype(new.dtype)
    # A parameter that is new may be in no stack of layers.
    if self.model.stacks.place_of(path) is None:
      return new
    pieces = [
      self._piece(piece, period, source, new, axes[1:], role, key)
      for period, piece in enumerate(pieces)
    ]
    return jnp.stack(pieces).astype(new.dtype)

  def _piece(self, piece, period, source, new, axes, role, key) -> Array:
    if piece.path is None:
      return new[period]
    array = source[piece.path][piece.period]
    if (axis := expert_axis(axes)) is None:
      return array
    if piece.stacked:
      experts = (0,) * new.shape[1]
      array = jnp.broadcast_to(array[None], new.shape[1:])
    else:
      experts = self.experts
      if experts and experts != tuple(range(array.shape[axis])):
        array = jnp.take(array, jnp.array(experts), axis)
    is_router = role.role == 'router'
    noise = self.copies.router_noise if is_router else self.copies.expert_noise
    key = jax.random.fold_in(key, period)
    return _noisy(array, experts, axis, noise, key)


def sources_of(num_experts: int, source_experts: int) -> tuple[int, ...]:
  """The source's expert that each expert copies: 0, 1, ..., then 0 again."""
  return tuple(i % source_experts for i in range(num_experts))


def _noisy(
  array: Array, experts: Sequence[int], axis: int, noise: float, key: PRNGKey
) -> Array:
  """The array with noise on all copies of an expert except the first."""
  counts = collections.Counter()
  is_later_copy = [counts.update([e]) or counts[e] > 1 for e in experts]
  if not noise or not any(is_later_copy):
    return array
  std = noise * jnp.sqrt(jnp.mean(jnp.square(array.astype(jnp.float32))))
  shape = [1] * array.ndim
  shape[axis] = len(is_later_copy)
  drawn_noise = std * jax.random.normal(key, array.shape)
  return array + jnp.array(is_later_copy).reshape(shape) * drawn_noise


def expert_axis(axes: Sequence[str | None]) -> int | None:
  """The index of the dimension that is indexed by expert; None without one."""
  return next((i for i, name in enumerate(axes) if name in EXPERT_AXES), None)
