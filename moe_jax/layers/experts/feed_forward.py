"""Experts that are feed-forward layers."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Self

from moe_jax.errors import InputError
from moe_jax.layers.activations import ACTIVATIONS
from moe_jax.layers.experts.serving import (
  ROLE,
  Dispatch,
  ExpertOptions,
  Experts,
  Twin,
)
from moe_jax.layers.ffn import FfnLayer, FfnOptions
from moe_jax.layers.shared import Shared
from moe_jax.options import Check, at_least, one_of, option

_RATE = Check(
  'must be -1 or in [0, 1)', lambda rate: rate == -1 or 0 <= rate < 1
)


@dataclasses.dataclass(frozen=True)
class FeedForwardExpert(ExpertOptions):
  """The options of experts that are feed-forward layers, for any dispatch."""

  has_width: ClassVar[bool] = True

  hidden: int = option(
    0,
    'Width F of the hidden layer of each expert; 0: model.ffn.hidden.',
    at_least(0),
  )
  activation: str = option(
    '',
    "Activation of the experts; '': model.ffn.activation.",
    one_of('', *ACTIVATIONS),
  )
  dropout: float = option(
    -1.0,
    "Rate at which experts' hidden values are dropped in training; 0 drops "
    'none, -1: model.dropout.',
    _RATE,
    how=True,
  )
  bias: str = option(
    '',
    "Biases of the experts' products: 'all', the gate's included (gpt-oss), or "
    "'none'; '': model.ffn.bias.",
    one_of('', 'all', 'none'),
  )

  def within(self, ffn: FfnOptions, dropout: float) -> 'FeedForwardExpert':
    """See `ExpertOptions.within`."""
    return dataclasses.replace(
      self,
      hidden=self.hidden or ffn.hidden,
      activation=self.activation or ffn.activation,
      bias=self.bias or ffn.bias,
      dropout=dropout if self.dropout < 0 else self.dropout,
    )

  def cut(self, parts: int) -> Self:
    """See `ExpertOptions.cut`."""
    if not self.hidden:
      raise InputError(
        'expert.hidden=0 stands for model.ffn.hidden; set the width that is to '
        'be cut'
      )
    if parts < 1 or self.hidden % parts:
      raise InputError(
        f'expert.hidden={self.hidden} does not divide by parts={parts}'
      )
    return dataclasses.replace(self, hidden=self.hidden // parts)

  def problems_with(self, dispatch: Dispatch) -> Iterator[str]:
    """None: any dispatch serves feed-forward layers."""
    del dispatch
    return iter(())

  def experts(self, dispatch: Dispatch, shared: Shared) -> Experts:
    """See `ExpertOptions.experts`."""
    layer = FfnLayer(self.twin(1).ffn, shared, self.dropout, ROLE)
    return dispatch.feed_forward(layer)

  def twin(self, num_selected: int) -> Twin:
    """A dense layer of `num_selected` times the width of an expert."""
    width = self.hidden * num_selected
    return Twin(FfnOptions(width, self.activation, self.bias), self.dropout)

  def shrunk(self) -> Self:
    """See `Options.shrunk`."""
    return dataclasses.replace(self, hidden=40 if self.hidden else 0)
