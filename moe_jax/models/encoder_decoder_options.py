"""Options of encoder-decoders: those of a decoder, and encoder overrides."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

from moe_jax.config import (
  OptionError,
  Options,
  fields_of,
  keys_of,
  option,
  overridden,
  section_of,
)
from moe_jax.layers.attention import ATTENTIONS
from moe_jax.layers.kernel_format import KernelFormat
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.retained import Retained
from moe_jax.layers.shared import RULES
from moe_jax.models.base import RunShape
from moe_jax.models.encoder_decoder import EncoderDecoder
from moe_jax.models.transformer_options import StackOptions, TransformerOptions
from moe_jax.partitioning import Rules


@dataclasses.dataclass(frozen=True)
class EncoderOptions(Options):
  """The options in which an encoder differs from the decoder."""

  num_layers: int = option(
    0,
    'Number of layers of the encoder; 0: model.num_layers.',
    minimum=0,
  )
  overrides: Mapping[str, Any] = option(
    {},
    'Options of layers that have other values in the encoder, nested as in the '
    "section of the model: {'ffn': {'hidden': 64}}. They are among dropout, "
    'ffn, moe, attention, norm, scan_layers and remat.',
  )


@dataclasses.dataclass(frozen=True)
class EncoderDecoderOptions(TransformerOptions):
  """The options of a sequence-to-sequence model."""

  has_encoder: ClassVar[bool] = True

  encoder: EncoderOptions = option(
    EncoderOptions(), 'Layers of the encoder, if they differ from a decoder.'
  )

  def encoder_half(self) -> StackOptions:
    """The options of the encoder's layers.

    They are the decoder's with `encoder.overrides`. Without those, the encoder
    has as many heads of keys and values as of queries, as fewer ones are for
    the decoder's cache; no window; and, as its layers are counted anew, tables
    of its own where its router draws or hashes, and no layer with fewer experts
    than the others.

    Raises:
      OptionError: An override is unknown, bad or without effect.
    """
    return self._encoder_half

  @functools.cached_property
  def _encoder_half(self) -> StackOptions:
    """It is cached, as each build reads it ten times."""
    # Both change at once: moe.layers may fit the new number of layers alone.
    L = self.encoder.num_layers or self.num_layers
    changes = {'num_layers': L, **self.encoder.overrides}
    return overridden(StackOptions, self._plain_encoder(), changes)

  def _plain_encoder(self) -> StackOptions:
    """The encoder's layers without overrides, as many as the decoder's."""
    half = StackOptions(
      **{name: getattr(self, name) for name in fields_of(StackOptions)}
    )
    moe = half.moe
    router: Any = moe.router
    if 'seed' in fields_of(type(router)):
      router = dataclasses.replace(router, seed=router.seed + 1)
    return dataclasses.replace(
      half,
      attention=half.attention.for_encoder(),
      moe=dataclasses.replace(moe, router=router, retained=Retained()),
    )

  def with_encoder(self, half: StackOptions) -> Self:
    """These options with the overrides that make `half` their encoder."""
    L = half.num_layers
    base, changed = (
      keys_of(StackOptions, section_of(layers))
      for layers in (self._plain_encoder(), half)
    )
    base_values = {leaf.path: leaf.value for leaf in base} | {'num_layers': L}
    overrides: dict[str, Any] = {}
    for leaf in changed:
      if leaf.unchosen or base_values.get(leaf.path) == leaf.value:
        continue
      *parents, key = leaf.path.split('.')
      section = overrides
      for name in parents:
        section = section.setdefault(name, {})
      section[key] = leaf.value
    encoder = EncoderOptions(0 if self.num_layers == L else L, overrides)
    return dataclasses.replace(self, encoder=encoder)

  @property
  def halves(self) -> tuple[StackOptions, ...]:
    return self.encoder_half(), self

  @property
  def kernel_formats(self) -> dict[str, KernelFormat | None]:
    formats = super().kernel_formats
    encoder_format = self.encoder_half().moe.expert.format
    if encoder_format not in formats.values():
      formats['encoder.overrides.moe.expert.format'] = encoder_format
    return formats

  def problems(self) -> Iterator[str]:
    """The problems of the decoder's routers, and of the encoder's options."""
    yield from super().problems()
    yield from self.leak()
    if not self.attention.crosses:
      yield (
        f'attention.kind={ATTENTIONS.name_of(self.attention)!r} has no '
        'attention to an encoder'
      )
    try:
      half = self.encoder_half()
    except OptionError as error:
      yield from error.below('encoder.overrides: ').problems
      return
    yield from self.task_problems()
    if half.has_experts and self.has_experts:
      yield from _conflicts(half.moe, self.moe)
    for problem in self.half_problems(half, causal=False):
      yield f'encoder.overrides: {problem}'
    if half.attention.window:
      yield (
        f'encoder.overrides: attention.window={half.attention.window} has no '
        'effect in an encoder, whose tokens see their whole segment'
      )

  def problems_in(self, run: RunShape) -> Iterator[str]:
    yield from self.code_problems()
    half = self.encoder_half()
    for name, options in {'seq_len': half, 'target_len': self}.items():
      length = getattr(run, name)
      yield from self.position_problems(f'data.{name}', length)
      yield from options.group_problems(run, f'data.{name}', length)

  def least_parameters(self) -> int:
    half = self.encoder_half()
    return super().least_parameters() + self.half_parameters(half)

  def build(self, rules: Rules = RULES) -> EncoderDecoder:
    self.check_filled()
    half = self.encoder_half()
    embedding = dataclasses.replace(
      self.embedding_config(rules), encoder_dropout=half.dropout
    )
    return EncoderDecoder(
      embedding,
      self.stack_config(half, rules, causal=False),
      self.stack_config(self, rules, causal=True, cross=True),
    )

  def shrunk(self) -> Self:
    without_overrides = dataclasses.replace(self, encoder=EncoderOptions())
    small = super(EncoderDecoderOptions, without_overrides).shrunk()
    return small.with_encoder(self.encoder_half().shrunk())


def _conflicts(encoder: MoeOptions, decoder: MoeOptions) -> Iterator[str]:
  """The problems of options of which a model has one for all its layers."""
  weights = decoder.router.loss_weights()
  for loss, weight in encoder.router.loss_weights().items():
    if weights.get(loss, weight) != weight:
      name = loss.replace('_loss', '_weight')
      yield (
        f'encoder.overrides: {name}={weight} of the router, and '
        f'{weights[loss]} in the decoder; a model has one weight for the loss'
      )
  for name in ('layer_reduce', 'replay'):
    values = [getattr(moe, name) for moe in (encoder, decoder)]
    if values[0] != values[1]:
      yield (
        f'encoder.overrides: moe.{name}={values[0]!r}, and {values[1]!r} in '
        'the decoder; a model has one for both'
      )
