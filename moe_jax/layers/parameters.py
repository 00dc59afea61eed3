"""Parameters in boxes: each carries its logical axes, its role and its form.

The module that makes a parameter gives its role. Axes and roles are read once,
from the abstract initialisation of a model, into trees of the same structure as
the parameters; train states are unboxed.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
from flax import linen as nn

from moe_jax.layers.shared import Shared

Names = tuple[str | None, ...]

# A function of a random key, a shape and a dtype. Its result, an array, may be
# in a box, from which flax takes the array.
Initializer = Callable[..., Any]


class Role(NamedTuple):
  """The part of the model that a parameter belongs to, and its use there.

  Attributes:
    role: The part of the model: 'attention', 'embedding', 'expert', 'ffn',
      'gate', 'head', 'lstm', 'norm', 'router' or 'shared_expert'; '' where no
      module gave one.
    form: The use of the parameter: a 'kernel' is contracted with activations, a
      'bias' is added to them, a 'scale' multiplies them, a 'table' is indexed;
      '' where it is unknown.
  """

  role: str = ''
  form: str = ''


class Parameter(nn.LogicallyPartitioned):
  """The box of a parameter, with its logical axes, its role and its use.

  Flax's lifted transformations, such as `nn.scan`, add the name of the axis
  that they add, and keep role and form.

  Attributes:
    role: The part of the model, such as 'attention'; '' where none was given.
    form: The use: 'kernel', 'bias', 'scale' or 'table'; '' where unknown.
  """

  role: str = flax.struct.field(default='', pytree_node=False)
  form: str = flax.struct.field(default='', pytree_node=False)


def boxed(
  init: Initializer, axes: Sequence[str | None], *, role: str, form: str
) -> Initializer:
  """An initialiser that puts its arrays into a box.

  It is called like `init`, as (key, shape, dtype), and returns a `Parameter`.

  Args:
    init: The initialiser that makes the arrays.
    axes: The logical name of each dimension; None for a dimension without one.
    role: The part of the model, such as 'attention' or 'ffn'.
    form: The use: 'kernel', 'bias', 'scale' or 'table'.
  """

  def make_box(*args: Any, **kwargs: Any) -> Parameter:
    array = init(*args, **kwargs)
    return Parameter(array, tuple(axes), role=role, form=form)

  return make_box


def kernel(
  shared: Shared,
  axes: Sequence[str | None],
  *,
  role: str,
  in_axis: int | Sequence[int] = -2,
  out_axis: int | Sequence[int] = -1,
  batch_axis: Sequence[int] | None = None,
  residual: bool = False,
  shrink: float = 1.0,
) -> Initializer:
  """The initialiser of a kernel, by the model's kind of initialisation.

  It is a function (key, shape, dtype) -> `Parameter`, the kernel in its box.

  Args:
    shared: The settings that all layers of the model share.
    axes: The logical name of each dimension; None for a dimension without one.
    role: The part of the model, such as 'attention' or 'ffn'.
    in_axis: The dimensions that are contracted with activations.
    out_axis: The dimensions of the result.
    batch_axis: The dimensions along which independent kernels are stacked.
      Default: the dimensions named 'expert'.
    residual: Whether the product is added to the residual stream.
    shrink: The number that the usual variance is divided by.
  """
  if batch_axis is None:
    batch_axis = [i for i, name in enumerate(axes) if name == 'expert']
  parts = dict(in_axis=in_axis, out_axis=out_axis, batch_axis=batch_axis)
  init = shared.numerics.init.kernel(
    residual=residual, shrink=shrink, num_layers=shared.num_layers, **parts
  )
  return boxed(init, axes, role=role, form='kernel')


def zero_kernel(axes: Sequence[str | None], *, role: str) -> Initializer:
  """A function (key, shape, dtype) -> zeros in a `Parameter`, as a kernel."""
  return boxed(nn.initializers.zeros, axes, role=role, form='kernel')


def bias(axes: Sequence[str | None], *, role: str) -> Initializer:
  """A function (key, shape, dtype) -> zeros in a `Parameter`, as a bias."""
  return boxed(nn.initializers.zeros, axes, role=role, form='bias')


def scale(axes: Sequence[str | None], *, role: str) -> Initializer:
  """A function (key, shape, dtype) -> ones in a `Parameter`, as a scale."""
  return boxed(nn.initializers.ones, axes, role=role, form='scale')


def table(
  shared: Shared, axes: Sequence[str | None], *, role: str = 'embedding'
) -> Initializer:
  """A function (key, shape, dtype) -> random embeddings in a `Parameter`."""
  init = shared.numerics.init.embedding()
  return boxed(init, axes, role=role, form='table')


def with_role(variables: Any, role: str, stacked: Names = ()) -> Any:
  """Puts parameters into boxes, and gives a role to each that has none.

  Args:
    variables: The parameters of a module that sets no roles, with or without
      boxes.
    role: The role that the parameters get.
    stacked: The logical names of the leading dimensions, which stack copies of
      the module.

  Returns:
    The tree of boxes. The rank of a parameter, without the stacked dimensions,
    decides its form: up to 1 it is a bias, else a kernel. A parameter that has
    a role keeps it.
  """

  def box(leaf):
    if isinstance(leaf, Parameter) and leaf.role:
      return leaf
    array: Any = nn.meta.unbox(leaf)
    rank = array.ndim - len(stacked)
    names = getattr(leaf, 'names', None) or (*stacked, *(None,) * rank)
    form = 'bias' if rank <= 1 else 'kernel'
    return Parameter(array, names, role=role, form=form)

  return jax.tree.map(box, variables, is_leaf=_is_box)


def axes_of(abstract_variables: Any) -> Any:
  """A tree of each variable's logical axes, with None for an unnamed axis.

  The variables are boxed arrays or shapes; without a box all axes are unnamed.
  """

  def names(leaf):
    return leaf.names if hasattr(leaf, 'names') else (None,) * leaf.ndim

  return jax.tree.map(names, abstract_variables, is_leaf=_is_box)


def roles_of(abstract_variables: Any) -> Any:
  """A tree with the `Role` of every boxed variable, `Role()` without a box."""

  def role(leaf):
    is_known = isinstance(leaf, Parameter)
    return Role(leaf.role, leaf.form) if is_known else Role()

  return jax.tree.map(role, abstract_variables, is_leaf=_is_box)


def _is_box(leaf: Any) -> bool:
  return isinstance(leaf, nn.meta.AxisMetadata)
