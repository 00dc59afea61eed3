"""Which parameter of a model is made of which of another's.

Not here: how (`upcycling.py`).
"""

from collections.abc import Mapping
from typing import NamedTuple

from flax import linen as nn

from moe_jax import models
from moe_jax.finetuning.upcycling import (
  ROUTER,
  Copies,
  Path,
  Piece,
  Plan,
  expert_axis,
  flat,
  sources_of,
)
from moe_jax.layers.initializers import axis_names
from moe_jax.models import Model
from moe_jax.models.pattern import segments

EXPERTS, DENSE = ('moe', 'experts'), ('ffn',)


def plan(model: Model, source: Model, copies: Copies) -> Plan:
  """Which parameters of `source` become which of `model`.

  Raises:
    ValueError: All that has no meaning, a line each: another number of layers,
      layers that were sparse and would be dense, other widths, parameters that
      one of the two has not, or `copies.experts` that do not fit.
  """
  have, wanted = _shapes(source), _shapes(model)
  layers = _layers_of(source, have)
  experts = _experts(model, source, copies)
  pieces, problems, used = {}, [], set()
  for path, (shape, axes) in wanted.items():
    found = [Piece(path if path in have else None)]
    if (place := _place(model, path)) is not None:
      found = [_find(layers, n, place) for n in place.layers]
    pieces[path] = found
    for piece in found:
      used.add(piece.path)
      problem = _problem(path, piece, shape, axes, have, len(experts))
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
    upcycled=_upcycled(model, source),
  )


class _Place(NamedTuple):
  """A layers' parameter: its stack, its name within a layer, its layers."""

  stack: Path
  name: Path
  layers: list[int]


def _place(model: Model, path: Path) -> _Place | None:
  """Of a parameter that layers have; None for the others."""
  for stack, config in model.config.stacks:
    first, n = 0, len(stack)
    for segment in segments(config.sparse):
      if path[: n + 1] == (*stack, segment.name):
        place = int(path[n + 1].removeprefix('layer_'))
        period = len(segment.pattern)
        layers = range(first + place, first + segment.num_layers, period)
        return _Place(stack, path[n + 2 :], list(layers))
      first += segment.num_layers
  return None


def _layers_of(source: Model, have) -> dict[tuple, Piece]:
  """(stack, layer, name) -> where the source keeps that parameter."""
  found = {}
  for path in have:
    if (place := _place(source, path)) is not None:
      for period, layer in enumerate(place.layers):
        found[place.stack, layer, place.name] = Piece(path, period)
  return found


def _find(layers: Mapping[tuple, Piece], number: int, place: _Place) -> Piece:
  """A layer's parameter: the same, the dense layer's, or a new router's."""
  same = layers.get((place.stack, number, place.name))
  if same is not None:
    return same
  kind, name = place.name[:2], place.name[2:]
  dense = layers.get((place.stack, number, DENSE + name))
  if kind == EXPERTS and dense is not None:
    return dense._replace(stacked=True)
  return Piece(None)


def _problem(path, piece, shape, axes, have, num_experts) -> str | None:
  """What keeps a parameter from being made of its piece."""
  if piece.path is None:
    is_new = path[-3:-1] == ROUTER
    return None if is_new else f'{_name(path)}: not in the other model'
  old = list(have[piece.path][0])
  new = list(shape)
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
  return model.config.moe.router.num_experts if model.config.moe else 0


def _lengths(model: Model, source: Model) -> list[str]:
  """What makes a comparison parameter by parameter meaningless."""
  theirs, ours = (
    {stack: config.sparse for stack, config in m.config.stacks}
    for m in (source, model)
  )
  if theirs.keys() != ours.keys():
    return ['one of the two is an encoder-decoder']
  return [
    f'{"/".join(stack) or "layers"}: {len(theirs[stack])} layers there, '
    f'{len(ours[stack])} here'
    for stack in ours
    if len(theirs[stack]) != len(ours[stack])
  ]


def _upcycled(model: Model, source: Model) -> tuple[int, ...]:
  ours, theirs = (
    m.config.sparse if m.config.moe else (False,) * len(m.config.sparse)
    for m in (model, source)
  )
  return tuple(i for i, (a, b) in enumerate(zip(ours, theirs)) if a and not b)


def _shapes(model: Model) -> dict[Path, tuple[tuple, tuple]]:
  """(shape, logical axes) of every parameter, whatever a row's length."""
  boxed = models.abstract_params(model, 1)
  axes = flat(axis_names(boxed))
  shapes = flat(nn.meta.unbox(boxed))
  return {path: (leaf.shape, axes[path]) for path, leaf in shapes.items()}


def _name(path: Path) -> str:
  return '/'.join(path)
