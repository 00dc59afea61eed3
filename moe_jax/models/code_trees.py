"""Models whose experts are quantised, and the same models dequantised.

A quantised kernel is stored in codes, integers of few bits.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moe_jax.config import fields_of
from moe_jax.errors import InputError
from moe_jax.kernels.kernel_format import KernelFormat
from moe_jax.layers.experts import EXPERTS, FeedForwardExpert, QuantizedExpert
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.models.base import ModelOptions
from moe_jax.models.expert_arrays import with_moes
from moe_jax.models.layer_options import LayerOptions


def with_formats(
  options: ModelOptions, experts: KernelFormat | None = None
) -> ModelOptions:
  """The options of the same model with its experts in another format.

  Args:
    options: The options of the model.
    experts: The format of quantised experts; None: experts are not quantised.

  Raises:
    ValueError: The model is no Transformer, or its experts are of a kind that
      cannot be quantised.
  """
  if not options.has_blocks:
    raise InputError(
      f'{type(options).__name__}: models of Transformer blocks alone have '
      'kernels in codes of few bits'
    )

  def changed(_: int, half: LayerOptions) -> MoeOptions:
    if not half.has_experts:
      return half.moe
    expert = half.moe.expert
    if type(expert) not in (FeedForwardExpert, QuantizedExpert):
      raise InputError(
        f'experts of the kind {EXPERTS.name_of(expert)!r} are not stored in '
        f'codes; have {[*EXPERTS.builtin]}'
      )
    names = fields_of(FeedForwardExpert)
    expert = FeedForwardExpert(
      **{name: getattr(expert, name) for name in names}
    )
    if experts is not None:
      expert = QuantizedExpert(**vars(expert), format=experts)
    return dataclasses.replace(half.moe, expert=expert)

  return with_moes(options, changed)


def has_codes(options: ModelOptions) -> bool:
  """Whether some kernels of a model are quantised."""
  return options.has_blocks and any(
    half.moe.expert.format for half in options.halves
  )


def check_plain(options: ModelOptions, name: object) -> None:
  """Raises ValueError where some kernels of the model `name` are quantised.

  Compression calls this, as it cannot read codes.
  """
  if has_codes(options):
    raise InputError(
      f'{name} has kernels in codes of few bits, which this cannot read; give '
      'the run that they were made of'
    )


def decoded(
  options: ModelOptions, params: Mapping[str, Any]
) -> tuple[ModelOptions, dict[str, Any]]:
  """Dequantises the experts of a model.

  Args:
    options: The options of the model.
    params: The model's parameters, unboxed; all its quantised experts have the
      same format.

  Returns:
    The options of the model without quantisation, and its parameters; those of
    the dequantised experts have the type `param_dtype`.
  """
  formats = {half.moe.expert.format for half in options.halves}
  (format,) = filter(None, formats)

  def walk(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
      return tree
    if isinstance(tree.get('w_out'), Mapping):
      p = format.decoded_experts(tree)
      return {
        name: x.astype(options.numerics.param_dtype) for name, x in p.items()
      }
    return {name: walk(subtree) for name, subtree in tree.items()}

  return with_formats(options), walk(params)
