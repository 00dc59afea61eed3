"""Models whose experts are in codes of few bits, and the same as numbers."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

from moe_jax.errors import InputError
from moe_jax.layers.experts import (
  EXPERTS,
  ExpertOptions,
  FeedForwardExpert,
  QuantizedExpert,
)
from moe_jax.layers.kernel_format import KernelFormat
from moe_jax.models.encoder_decoder_options import EncoderDecoderOptions
from moe_jax.models.flat_trees import Path
from moe_jax.models.model_options import ModelOptions
from moe_jax.models.parameter_trees import describe
from moe_jax.models.stack_options import StackOptions
from moe_jax.models.transformer_options import TransformerOptions
from moe_jax.options import fields_of


class Coded(NamedTuple):
  """A kernel that is stored in codes.

  Attributes:
    shape: The shape [*E, I, O] of the kernel as a plain parameter.
    format: The format of the codes.
  """

  shape: tuple[int, ...]
  format: KernelFormat


def with_formats(
  options: ModelOptions, experts: KernelFormat | None = None
) -> TransformerOptions:
  """The same model with another format of experts; None: without codes.

  Raises:
    ValueError: The model is no Transformer, or its experts are of a kind that
      is not stored in codes.
  """
  if not isinstance(options, TransformerOptions):
    raise InputError(
      f'{type(options).__name__}: models of Transformer blocks alone have '
      'kernels in codes of few bits'
    )
  changed = _with_expert_format(options, experts)
  if isinstance(options, EncoderDecoderOptions):
    half = _with_expert_format(options.encoder_half(), experts)
    return cast(EncoderDecoderOptions, changed).with_encoder(half)
  return cast(TransformerOptions, changed)


def _with_expert_format(options: StackOptions, format: KernelFormat | None):
  moe = options.moe
  if options.has_experts:
    expert = _expert_in_format(moe.expert, format)
    moe = dataclasses.replace(moe, expert=expert)
  return dataclasses.replace(options, moe=moe)


def _expert_in_format(
  expert: ExpertOptions, format: KernelFormat | None
) -> FeedForwardExpert:
  if type(expert) not in (FeedForwardExpert, QuantizedExpert):
    raise InputError(
      f'experts of the kind {EXPERTS.name_of(expert)!r} are not stored in '
      f'codes; have {[*EXPERTS.builtin]}'
    )
  fields = {
    name: getattr(expert, name) for name in fields_of(FeedForwardExpert)
  }
  if format is None:
    return FeedForwardExpert(**fields)
  return QuantizedExpert(**fields, format=format)


def has_codes(options: ModelOptions) -> bool:
  """Whether some kernels of a model are stored in codes."""
  if not isinstance(options, TransformerOptions):
    return False
  return any(options.kernel_formats.values())


def check_plain(options: ModelOptions, name: object) -> None:
  """Raises ValueError where some kernels of the model `name` are in codes."""
  if has_codes(options):
    raise InputError(
      f'{name} has kernels in codes of few bits, which this cannot read; give '
      'the run that they were made of'
    )


def coded_kernels(options: TransformerOptions) -> dict[Path, Coded]:
  """The kernels of a model that are stored in codes, by their paths.

  Args:
    options: The options, with the sizes that the data decides.
  """
  plain = describe(with_formats(options).build())
  model = options.build()
  expert_formats = [
    (stack, half.moe.expert.format)
    for (stack, _), half in zip(model.stacks, options.halves, strict=True)
  ]
  kernels: dict[Path, Coded] = {}

  def walk(path: Path, node: Any, stored: Any) -> None:
    if isinstance(node, Mapping):
      for name, subtree in node.items():
        walk((*path, name), subtree, stored[name])
    elif isinstance(stored, Mapping):
      format = next(f for s, f in expert_formats if path[: len(s)] == s)
      kernels[path] = Coded(node.shape, cast(KernelFormat, format))

  walk((), plain.shapes, describe(model).shapes)
  return kernels


def decoded(
  options: TransformerOptions, params: Mapping[str, Any]
) -> tuple[TransformerOptions, dict[str, Any]]:
  """The same model with kernels that are stored as they are.

  Args:
    options: The options of a model with kernels in codes.
    params: The model's parameters, unboxed.

  Returns:
    The options of the model without codes, and its parameters, of the type
    param_dtype.
  """
  kernels, dtype = coded_kernels(options), options.numerics.param_dtype

  def walk(path: Path, node: Any) -> Any:
    if path in kernels:
      kernel = kernels[path]
      return kernel.format.decoded(node, kernel.shape[-2]).astype(dtype)
    if isinstance(node, Mapping):
      return {
        name: walk((*path, name), subtree) for name, subtree in node.items()
      }
    return node

  return with_formats(options), walk((), params)
