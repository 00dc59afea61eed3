"""The sparse layer: it groups tokens, routes them and calls the experts.

This file alone forms groups. The layer's options are in `moe_options.py`. The
rules of routing are `moe_jax.routing`; moving tokens and multiplying them is
`moe_jax.layers.experts`.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from moe_jax.errors import InputError
from moe_jax.layers.experts.experts import SHARED_EXPERT, SharedExpert
from moe_jax.layers.ffn import FfnOptions
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.routers import ROUTERS
from moe_jax.layers.routers.contract import CHOICES, NOISE, SOWN, TokenInfo
from moe_jax.layers.shared import Shared
from moe_jax.routing import (
  AnyRouting,
  ExchangeStats,
  GivenChoices,
  MoeAux,
  Routing,
  to_experts,
)
from moe_jax.routing.rows import without_nan
from moe_jax.routing.rules_without_logits import AT_RANDOM, forced_choices
from moe_jax.shapes import Array, Bool, Float, Int, Shaped, checked, type_text


class MoE(nn.Module):
  """Routes every token to K of E experts and sums their gated outputs.

  The output of the shared expert is added, if there is one. Without a shared
  expert, a token that all its experts dropped gets zeros, and the residual
  alone carries it.

  Parameters are boxed with the names of their axes, so that an `nn.scan` over
  this module needs `metadata_params={nn.PARTITION_NAME: None}`, or the name of
  an axis.

  Attributes:
    options: The options of the layer. Experts' defaults that no model has
      filled in by `within` are those of `FfnOptions()`, without dropout.
    shared: The settings that all layers of the model share.
  """

  options: MoeOptions
  shared: Shared = Shared()

  if TYPE_CHECKING:  # flax says that it returns a pair of other types

    def apply(self, *args: Any, **kwargs: Any) -> Any: ...

  @nn.compact
  @checked
  def __call__(
    self,
    x: Float[Array, 'B T M'],
    token_mask: Bool[Array, 'B T'] | None = None,
    train: bool = False,
    token_info: TokenInfo = TokenInfo(),
    layer: int | Int[Array, ''] = 0,
    given: GivenChoices | None = None,
  ) -> tuple[Float[Array, 'B T M'], MoeAux]:
    """Returns the output and the unweighted losses and statistics.

    Args:
      x: Token representations, of any float type.
      token_mask: False for tokens that no router sees: these tokens take no
        slot and get zeros, and their values, even NaN, reach no other token and
        no gradient. Default: routers see all tokens.
      train: Turns on router noise and dropout (rngs 'router', 'dropout').
      token_info: The arrays that the router's options name in `reads`.
      layer: The index of the layer; routers without parameters choose other
        experts in each layer.
      given: Choices [B, T, K] imposed on the router; None: it chooses itself.
    """
    _check_options(self.options)
    o = self.options.within(FfnOptions(), 0.0)
    B, T = x.shape[:2]
    if token_mask is None:
      token_mask = jnp.ones((B, T), bool)
    else:
      x = without_nan(token_mask, x)
    groups, mask = to_groups(x, token_mask, o.group_size)
    _check_groups(o, groups.shape[1], T)
    token_info = jax.tree.map(
      lambda x: in_groups(x, groups.shape[1]), token_info
    )
    sizes = dataclasses.replace(o.sizes, row_length=T)
    router = o.router.module(sizes, self.shared, name='router')
    given = self._imposed_choices(given, mask, train, layer)
    routing, aux = router(groups, mask, train, token_info, layer, given)
    if o.retained.rows:
      routing = _to_merged(o, routing, layer)
    if self.is_mutable_collection(SOWN):
      choices = routing.by_token(mask)
      self.sow(SOWN, CHOICES, jax.tree.map(lambda x: to_rows(x, B, T), choices))
    routing = self._mask_outputs(routing, train)
    experts = o.expert.experts(o.dispatch, self.shared)
    groups = groups.astype(self.shared.dtype)
    y, moved = _result_of(experts, groups, experts(groups, routing, train))
    if moved is not None:
      aux = aux._replace(exchange=moved)
    y = to_rows(y, B, T)
    if (twin := o.shared_twin) is not None:
      expert = SharedExpert(
        o.shared_expert, twin, self.shared, name=SHARED_EXPERT
      )
      # A shared expert with biases has an output for tokens that no router
      # sees; the mask makes it zero.
      y = y + jnp.where(token_mask[..., None], expert(x, train), 0)
    return y, aux

  def _imposed_choices(self, given, mask, train, layer):
    """The choices imposed by `given` or by the option `force_balance`, or None.

    `given` has [B, T, K], and the result [G, S, K]. The mask [G, S] is True at
    real tokens, and `layer` is the index of the layer. If not `train`, random
    choices are the same in each call. Raises ValueError if both impose choices,
    or none can be imposed on merged experts.
    """
    o, kind = self.options, self.options.force_balance
    if given is not None:
      if o.retained.rows:
        raise InputError(f'the batch gives choices: {o.replays()}')
      if kind:
        raise InputError(
          f'force_balance={kind!r}, and the batch gives choices, too'
        )
      return jax.tree.map(lambda x: in_groups(x, mask.shape[1]), given)
    if not kind:
      return None
    E, K = o.num_experts, o.num_selected
    key = self.make_rng(NOISE) if train and kind == AT_RANDOM else None
    return forced_choices(kind, mask, E, K, layer, key)

  def _mask_outputs(self, routing, train):
    """The routing with gates set to 0 at random, at the rate `output_masking`.

    If not `train`, each gate is multiplied by the probability with which
    training does not mask it.
    """
    rate = self.options.output_masking
    if not rate:
      return routing
    scale = 1.0 - rate
    if train:
      key, shape = self.make_rng(NOISE), routing.gate.shape
      scale = jax.random.bernoulli(key, scale, shape).astype(jnp.float32)
    return dataclasses.replace(routing, gate=routing.gate * scale)


def _check_options(options: Any) -> None:
  """Raises ValueError unless these are the options of a layer with experts."""
  if not isinstance(options, MoeOptions):
    raise InputError(
      f'options is a {type(options).__name__}, not MoeOptions, which hold the '
      'router, the experts and the dispatch: MoE(MoeOptions(router=...))'
    )
  if not options.num_experts:
    raise InputError(
      'num_experts=0 is the dense twin, a FeedForward of `options.twin()`; '
      'a mixture has at least 1'
    )


def _check_groups(options: MoeOptions, group_size: int, length: int) -> None:
  """Raises ValueError where a router would mix tokens of several sequences."""
  if options.router.mixes and group_size > length:
    raise InputError(
      f'group_size={options.group_size}: the {group_size} tokens of a group '
      f'are several rows of {length}, and router.kind='
      f'{ROUTERS.name_of(options.router)!r} would mix them; use 0 or a divisor '
      'of the length'
    )


def _result_of(
  experts: nn.Module, groups: Float[Array, 'G S M'], result: Any
) -> tuple[Float[Array, 'G S M'], ExchangeStats | None]:
  """The `result` of experts: outputs for the groups, and counts of exchanges.

  Raises ValueError if it is no such pair, or the outputs have a wrong shape.
  """
  y = result[0] if isinstance(result, tuple) and len(result) == 2 else None
  if getattr(y, 'shape', None) != groups.shape:
    raise InputError(
      f'{type(experts).__name__} returned {type_text(result)}; experts return '
      f'(groups of shape {groups.shape}, ExchangeStats or None)'
    )
  return result


def _to_merged(
  options: MoeOptions, chosen: AnyRouting, layer: int | Int[Array, '']
) -> Routing:
  """Turns choices of router columns into choices of merged experts.

  A router has a column for each expert that there was before merging; the
  option `retained` says to which merged expert each column leads. `layer` is
  the index of the layer.
  """
  chosen, rows = cast(Routing, chosen), options.retained.rows
  table = np.zeros((max(rows) + 1, options.num_experts), np.int32)
  table[list(rows)] = list(rows.values())
  slots = chosen.capacity
  if slots is not None:
    slots = options.expert_slots(slots, chosen.group_size)
  return to_experts(
    chosen,
    jnp.asarray(table)[layer],
    num_experts=options.num_retained,
    capacity=slots,
  )


def to_groups(
  x: Float[Array, 'B T M'], token_mask: Bool[Array, 'B T'], group_size: int
) -> tuple[Float[Array, 'G S M'], Bool[Array, 'G S']]:
  """Cuts x and its mask into groups of consecutive tokens, in order.

  Tokens with mask False fill up the last group. A `group_size` of 0 stands for
  T, and -1 for the whole batch.

  Raises:
    ValueError: group_size neither divides T nor is a multiple of it.
  """
  B, T = token_mask.shape
  S = B * T if group_size == -1 else group_size or T
  if T % S and S % T:
    raise InputError(
      f'group_size={S} is neither a divisor nor a multiple of seq_len={T}'
    )
  return in_groups(x, S), in_groups(token_mask, S)


def to_rows(
  values: Shaped[Array, 'G S N'], batch_size: int, length: int
) -> Shaped[Array, 'B T N']:
  """Undoes `in_groups`, for values of N numbers a token.

  The function flattens the groups in order, drops the tokens that were added to
  fill the last group, and reshapes to [B, T, N]. B is `batch_size`, T `length`.
  """
  values = values.reshape(-1, values.shape[-1])[: batch_size * length]
  return values.reshape(batch_size, length, -1)


def in_groups(
  values: Shaped[Array, 'B T ...'], group_size: int
) -> Shaped[Array, 'G S ...']:
  """Cuts values of tokens, in order, into groups; zeros fill up the last."""
  values = values.reshape(-1, *values.shape[2:])
  padding = [(0, -len(values) % group_size), *[(0, 0)] * (values.ndim - 1)]
  return jnp.pad(values, padding).reshape(-1, group_size, *values.shape[1:])
