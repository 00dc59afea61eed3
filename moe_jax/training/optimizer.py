"""Optimizers: their options, which make an optax transformation.

The first of the user's rules that selects a parameter gives its factor of
weight decay or learning rate. If no rule does, the factor of decay is 1 for
kernels and 0 for other parameters, and that of the learning rate is 1.

A new optimizer is one class with its options and its preconditioner.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from moe_jax.config import Kinds, Options, choice, option, required
from moe_jax.layers.parameters import Role
from moe_jax.models.lora import RANK
from moe_jax.models.selection import expression_problems, names_of
from moe_jax.partitioning import path_name
from moe_jax.shapes import Leaf
from moe_jax.training import rounded_moments
from moe_jax.training.schedules import SCHEDULES, Schedule

Transform = optax.GradientTransformation
# A rule: a regular expression of names, or 'part:' and parts of the model, such
# as 'part:experts + router'; and the factor of the parameters that it selects.
Pattern = tuple[str, float]
_PART = 'part:'
# Axes along which matrices are stacked; no statistic is shared along them.
STACKED_AXES = ('layers', 'expert')


def _decay(default: float, mean: str) -> Any:
  return option(default, f'Decay per step of {mean}', minimum=0, below=1)


@dataclasses.dataclass(frozen=True)
class Optimizer(Options):
  """The base of optimizers, which override `preconditioner`.

  An optimizer clips gradients, preconditions them, decays weights, and scales
  by the learning rate, in this order.
  """

  learning_rate: float = option(
    1e-3,
    'Peak of the learning rate, after the warm-up; at 0 nothing is learned.',
    minimum=0,
  )
  schedule: Schedule = choice(
    SCHEDULES, 'cosine', 'Curve of the learning rate after the warm-up.'
  )
  clip_norm: float = option(
    1.0,
    'Largest norm of the gradient of all parameters together; a larger '
    'gradient is scaled down to it. 0 clips no gradient.',
    minimum=0,
  )
  weight_decay: float = option(
    0.1,
    'Weight decay: this number times the learning rate is the fraction of a '
    'parameter that is subtracted at each step. 0 decays nothing.',
    minimum=0,
  )
  ema: float = _decay(
    0.0,
    'a running mean of the parameters, such as 0.999, by which the model is '
    'evaluated, exported and read elsewhere; 0 keeps none.',
  )
  decay_rules: tuple[Pattern, ...] = option(
    (),
    'Pairs of a regular expression and a factor of the weight decay. For a '
    'parameter the first expression counts that is found in its name, such as '
    "'layers/layer_1/moe/experts/w_in', or that begins with 'part:' and "
    "selects the parameter as `trainable` would: 'part:experts + router'; if "
    'no expression does, kernels decay, and biases, scales and tables do not.',
  )
  rate_rules: tuple[Pattern, ...] = option(
    (),
    'Pairs of a regular expression and a factor of the learning rate. For a '
    'parameter the first expression counts that is found in its name, or that '
    "begins with 'part:' and selects the parameter as `trainable` would: "
    "'part:experts + router'; if no expression does, the factor is 1, and 0 "
    'learns nothing.',
  )

  def problems(self) -> Iterator[str]:
    for name in ('decay_rules', 'rate_rules'):
      rules = getattr(self, name)
      for pattern, factor in rules:
        yield from expression_problems(name, _expression(pattern))
        if factor < 0:
          yield f'{name}={rules!r}: the factor {factor} must be at least 0'

  @required
  def preconditioner(self, axes: Any, roles: Any) -> Transform:
    """Returns the transformation of clipped gradients into update directions.

    Args:
      axes: A tree like the parameters that train with a tuple of logical axes
        for each.
      roles: A tree like `axes` with the `Role` of each parameter.
    """
    raise NotImplementedError

  def rate(self, total_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the number of steps taken."""
    return self.schedule.rate(self.learning_rate, total_steps)

  def next_rate(self, total_steps: int) -> Callable[[Any], Leaf]:
    """Returns a function from the optimizer's state to a learning rate.

    The state is that of `transformation`, and the rate that of its next update.
    A step that is skipped is no update, and the schedule does not count it.
    """
    rate = self.rate(total_steps)
    return lambda state: rate(state[-1].count)

  def transformation(
    self,
    total_steps: int,
    axes: Any,
    roles: Any,
    part: Callable[..., Any] = lambda tree, is_leaf=None: tree,
  ) -> Transform:
    """Returns the whole optimizer as one optax transformation.

    Args:
      total_steps: Number of optimizer steps of the run, for the schedule.
      axes: A tree like the parameters that train with a tuple of logical axes
        for each.
      roles: A tree like all parameters with the `Role` of each.
      part: Function from a tree like all parameters, and `is_leaf` as
        `jax.tree.map` takes it, to the tree with None in place of each
        parameter that does not train.

    Raises:
      ValueError: A rule names a part that the model lacks.
    """

    def factors(option, default):
      rules = [
        (names_of(_expression(pattern), roles, f'optimizer.{option}'), factor)
        for pattern, factor in getattr(self, option)
      ]

      def factor_of(path, role):
        name = path_name(path)
        chosen = (float(factor) for names, factor in rules if name in names)
        return next(chosen, default(role))

      with_path = jax.tree_util.tree_map_with_path
      return part(with_path(factor_of, roles, is_leaf=is_role))

    decay = factors('decay_rules', lambda role: float(role.form == 'kernel'))
    rates = factors('rate_rules', lambda role: 1.0)

    def decayed(updates, params):
      def decayed_leaf(u, p, f):
        return u + (self.weight_decay * f * p if f else 0)

      return jax.tree.map(decayed_leaf, updates, params, decay)

    def scaled(updates, params):
      return jax.tree.map(lambda u, f: u if f == 1 else f * u, updates, rates)

    directions = self.preconditioner(axes, part(roles, is_leaf=is_role))
    return optax.chain(
      *([clipped(self.clip_norm)] if self.clip_norm else []),
      _in_float32(directions),
      *([optax.stateless(decayed)] if self.weight_decay else []),
      optax.stateless(scaled),
      optax.scale_by_learning_rate(self.rate(total_steps)),
    )


@dataclasses.dataclass(frozen=True)
class AdamW(Optimizer):
  """Adam with decoupled weight decay (arXiv:1711.05101)."""

  b1: float = _decay(
    0.9,
    'the running mean of gradients, the first moment; 0 takes the gradient '
    'itself.',
  )
  b2: float = _decay(
    0.98,
    'the running mean of squared gradients, the second moment; 0 takes the '
    'squared gradient itself.',
  )
  epsilon: float = option(
    1e-8,
    "Number that is added to the root of Adam's second moment, by which the "
    'first moment is divided.',
    above=0,
  )
  moment_dtype: str = option(
    'float32',
    "Type of both moments in the optimizer's state: 'float32', or 'bfloat16', "
    'half the bytes, rounded up or down at random.',
    choices=('float32', 'bfloat16'),
  )

  def preconditioner(self, axes: Any, roles: Any) -> Transform:
    if self.moment_dtype == 'bfloat16':
      return rounded_moments.scale_by_adam(self.b1, self.b2, self.epsilon)
    return optax.scale_by_adam(self.b1, self.b2, self.epsilon)


@dataclasses.dataclass(frozen=True)
class Adafactor(Optimizer):
  """Adafactor (arXiv:1804.04235), with steps relative to a matrix's magnitude.

  Each matrix has its own factored moments, clipping of the update, and scale,
  its root mean square; matrices of stacked layers or experts share none.
  """

  b1: float = _decay(0.9, 'the mean of updates; 0 keeps no first moment.')
  decay_exponent: float = option(
    0.8,
    'Exponent e of the decay 1 - step^-e of the running mean of squared '
    'gradients, the second moment.',
    above=0,
    maximum=1,
  )
  min_factored_size: int = option(
    128,
    "Size that a matrix's two largest dimensions must have for its second "
    'moment to be factored into a row and a column.',
    minimum=1,
  )
  update_clip: float = option(
    1.0,
    'Largest root mean square of the update of a matrix, before the learning '
    "rate and the matrix's size scale it; a larger update is scaled down to it "
    '(0.1 in Table 4 of arXiv:2202.08906).',
    above=0,
  )

  def preconditioner(self, axes: Any, roles: Any) -> Transform:
    transform = optax.chain(
      optax.scale_by_factored_rms(
        decay_rate=self.decay_exponent,
        min_dim_size_to_factor=self.min_factored_size,
      ),
      optax.clip_by_block_rms(self.update_clip),
      optax.scale_by_param_block_rms(),
      *([optax.ema(self.b1, debias=False)] if self.b1 else []),
    )
    transforms = jax.tree.map(lambda _: transform, axes, is_leaf=is_names)
    return per_matrix(transforms, axes)


def is_role(leaf: Any) -> bool:
  """Whether a node is a `Role`, which `jax.tree.map` shall not enter."""
  return isinstance(leaf, Role)


def _expression(pattern: str) -> str:
  """A rule's pattern in the form that the option `trainable` takes.

  An empty pattern becomes the regular expression '.', which is found in every
  name.
  """
  if pattern.startswith(_PART):
    return pattern.removeprefix(_PART).strip()
  return f're:{pattern or "."}'


def clipped(largest: float) -> Transform:
  """Clips gradients to the global norm `largest`, as optax's function does.

  Each gradient is multiplied by one number, which is the same for all; optax
  first divides each gradient by the norm. A compiler repeats such a product
  wherever a gradient is read, but writes the quotients to memory. The two
  results differ by rounding, and only where gradients are clipped.
  """

  def update(updates, params):
    norm = optax.global_norm(updates)
    factor = jnp.where(norm < largest, 1.0, largest / norm)
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates)

  return optax.stateless(update)


def _in_float32(inner: Transform) -> Transform:
  """Wraps a transformation so that it gets float32 gradients and parameters.

  Otherwise the transformation's state would have the type of the parameters. In
  bfloat16, rounded to the nearest, a running mean does not move where its
  change is small.
  """
  cast: Any = optax.tree_utils.tree_cast

  def init(params):
    return inner.init(cast(params, jnp.float32))

  def update(updates, state, params=None):
    updates, params = cast((updates, params), jnp.float32)
    return inner.update(updates, state, params)

  return Transform(init, update)


def is_names(leaf: Any) -> bool:
  """Whether a node is a tuple of axes, which `jax.tree.map` shall not enter."""
  return isinstance(leaf, tuple)


def per_matrix(transforms: Any, axes: Any) -> Transform:
  """Applies a transformation to every matrix of every stacked parameter.

  A parameter [L, E, M, F] is L * E matrices, which share none of the factors,
  norms and scales that the transformation takes.

  Args:
    transforms: A tree like the parameters with the transformation of one matrix
      for each.
    axes: A tree like the parameters with a tuple of logical axes for each;
      stacked axes lead.
  """

  def lifted(function, names):
    for _ in stacked(names):
      function = jax.vmap(function)
    return function

  def init(params):
    return jax.tree.map(
      lambda p, n, t: lifted(t.init, n)(p), params, axes, transforms
    )

  def update(updates, state, params=None):
    def update_leaf(u, s, p, names, transform):
      return lifted(transform.update, names)(u, s, p)

    tree = jax.tree.structure(updates)
    pairs = jax.tree.map(update_leaf, updates, state, params, axes, transforms)
    updates, state = zip(*tree.flatten_up_to(pairs), strict=True)
    return tree.unflatten(updates), tree.unflatten(state)

  return Transform(init, update)


def stacked(names: tuple[str | None, ...]) -> tuple[str | None, ...]:
  """The leading logical axes of a parameter that stack layers or experts."""
  return tuple(itertools.takewhile(STACKED_AXES.__contains__, names))


# Parts of a model whose kernels are matrices between hidden values.
_HIDDEN = ('attention', 'expert', 'ffn', 'lstm', 'shared_expert')


@dataclasses.dataclass(frozen=True)
class Muon(Optimizer):
  """Muon for hidden matrices and experts, Adam for all other parameters.

  It orthogonalizes the momentum of each matrix:
  https://kellerjordan.github.io/posts/muon and, for its scale and decay in
  large models, https://arxiv.org/abs/2502.16982. Every expert of every layer is
  a matrix of its own, however they are stacked, and the heads of a projection
  are one matrix together. Unlike in Jordan's and PyTorch's Muon, optax corrects
  the bias of the running mean, so that updates differ from theirs by about a
  tenth at steps 2 and 3, and by less later.

  Adam trains embeddings, logits, routers, norms and biases, as published. A
  parameter that Muon trains has one moment, half of Adam's state.
  """

  momentum: float = _decay(
    0.95,
    'the running mean of gradients (Nesterov) that Muon orthogonalizes; 0 '
    'takes the gradient itself.',
  )
  iterations: int = option(
    5,
    'Number of Newton-Schulz iterations by which a matrix is orthogonalized; '
    'each takes three matrix products.',
    minimum=1,
  )
  rms: float = option(
    0.2,
    'Root mean square of the update of a matrix before the learning rate: 0.2 '
    "is that of Adam, so that Adam's rates and decays can be kept. With 0 an "
    'orthogonal matrix is multiplied by the root of max(1, outputs / inputs), '
    'which needs a larger rate.',
    minimum=0,
  )
  adam_rate: float = option(
    1.0,
    'Factor of the learning rate for parameters that Adam trains; at 0 they '
    'keep their values.',
    minimum=0,
  )
  b1: float = _decay(0.9, "Adam's first moment; 0 takes the gradient itself.")
  b2: float = _decay(
    0.98, "Adam's second moment; 0 takes the squared gradient."
  )
  epsilon: float = option(
    1e-8,
    "Number that is added to the root of Adam's second moment, and to the norm "
    'of a matrix before it is orthogonalized.',
    above=0,
  )

  def preconditioner(self, axes: Any, roles: Any) -> Transform:
    adam = optax.scale_by_adam(self.b1, self.b2, self.epsilon)
    adam = optax.chain(adam, optax.scale(self.adam_rate))

    def transform_of(role: Role, names: tuple[str | None, ...]):
      return self._orthogonal(names) if is_hidden(role, names) else adam

    transforms = jax.tree.map(transform_of, roles, axes, is_leaf=is_role)
    return per_matrix(transforms, axes)

  def _orthogonal(self, names: tuple[str | None, ...]) -> Transform:
    """Muon's transformation of one matrix of a stacked parameter.

    `names` are the logical axes of the parameter, stacked axes included.
    """
    sides = dimensions(names[len(stacked(names)) :])

    def scaled(matrix: Any, params: Any) -> Any:
      inputs, outputs = (int(np.take(matrix.shape, s).prod()) for s in sides)
      if self.rms:
        return self.rms * math.sqrt(max(inputs, outputs)) * matrix
      return math.sqrt(max(1.0, outputs / inputs)) * matrix

    return optax.chain(
      contrib.scale_by_muon(
        ns_steps=self.iterations,
        beta=self.momentum,
        eps=self.epsilon,
        weight_dimension_numbers=sides,
      ),
      optax.stateless(scaled),
    )


def is_hidden(role: Role, names: tuple[str | None, ...]) -> bool:
  """Whether a parameter is a kernel between hidden values, which Muon trains.

  A kernel from the residual stream to one number, a gate, is no matrix, and
  neither is the factor of an adapter that leads to such a number. `names` are
  the parameter's logical axes.
  """
  hidden = role.form == 'kernel' and role.role in _HIDDEN
  return hidden and names[-2:] not in (('embed', None), (RANK, None))


def dimensions(names: tuple[str | None, ...]) -> contrib.MuonDimensionNumbers:
  """The dimensions of a kernel that are inputs, and those that are outputs.

  If the last axis is 'embed' (the residual stream) or the rank of an adapter,
  it is the output, and all other axes are inputs. Otherwise the first axis is
  the input, and all others are outputs. `names` are the logical axes of one
  matrix, without those that stack matrices; the result has their indices.
  """
  split = len(names) - 1 if names[-1] in ('embed', RANK) else 1
  return contrib.MuonDimensionNumbers(
    tuple(range(split)), tuple(range(split, len(names)))
  )


OPTIMIZERS = Kinds(
  'optimizer',
  Optimizer,
  {'adamw': AdamW, 'adafactor': Adafactor, 'muon': Muon},
  inline=True,
)
