"""Which parameter of a model is made of which of another's.

Not here: how (`upcycling.py`).
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
from moe_jax.models.layer_trees import LayerPlace


class _Described(NamedTuple):
  """A parameter before there is any.

  Attributes:
    shape: The shape of the array.
    axes: The logical names of its dimensions.
    role: The part of the model that it belongs to, and its form.
  """

  shape: tuple[int, ...]
  axes: Names
  role: Role


def plan(model: Model, source: Model, copies: Copies) -> Plan:
  """Which parameters of `source` become which of `model`.

  Raises:
    ValueError: All that has no meaning, a line each: another number of layers,
      layers that were sparse and would be dense, other widths, parameters that
      one of the two has not, or `copies.experts` that do not fit.
  """
  have, wanted = _described(source), _described(model)
  layers = _Layers(source, have)
  experts = _experts(model, source, copies)
  pieces, problems, used = {}, [], set()
  for path, one in wanted.items():
    sources = [Piece(path if path in have else None)]
    if (place := model.place_of(path)) is not None:
      sources = [layers.find(n, place, one.role) for n in place.layers]
    pieces[path] = sources
    for piece in sources:
      used.add(piece.path)
      problem = _problem(path, piece, one, have, len(experts))
      problems += [problem] if problem else []
  problems += [f'{_name(p)}: not in this model' for p in have if p not in used]
  problems = _lengths(model, source) or list(dict.fromkeys(problems))
  if problems:
    raise ValueError('\n'.join(['the models do not fit:', *problems]))
  return Plan(
    model=model,
    pieces=pieces,
    experts=experts,
    num_source_experts=_num_experts(source) if experts else 0,
    copies=copies,
    upcycled=tuple(
      layer
      for layer in model.sparse_layers
      if layer not in source.sparse_layers
    ),
  )


class _Layers:
  """Where a model keeps the parameters of each of its layers."""

  def __init__(self, model: Model, have: Mapping[Path, _Described]):
    # The key is (stack, layer, name of the parameter within a layer).
    self._pieces: dict[tuple, Piece] = {}
    # The key has only the last part of the name; feed-forwards alone.
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
    """The piece of a layer's parameter: the same, or the dense layer's.

    A parameter of an expert is made of that of the dense feed-forward which has
    the same name within its module; without a source the parameter is new.
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
) -> str | None:
  """What keeps a parameter from being made of its piece."""
  if piece.path is None:
    is_new = wanted.role.role == 'router'
    return None if is_new else f'{_name(path)}: not in the other model'
  old, new = list(have[piece.path].shape), list(wanted.shape)
  axes = wanted.axes
  if piece.period is not None:
    old, new, axes = old[1:], new[1:], axes[1:]
    axis = expert_axis(axes)
    if piece.stacked:
      del new[axis]
    elif axis is not None:
      old[axis] = num_experts
  if old != new:
    return f'{_name(path)}: {old} there, {new} here'
  return None


def _experts(model: Model, source: Model, copies: Copies) -> tuple[int, ...]:
  """The source of each expert; () where the other model has none."""
  theirs, ours = _num_experts(source), _num_experts(model)
  if not theirs or not ours:
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


def _num_experts(model: Model) -> int:
  return 0 if model.moe is None else model.moe.num_experts


def _lengths(model: Model, source: Model) -> list[str]:
  """What makes a comparison parameter by parameter meaningless."""
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
  """Every parameter by its path."""
  shapes, axes, roles = map(flat, models.describe(model))
  return {
    path: _Described(leaf.shape, axes[path], roles[path])
    for path, leaf in shapes.items()
  }


def _name(path: Path) -> str:
  return '/'.join(path)
