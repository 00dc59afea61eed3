"""Matching of a model's parameters with another model's parameters."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from moe_jax import models
from moe_jax.errors import InputError
from moe_jax.finetuning import upcycling
from moe_jax.finetuning.upcycling import InitFrom, Piece, Plan
from moe_jax.layers.parameters import Names, Role
from moe_jax.models import Model
from moe_jax.models.description import LayerPlace, Path
from moe_jax.models.trees import flatten

_SPARSE = ('expert', 'router', 'shared_expert')


class _Parameter(NamedTuple):
  """Description of a parameter.

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
    source: The other model.
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
      # A layer between LSTMs is in no stack and has no index.
      is_new = number in (None, *drawn) and role.role in ('ffn', *_SPARSE)
      if piece.path is None and is_new and drawn:
        continue
      listed = sizes if piece.path else problems
      listed += _problem(path, piece, parameter, old, len(numbers))
  problems += [f'{_name(p)}: not in this model' for p in old if p not in used]
  # If the numbers of layers differ, the parameters of layers that one model
  # lacks are not listed.
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

  The piece is the old parameter of the same name. For an expert in a layer that
  was dense, it is the dense feed-forward's parameter whose name has the same
  last part. Otherwise there is no piece, and the parameter is new.
  """
  # The key is (stack, layer, name of the parameter within a layer).
  pieces: dict[tuple, Piece] = {}
  # Dense feed-forwards alone, by keys with only the last part of the name.
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
  """A list of the reason why a parameter cannot be made from its piece."""
  if piece.path is None:
    is_new = parameter.role.role == 'router'
    return [] if is_new else [f'{_name(path)}: not in the other model']
  old, new = list(old_parameters[piece.path].shape), list(parameter.shape)
  axes = parameter.axes
  if piece.period is not None:
    old, new, axes = old[1:], new[1:], axes[1:]
    axis = upcycling.expert_axis(axes)
    if piece.stacked and axis is not None:
      del new[axis]
    elif axis is not None and num_experts:
      old[axis] = num_experts
  if old != new:
    return [f'{_name(path)}: {old} there, {new} here']
  return []


def _experts(model: Model, source: Model, copies: InitFrom) -> tuple[int, ...]:
  """The index of the source's expert that each new expert is a copy of.

  It is () unless both models have experts and each model has equally many in
  all its sparse layers. With () experts are copied to equal indices, if at all.
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
  experts = copies.sources or upcycling.sources_of(num_new, num_old)
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
  """The description of every parameter, by its path."""
  shapes, axes, roles = map(flatten, models.describe(model))
  return {
    path: _Parameter(leaf.shape, axes[path], roles[path])
    for path, leaf in shapes.items()
  }


def _name(path: Path) -> str:
  return '/'.join(path)
