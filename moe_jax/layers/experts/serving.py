"""Experts, and the contracts of the dispatches that serve tokens by them.

A dispatch and an expert's options together give one module when a layer is
built. It is called as `(groups [G, S, M], routing, train)` and returns groups,
and what moved between devices, or None. Its name is `SCOPE`.
"""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, NamedTuple, Self

from flax import linen as nn

from moe_jax.config import Options, option
from moe_jax.errors import InputError
from moe_jax.layers.ffn import ACTIVATIONS, FfnLayer, FfnOptions
from moe_jax.layers.kernel_format import KernelFormat
from moe_jax.layers.shared import Shared
from moe_jax.routing import AnyRouting, ExchangeStats
from moe_jax.shapes import Array, Float, checked, type_text

# The name of the experts' module in a sparse layer.
SCOPE = 'experts'
ROLE = 'expert'


class Experts(nn.Module):
  """The contract of modules that serve tokens by their experts."""

  @nn.compact
  @checked
  def __call__(
    self,
    x: Float[Array, 'G S M'],
    routing: AnyRouting,
    train: bool = False,
  ) -> tuple[Float[Array, 'G S M'], ExchangeStats | None]:
    """Moves tokens to their experts, applies these, and sums their outputs.

    Args:
      x: Groups of tokens, of the type of products.
      routing: The experts and the gates of each token.
      train: Turns on dropout.

    Returns:
      The gated sums, and what moved between devices, or None.
    """
    result = self.serve(x, routing, train)
    y = result[0] if isinstance(result, tuple) and len(result) == 2 else None
    if getattr(y, 'shape', None) != x.shape:
      raise InputError(
        f'{type(self).__name__}.serve returned {type_text(result)}; Experts '
        f'return (groups of shape {x.shape}, ExchangeStats or None)'
      )
    return result

  def serve(
    self, x: Array, routing: AnyRouting, train: bool
  ) -> tuple[Array, ExchangeStats | None]:
    """Serves tokens; arguments and results are those of `__call__`.

    It is called in a compact method, and so may make parameters.
    """
    raise NotImplementedError


class Dispatch(Options):
  """The contract of dispatches: how tokens move, and how they are multiplied.

  Attributes:
    by_slot: Whether every expert has equally many rows, filled or not.
    by_mask: Whether tokens move by a product with a mask of all slots.
    drops: Whether a capacity that binds may drop choices.
  """

  by_slot: ClassVar[bool] = True
  by_mask: ClassVar[bool] = False
  drops: ClassVar[bool] = True

  def leak(self) -> str | None:
    """The reason why later tokens change earlier outputs; None if they do not.

    The text is a clause with the reason and an alternative.
    """
    return None

  def feed_forward(self, layer: FfnLayer) -> Experts:
    """The module that runs feed-forward experts, named `SCOPE`."""
    raise NotImplementedError

  def modules(self, expert: 'ExpertOptions', shared: Shared) -> Experts:
    """The module that runs copies of any module as experts, named `SCOPE`."""
    raise NotImplementedError


class Twin(NamedTuple):
  """The dense feed-forward layer that replaces some experts in a dense twin.

  Attributes:
    ffn: The width and activation of the layer.
    dropout: The rate at which its hidden values are dropped in training.
  """

  ffn: FfnOptions
  dropout: float

  def of_width(self, hidden: int) -> 'Twin':
    """The same layer with another hidden width."""
    return self._replace(ffn=dataclasses.replace(self.ffn, hidden=hidden))


class ExpertOptions(Options):
  """The contract of an expert's options.

  A subclass defines `module`, or `experts` if its experts are run in a way of
  their own.

  Attributes:
    own_arrays: Whether a model that decodes may give each expert arrays of its
      own, or multiply all experts at once (`few_tokens.py`).
    has_width: Whether an expert is a feed-forward, so that a dense layer of
      some width (`twin`) is its equivalent and can be a shared expert.
    format: The storage of their kernels in codes; None where they are stored
      as they are.
  """

  own_arrays: ClassVar[bool] = True
  has_width: ClassVar[bool] = False
  format: ClassVar[KernelFormat | None] = None

  def within(self, ffn: FfnOptions, dropout: float) -> 'ExpertOptions':
    """These options with defaults filled in from the model's options.

    Args:
      ffn: The dense feed-forward layers of the model.
      dropout: The model's rate of dropout.
    """
    del ffn, dropout
    return self

  def problems_with(self, dispatch: Dispatch) -> Iterator[str]:
    """The problems that these experts have with a dispatch."""
    if not dispatch.by_slot:
      yield (
        f'dispatch={type(dispatch).__name__} serves no experts of '
        f'{type(self).__name__}: it has no rows [E, R, M]; use Gather'
      )

  def module(self, shared: Shared, name: str) -> nn.Module:
    """One expert: a linen module that is called as (rows [R, M], train)."""
    raise NotImplementedError

  def call(
    self, module: nn.Module, rows: Float[Array, 'R M'], train: bool
  ) -> Float[Array, 'R M']:
    """The output of one expert for its rows."""
    return module(rows, train)

  def experts(self, dispatch: Dispatch, shared: Shared) -> Experts:
    """The module that serves tokens by E such experts, named `SCOPE`."""
    return dispatch.modules(self, shared)

  def twin(self, num_selected: int) -> Twin:
    """The dense layer with the FLOPs per token of `num_selected` experts.

    Raises:
      ValueError: These experts have no dense equivalent.
    """
    raise InputError(
      f'{type(self).__name__} has no dense twin: give it a method `twin`'
    )


@dataclasses.dataclass(frozen=True)
class FeedForwardExpert(ExpertOptions):
  """The options of experts that are feed-forward layers, for any dispatch."""

  has_width: ClassVar[bool] = True

  hidden: int = option(
    0,
    'Width F of the hidden layer of each expert; 0: model.ffn.hidden.',
    minimum=0,
  )
  activation: str = option(
    '',
    "Activation of the experts; '': model.ffn.activation.",
    choices=('', *ACTIVATIONS),
  )
  dropout: float = option(
    -1.0,
    "Rate at which experts' hidden values are dropped in training; 0 drops "
    'none, -1: model.dropout.',
    minimum=-1,
    below=1,
    same_function=True,
  )
  bias: str = option(
    '',
    "Biases of the experts' products: 'all', the gate's included (gpt-oss), or "
    "'none'; '': model.ffn.bias.",
    choices=('', 'all', 'none'),
  )

  def within(self, ffn: FfnOptions, dropout: float) -> 'FeedForwardExpert':
    return dataclasses.replace(
      self,
      hidden=self.hidden or ffn.hidden,
      activation=self.activation or ffn.activation,
      bias=self.bias or ffn.bias,
      dropout=dropout if self.dropout < 0 else self.dropout,
    )

  def problems_with(self, dispatch: Dispatch) -> Iterator[str]:
    """None: any dispatch serves feed-forward layers."""
    del dispatch
    return iter(())

  def experts(self, dispatch: Dispatch, shared: Shared) -> Experts:
    layer = FfnLayer(self.twin(1).ffn, shared, self.dropout, ROLE)
    return dispatch.feed_forward(layer)

  def twin(self, num_selected: int) -> Twin:
    """A dense layer of `num_selected` times the width of an expert."""
    width = self.hidden * num_selected
    return Twin(FfnOptions(width, self.activation, self.bias), self.dropout)

  def shrunk(self) -> Self:
    return dataclasses.replace(self, hidden=40 if self.hidden else 0)
