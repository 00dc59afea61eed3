"""Matching of a model's parameters with those of another model.

Not here: how the arrays are made (`upcycling.py`).
"""

from collections.abc import Mapping
from typing import NamedTuple

from moe_jax import models
from moe_jax.finetuning.upcycling import (
  Copies,
  Path,
  Piece,
  Plan,
  expert_axis,
  flat,
  sources_of,
)
from moe_jax.layers.parameters import Names, Role
from moe_jax.models import Model
from moe_jax.models.layer_trees import LayerPlace, numbers_of

_SPARSE = ('expert', 'router', 'shared_expert')


class _Described(NamedTuple):
  """Description of a parameter.

  Attributes:
    shape: The shape of the array.
    axes: The logical names of its dimensions.
    role: The part of the model to which it belongs, and its form.
  """

  shape: tuple[int, ...]
  axes: Names
  role: Role


def plan(
  model: Model,
  source: Model,
  copies: Copies = Copies(),
  *,
  experts: bool = True,
) -> Plan:
  """The plan by which parameters of `source` become those of `model`.

  Args:
    model: The new model.
    source: The other model.
    copies: How experts are copied.
    experts: Whether experts and routers are copied; otherwise the feed-forward
      of a layer that is sparse in `source` is new, dense or sparse.

  Raises:
    ValueError: The models do not fit; there is a line for each difference:
      another number of layers, layers that were sparse and would be dense,
      other widths, parameters that only one model has, or `copies.experts` that
      do not fit.
  """
  have, wanted = _described(source), _described(model)
  if not experts:
    have = {p: x for p, x in have.items() if x.role.role not in _SPARSE}
  layers = _Layers(source, have)
  numbers = _experts(model, source, copies) if experts else ()
  drawn = () if experts else source.sparse_layers
  pieces, sizes, problems, used = {}, [], [], set()
  for path, one in wanted.items():
    sources, numbered = [Piece(path if path in have else None)], [None]
    if (place := model.place_of(path)) is not None:
      sources = [layers.find(n, place, one.role) for n in place.layers]
      numbered = numbers_of(model.stacks, place)
    pieces[path] = sources
    for piece, number in zip(sources, numbered, strict=True):
      used.add(piece.path)
      # A layer between LSTMs is in no stack and has no number.
      new = number in (None, *drawn) and one.role.role in ('ffn', *_SPARSE)
      if piece.path is None and new and drawn:
        continue
      found = sizes if piece.path else problems
      found += _problem(path, piece, one, have, len(numbers))
  problems += [f'{_name(p)}: not in this model' for p in have if p not in used]
  # Parameters of layers that one model lacks say no more than their number.
  problems = [*sizes, *(_lengths(model, source) or problems)]
  if problems:
    said = ['the models do not fit:', *dict.fromkeys(problems)]
    raise ValueError('\n'.join(said))
  return Plan(
    model=model,
    pieces=pieces,
    experts=numbers,
    num_source_experts=_num_experts(source) if numbers else 0,
    copies=copies,
    upcycled=tuple(
      layer
      for layer in model.sparse_layers
      if layer not in source.sparse_layers
    ),
    drawn=drawn,
  )


class _Layers:
  """The pieces of arrays that hold the parameters of a model's layers."""

  def __init__(self, model: Model, have: Mapping[Path, _Described]):
    # The key is (stack, layer, name of the parameter within a layer).
    self._pieces: dict[tuple, Piece] = {}
    # Dense feed-forwards alone, by keys with only the last part of the name.
    self._dense: dict[tuple, list[Piece]] = {}
    for path, one in have.items():
      if (place := model.place_of(path)) is None:
        continue
      for period, layer in enumerate(place.layers):
        piece = Piece(path, period)
        self._pieces[place.stack, layer, place.name] = piece
        if one.role.role == 'ffn':
          key = place.stack, layer, place.name[-1]
          self._dense.setdefault(key, []).append(piece)

  def find(self, layer: int, place: LayerPlace, role: Role) -> Piece:
    """The piece from which a layer's parameter is made.

    It is the parameter of the same name; for an expert in a layer that was
    dense, the dense feed-forward's parameter whose name has the same last part;
    otherwise none, and the parameter is new.
    """
    same = self._pieces.get((place.stack, layer, place.name))
    if same is not None:
      return same
    dense = self._dense.get((place.stack, layer, place.name[-1]), [])
    if role.role == 'expert' and len(dense) == 1:
      return dense[0]._replace(stacked=True)
    return Piece(None)


def _problem(
  path: Path,
  piece: Piece,
  wanted: _Described,
  have: Mapping[Path, _Described],
  num_experts: int,
) -> list[str]:
  """The reason why a parameter cannot be made from its piece, if any."""
  if piece.path is None:
    is_new = wanted.role.role == 'router'
    return [] if is_new else [f'{_name(path)}: not in the other model']
  old, new = list(have[piece.path].shape), list(wanted.shape)
  axes = wanted.axes
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


def _experts(model: Model, source: Model, copies: Copies) -> tuple[int, ...]:
  """The number of each expert's source.

  It is () where every expert is its own source, or there is none: unless both
  models have experts, in equal numbers in all of a model's sparse layers.
  """
  theirs, ours = _num_experts(source), _num_experts(model)
  equal = equal_experts(model) and equal_experts(source)
  if not theirs or not ours or not equal:
    if theirs and ours and not equal:
      _check_columns(model, source)
    if copies.experts and not equal:
      raise ValueError(
        f'init_from.experts={copies.experts}: one of the models has layers '
        'with other numbers of experts than others, or than columns'
      )
    if copies.experts:
      raise ValueError(
        f'init_from.experts={copies.experts} with {theirs} experts there and '
        f'{ours} here; it is for two sparse models'
      )
    return ()
  experts = copies.experts or sources_of(ours, theirs)
  if len(experts) != ours or not all(0 <= e < theirs for e in experts):
    raise ValueError(
      f'init_from.experts={experts} are not {ours} numbers in [0, {theirs})'
    )
  return experts


def _check_columns(model: Model, source: Model) -> None:
  """Raises ValueError where columns of routers lead to other experts."""
  for (_, new), (_, old) in zip(model.stacks, source.stacks):
    if not (new.experts and old.experts):
      continue
    there, here = old.experts.retained, new.experts.retained
    if there.rows != here.rows or there.counts != here.counts:
      raise ValueError(
        f'moe.retained is {there} there and {here} here: give both the same, '
        'as experts are copied by number where layers have lost some'
      )


def equal_experts(model: Model) -> bool:
  """Whether all sparse layers have E experts and a router column for each."""
  sizes = [moe.sizes for moe in model.moes if moe is not None]
  counts = {n for own in sizes for n in (own.num_experts, own.num_retained)}
  return len(counts) <= 1


def _num_experts(model: Model) -> int:
  return 0 if model.moe is None else model.moe.num_experts


def _lengths(model: Model, source: Model) -> list[str]:
  """Lines on stacks whose numbers of layers differ between two models."""
  theirs, ours = (
    {path: len(stack.sparse) for path, stack in m.stacks}
    for m in (source, model)
  )
  if theirs.keys() != ours.keys():
    return ['one of the two is an encoder-decoder']
  return [
    f'{"/".join(path) or "layers"}: {theirs[path]} layers there, '
    f'{ours[path]} here'
    for path in ours
    if theirs[path] != ours[path]
  ]


def _described(model: Model) -> dict[Path, _Described]:
  """The description of every parameter, by its path."""
  shapes, axes, roles = map(flat, models.describe(model))
  return {
    path: _Described(leaf.shape, axes[path], roles[path])
    for path, leaf in shapes.items()
  }


def _name(path: Path) -> str:
  return '/'.join(path)
