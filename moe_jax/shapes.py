"""The letters of all array shapes, and the types that are annotated with them.

| | meaning | | meaning |
|---|---|---|---|
| B | sequences in a batch | K | experts selected per token |
| T | tokens per sequence | C | capacity: slots per expert and group |
| G | groups, routed independently | M | model width |
| S | tokens per group; G*S = B*T | F | hidden width of an expert or FFN |
| E | experts | H, D | attention heads, head width |
| L | layers | V | vocabulary |

R is the number of rows that an expert multiplies (G*C). A type `Float32`
requires float32 whatever the model's dtype is; `Float` takes any width.

`checked` compares the arguments of a call with the shapes of its signature:

    @checked
    def z_loss(logits: Float32[Array, 'G S E'], mask: Bool[Array, 'G S']): ...

A call with other ranks, sizes or types gets a `ValueError` that names both
sides. Only static shapes are read, so that compiled programs cost nothing more.
"""

import functools
import inspect
import numbers
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar, cast, runtime_checkable

import jax
import jaxtyping
import numpy as np
from jaxtyping import (  # noqa: F401
  Array,
  BFloat16,
  Bool,
  Float,
  Float32,
  Int,
  Int8,
  Int32,
  Key,
  Shaped,
  UInt8,
  UInt16,
  UInt32,
)

from moe_jax.errors import InputError

PRNGKey = Key[Array, '']
# Type of a field of a registered dataclass: an array, or, in a tree of the same
# structure, what stands for the array, such as a shape or a sharding.
Leaf = Any
F = TypeVar('F', bound=Callable[..., Any])
_NONE = type(None)


@runtime_checkable
class HasShapes(Protocol):
  """An object of arrays whose shapes are checked with those of arguments."""

  def shape_hints(self) -> dict[str, Any]:
    """The jaxtyping type of each field, by name, in this module's letters."""
    ...

  def static_sizes(self) -> dict[str, int]:
    """The sizes, by letter, that follow from no array's shape."""
    ...


class Shape(NamedTuple):
  """An argument with the dimensions that it must have.

  Attributes:
    name: Name of the argument.
    value: The argument.
    hints: The array types that it may have, one of which must fit.
  """

  name: str
  value: Any
  hints: tuple[Any, ...]

  @property
  def dims(self) -> str:
    """The dimensions in letters: '[G, S, E]'."""
    return f'[{", ".join(self.hints[0].dim_str.split())}]'

  @property
  def letters(self) -> set[str]:
    """The letters of the dimensions."""
    return set(re.findall(r'[A-Za-z]\w*', self.hints[0].dim_str))

  @property
  def text(self) -> str:
    """The argument with its shape, as a part of a message."""
    return f'{self.name} has shape {np.shape(self.value)} as {self.dims}'


def checked(f: F) -> F:
  """Checks the arguments of each call of `f` against its annotations.

  Arrays must have the type and the dimensions of their annotation, the same
  letter being the same size in all arguments. No size may be 0, except in an
  array of any number of dimensions ('...', '*E R M'). Integers must be integers
  and no booleans. Other annotations are not read.
  """
  signature = inspect.signature(f)
  readers = {
    name: _Reader.of(parameter.annotation)
    for name, parameter in signature.parameters.items()
  }

  @functools.wraps(f)
  def call(*args, **kwargs):
    try:
      arguments = signature.bind(*args, **kwargs).arguments
    except TypeError:
      return f(*args, **kwargs)  # Python's own error names the argument
    check_shapes(
      shape
      for name, value in arguments.items()
      for shape in readers[name].shapes(name, value)
    )
    return f(*args, **kwargs)

  return cast(F, call)


def check_shapes(shapes: Iterable[Shape]) -> None:
  """Raises ValueError where shapes are wrong or do not fit each other."""
  earlier_shapes: list[Shape] = []
  with jaxtyping.jaxtyped('context'):
    for shape in shapes:
      array = _as_struct(shape)
      if not any(isinstance(array, hint) for hint in shape.hints):
        raise InputError(_problem(shape, array, earlier_shapes))
      earlier_shapes.append(shape)


def shapes_in(name: str, value: HasShapes) -> Iterator[Shape]:
  """Yields the shapes of an object's arrays, and of its static sizes.

  `name` is the name of the object in messages. What a user's router returns is
  checked so.
  """
  for field, hint in value.shape_hints().items():
    yield Shape(f'{name}.{field}', getattr(value, field), (_any_array(hint),))
  for letter, size in value.static_sizes().items():
    struct = jax.ShapeDtypeStruct((size,), np.int32)
    hint = jaxtyping.Shaped[Any, letter]
    yield Shape(f'{letter}={size} of {name}', struct, (hint,))


def array_of(name: str, value: Any, hint: Any) -> Shape:
  """The array `value`, called `name`, with the dimensions that `hint` gives.

  `hint` is a jaxtyping type, such as `Bool[Array, 'G S']`.
  """
  return Shape(name, value, (_any_array(hint),))


def type_text(output: Any) -> str:
  """The type of a user's output, for messages: 'float32[8, 16]'."""
  if type(output) is tuple:
    return f'({", ".join(map(type_text, output))})'
  if hasattr(output, 'shape') and hasattr(output, 'dtype'):
    return f'{output.dtype}{list(output.shape)}'
  return type(output).__name__


def is_whole(value: Any) -> bool:
  """Whether a value is an integer, Python's or numpy's, and no boolean."""
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)


class _Reader(NamedTuple):
  """The parts of an annotation that are checked.

  Attributes:
    hints: The array types in the annotation.
    others: The other types in it, of which `int` and None are checked.
  """

  hints: tuple[Any, ...]
  others: tuple[Any, ...]

  @classmethod
  def of(cls, annotation: Any) -> '_Reader':
    """Takes an annotation apart into its array types and its other types."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    parts = typing.get_args(annotation) if is_union else (annotation,)
    hints = tuple(_any_array(part) for part in parts if _is_array(part))
    return cls(hints, tuple(part for part in parts if not _is_array(part)))

  def shapes(self, name: str, value: Any) -> Iterator[Shape]:
    """Yields the arrays of an argument, each with the shape that it must have.

    Raises:
      ValueError: The argument has none of the types of its annotation.
    """
    if isinstance(value, HasShapes):
      yield from shapes_in(name, value)
    elif self.hints and hasattr(value, 'shape'):
      yield Shape(name, value, self.hints)
    elif not any(_allows(other, value) for other in self.others):
      raise InputError(f'{name}={value!r:.60} must be {self._requirement()}')

  def _requirement(self) -> str:
    if not self.hints:
      return 'an integer or None' if _NONE in self.others else 'an integer'
    return f'an array {Shape("", None, self.hints).dims}'


def _allows(hint: Any, value: Any) -> bool:
  if hint is _NONE:
    return value is None
  return hint is not int or is_whole(value)


def _is_array(hint: Any) -> bool:
  # Random keys are left to jax.random, which takes two kinds of keys.
  has_dims = isinstance(hint, type) and hasattr(hint, 'dim_str')
  return has_dims and hint.dtype is not jaxtyping.Key


def _any_array(hint: Any) -> Any:
  """The type `hint` for arrays of any library; `Int` takes unsigned, too."""
  signed = hint.dtype is jaxtyping.Int
  dtype: Any = jaxtyping.Integer if signed else hint.dtype
  return dtype[Any, hint.dim_str]


def _as_struct(shape: Shape) -> Any:
  value = shape.value
  if not hasattr(value, 'shape') or not hasattr(value, 'dtype'):
    raise InputError(
      f'{shape.name}={value!r:.60} must be an array {shape.dims}'
    )
  open_ended = '*' in shape.dims or '...' in shape.dims
  if 0 in np.shape(value) and not open_ended:
    raise InputError(f'{shape.text} is empty; each size must be at least 1')
  # JAX takes numpy's float64 as float32 by default.
  dtype = jax.dtypes.canonicalize_dtype(value.dtype, allow_extended_dtype=True)
  return jax.ShapeDtypeStruct(np.shape(value), dtype)


def _problem(shape: Shape, array: Any, earlier_shapes: list[Shape]) -> str:
  """The message for an argument whose shape fits none of its array types.

  `array` has the argument's actual shape and dtype. Of the shapes of earlier
  arguments the message names those that decide the sizes of its letters.
  """
  hint = shape.hints[0]
  any_type = hint.dtype is jaxtyping.Shaped
  if not any_type and str(array.dtype) not in hint.dtypes:
    return (
      f'{shape.name} has type {array.dtype}; it must be '
      f'{hint.dtype.__name__.lower()}'
    )
  message = f'{shape.name} has shape {array.shape}, and {shape.dims} is needed'
  if '=' in shape.name:
    message = shape.name
  unexplained, sources = set(shape.letters), []
  for earlier in earlier_shapes:
    if earlier.letters & unexplained:
      unexplained -= earlier.letters
      sources.append(earlier.name if '=' in earlier.name else earlier.text)
  return f'{message}; {", ".join(sources)}' if sources else message
