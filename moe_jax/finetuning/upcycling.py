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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax import models
from moe_jax.config import option
from moe_jax.errors import InputError
from moe_jax.layers.parameters import Names, Role, axes_of, roles_of
from moe_jax.models import Model
from moe_jax.models.description import LayerPlace, Path
from moe_jax.models.trees import flatten, unflatten
from moe_jax.shapes import Array, PRNGKey
from moe_jax.training.run_options import InitFromOptions

# The logical names of dimensions that are indexed by expert: in the parameters
# of the experts, and in those of routers.
EXPERT_AXES = ('expert', 'expert_choice')
# The roles of the parameters that sparse layers alone have.
_SPARSE = ('expert', 'router', 'shared_expert')


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
    yield from super().problems()
    numbers = [part.strip() for part in self.experts.split(',')]
    if self.experts and not all(number.isdigit() for number in numbers):
      yield f"experts={self.experts!r} is no list of numbers, '0,1,0,1'"

  @property
  def sources(self) -> tuple[int, ...]:
    """The indices in `experts`; () takes the experts of `workdir` in turn."""
    return tuple(map(int, self.experts.split(','))) if self.experts else ()


class Piece(NamedTuple):
  """The array, or its part, from which a layer's parameter is made.

  Attributes:
    path: The path of the source model's array; None where the parameter is new.
    period: The index of the layer among the layers that the array stacks; None
      is the whole array, which stacks no layers.
    stacked: Whether every expert gets a copy of the piece.
  """

  path: Path | None
  period: int | None = None
  stacked: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
  """A plan by which a model's parameters are made from those of a source model.

  Attributes:
    model: The new model.
    pieces: The pieces of each parameter by its path: one for each layer that it
      stacks, in order, or a single one where it stacks none.
    experts: The index of the source's expert that each expert is a copy of, in
      layers that were sparse; () if experts, where any are copied, keep their
      indices.
    num_source_experts: The number of the source's experts; 0 where `experts`
      is ().
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
    """A line of text on how the new model's parameters are made."""
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
  """The index of the source's expert that each of `num_experts` experts copies.

  Experts are copied in turn: 0, 1, ..., `source_experts` - 1, and then 0 again.
  """
  return tuple(i % source_experts for i in range(num_experts))


def _noisy(
  array: Array, experts: Sequence[int], axis: int, noise: float, key: PRNGKey
) -> Array:
  """The array with noise on all copies of an expert except the first.

  The noise has a standard deviation of `noise` times the array's root mean
  square; `experts` are the numbers of the copied experts, along `axis`.
  """
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
  """The index of the dimension that counts experts; None if there is none.

  `axes` are the logical names of the dimensions.
  """
  return next((i for i, name in enumerate(axes) if name in EXPERT_AXES), None)


class _Parameter(NamedTuple):
  """The shape, the axes and the role of a parameter.

  Attributes:
    shape: The shape of the array.
    axes: The logical names of its dimensions.
    role: The part of the model that the parameter belongs to, and its use.
  """

  shape: tuple[int, ...]
  axes: Names
  role: Role


def plan(
  model: Model,
  source: Model,
  copies: InitFrom = InitFrom(),
  *,
  experts: bool = True,
) -> Plan:
  """The plan by which the parameters of `model` are made from `source`'s.

  Args:
    model: The new model.
    source: The model whose parameters are copied.
    copies: The options of how experts are copied.
    experts: Whether experts and routers are copied; otherwise the feed-forward
      of a layer that is sparse in `source` is new, whether dense or sparse.

  Raises:
    ValueError: The models do not fit; there is a line for each difference:
      another number of layers, layers that were sparse and would be dense,
      other widths, parameters that only one model has, or `copies.experts` that
      do not fit.
  """
  old, new = _parameters(source), _parameters(model)
  if not experts:
    old = {p: x for p, x in old.items() if x.role.role not in _SPARSE}
  find = _finder(source, old)
  numbers = _experts(model, source, copies) if experts else ()
  drawn = () if experts else source.stacks.sparse_layers
  sparse = {*model.stacks.sparse_layers}
  pieces, sizes, problems, used = {}, [], [], set()
  for path, parameter in new.items():
    role = parameter.role
    sources, numbered = [Piece(path if path in old else None)], [None]
    if (place := model.stacks.place_of(path)) is not None:
      sources = [find(n, place, role) for n in place.layers]
      numbered = place.numbers
    pieces[path] = sources
    for piece, number in zip(sources, numbered, strict=True):
      used.add(piece.path)
      # The arrays of the sparse layer between the LSTMs of an LSTM model stack
      # no layers: its number is None here, and its arrays may be new, too.
      is_new = number in (None, *drawn) and role.role in ('ffn', *_SPARSE)
      if piece.path is None and is_new and drawn:
        continue
      listed = sizes if piece.path else problems
      listed += _problem(path, piece, parameter, old, len(numbers))
  problems += [f'{_name(p)}: not in this model' for p in old if p not in used]
  # If the numbers of layers differ, lines say so in place of a line for each
  # parameter that one model lacks.
  problems = [*sizes, *(_lengths(model, source) or problems)]
  if problems:
    lines = ['the models do not fit:', *dict.fromkeys(problems)]
    raise InputError('\n'.join(lines))
  return Plan(
    model=model,
    pieces=pieces,
    experts=numbers,
    num_source_experts=_num_experts(source) if numbers else 0,
    copies=copies,
    upcycled=tuple(sorted(sparse - {*source.stacks.sparse_layers})),
    drawn=drawn,
  )


def _finder(
  model: Model, parameters: Mapping[Path, _Parameter]
) -> Callable[[int, LayerPlace, Role], Piece]:
  """The function that finds the piece a layer's new parameter is made from.

  The piece is the source model's parameter of the same name. For an expert in a
  layer that was dense, the piece is the dense feed-forward's parameter whose
  name has the same last part. Otherwise the parameter is new.

  Args:
    model: The source model.
    parameters: Those of its parameters that may be copied, by path.

  Returns:
    The function from the index of a layer in its stack, the place of the new
    stacked parameter and its role to the piece.
  """
  # The key is (stack, layer, name of the parameter within a layer).
  pieces: dict[tuple, Piece] = {}
  # The pieces of dense feed-forwards alone; the key is (stack, layer, last part
  # of the parameter's name).
  ffns: dict[tuple, list[Piece]] = {}
  for path, parameter in parameters.items():
    if (place := model.stacks.place_of(path)) is None:
      continue
    for period, layer in enumerate(place.layers):
      piece = pieces[place.stack, layer, place.name] = Piece(path, period)
      if parameter.role.role == 'ffn':
        key = place.stack, layer, place.name[-1]
        ffns.setdefault(key, []).append(piece)

  def find(layer: int, place: LayerPlace, role: Role) -> Piece:
    dense = ffns.get((place.stack, layer, place.name[-1]), [])
    new = Piece(None)
    if role.role == 'expert' and len(dense) == 1:
      new = dense[0]._replace(stacked=True)
    return pieces.get((place.stack, layer, place.name), new)

  return find


def _problem(
  path: Path,
  piece: Piece,
  parameter: _Parameter,
  old_parameters: Mapping[Path, _Parameter],
  num_experts: int,
) -> list[str]:
  """The reason why a parameter cannot be made from its piece; [] if it can.

  Args:
    path: The path of the new parameter.
    piece: The piece of one of its layers.
    parameter: The description of the new parameter.
    old_parameters: The descriptions of the source's parameters, by path.
    num_experts: The number of experts that are copied by a list of indices; 0
      if there is no list, so that both need equally many.
  """
  if piece.path is None:
    is_new = parameter.role.role == 'router'
    return [] if is_new else [f'{_name(path)}: not in the other model']
  old, new = list(old_parameters[piece.path].shape), list(parameter.shape)
  axes = parameter.axes
  if piece.period is not None:
    old, new, axes = old[1:], new[1:], axes[1:]
    axis = expert_axis(axes)
    if piece.stacked and axis is not None:
      del new[axis]
    elif axis is not None and num_experts:
      old[axis] = num_experts
  if old != new:
    return [f'{_name(path)}: {old} there, {new} here']
  return []


def _experts(model: Model, source: Model, copies: InitFrom) -> tuple[int, ...]:
  """The index of the source's expert that each new expert is a copy of.

  The result is () unless both models have experts and each model has equally
  many in all its sparse layers. () means that experts, if both models have
  them, are copied to equal indices. ValueError is raised if `copies.experts` do
  not fit, or if the models differ in which experts are merged or pruned.
  """
  num_old, num_new = _num_experts(source), _num_experts(model)
  are_equal = equal_experts(model) and equal_experts(source)
  if not num_old or not num_new or not are_equal:
    if copies.sources:
      raise InputError(
        f'init_from.experts={copies.sources} with {num_old} experts there and '
        f'{num_new} here; it is for two sparse models, each with equally many '
        'experts and router columns in all of its layers'
      )
    if num_old and num_new:
      _check_columns(model, source)
    return ()
  experts = copies.sources or sources_of(num_new, num_old)
  if len(experts) != num_new or not all(0 <= e < num_old for e in experts):
    raise InputError(
      f'init_from.experts={experts} are not {num_new} numbers in [0, {num_old})'
    )
  return experts


def _check_columns(model: Model, source: Model) -> None:
  """Raises ValueError if the models' merged or pruned experts differ."""
  for new_stack, old_stack in zip(model.stacks.blocks, source.stacks.blocks):
    if not (new_stack.experts and old_stack.experts):
      continue
    old, new = old_stack.experts.retained, new_stack.experts.retained
    if old.rows != new.rows or old.counts != new.counts:
      raise InputError(
        f'moe.retained is {old} there and {new} here: give both the same, '
        'as experts are copied by number where layers have lost some'
      )


def equal_experts(model: Model) -> bool:
  """Whether all sparse layers have E experts and a router column for each."""
  moes = model.stacks.mixtures
  counts = {n for moe in moes for n in (moe.num_experts, moe.num_retained)}
  return len(counts) <= 1


def _num_experts(model: Model) -> int:
  moe = model.stacks.moe
  return 0 if moe is None else moe.num_experts


def _lengths(model: Model, source: Model) -> list[str]:
  """Lines on stacks whose numbers of layers differ between two models."""
  old, new = (
    {stack.path: len(stack.layers) for stack in m.stacks}
    for m in (source, model)
  )
  if old.keys() != new.keys():
    return ['one of the two is an encoder-decoder']
  return [
    f'{"/".join(path) or "layers"}: {old[path]} layers there, {new[path]} here'
    for path in new
    if old[path] != new[path]
  ]


def _parameters(model: Model) -> dict[Path, _Parameter]:
  """The shape, axes and role of every parameter, by its path."""
  shapes, axes, roles = map(flatten, models.describe(model))
  return {
    path: _Parameter(leaf.shape, axes[path], roles[path])
    for path, leaf in shapes.items()
  }


def _name(path: Path) -> str:
  return '/'.join(path)
