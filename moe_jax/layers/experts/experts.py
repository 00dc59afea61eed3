"""Experts, and the one function that applies them, `apply_experts`.

An expert's options give the module that applies E of them to groups of tokens:
the module makes parameters, and the function moves tokens to their experts as
the options of the dispatch say, multiplies, and sums outputs by their gates.
Every token also meets the shared expert, if a layer has one.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from moe_jax.config import Options, option
from moe_jax.errors import InputError
from moe_jax.kernels.kernel_format import KernelFormat
from moe_jax.kernels.rows_product import rows_matmul
from moe_jax.layers import parameters
from moe_jax.layers.experts import few_tokens
from moe_jax.layers.experts.dispatch_options import (
  SCOPE,
  Dispatch,
  Dropless,
  Gather,
)
from moe_jax.layers.ffn import ACTIVATIONS, FeedForward, FfnLayer, FfnOptions
from moe_jax.layers.shared import Shared
from moe_jax.parallel.gather_exchange import exchange_tokens
from moe_jax.parallel.layout import Layout, layout_of
from moe_jax.parallel.slot_exchange import StackedExperts, exchange_slots
from moe_jax.parallel.sorted_exchange import SortedExperts, exchange_sorted
from moe_jax.routing import AnyRouting, ExchangeStats
from moe_jax.shapes import Array, Float, PRNGKey, checked, type_text

# The name under which a remat policy finds the rows that experts multiply.
ROWS = 'expert_rows'
# The role of the parameters of experts.
ROLE = 'expert'
# The name of the shared expert's module, and the role of its parameters.
SHARED_EXPERT = 'shared_expert'


def apply_experts(
  ffn: FfnLayer,
  params: Any,
  x: Float[Array, 'G S M'],
  routing: AnyRouting,
  dispatch: Dispatch = Gather(),
  layout: Layout | None = None,
  next_key: Callable[[], PRNGKey | None] = lambda: None,
) -> tuple[Float[Array, 'G S M'], ExchangeStats | None]:
  """Moves tokens to their experts, applies the experts, and sums their outputs.

  All dispatches are equal in value and gradient on the same routing, but for
  the draws of dropout.

  Args:
    ffn: The computation of one feed-forward expert.
    params: The parameters, each [E, ...]; for `Unrolled`, a list with the
      parameters of each expert.
    x: Groups of tokens, in the model's dtype.
    routing: The experts and the gates of each token.
    dispatch: The options that say how tokens move and are multiplied.
    layout: The layout of groups and experts on a mesh; None on one device.
    next_key: A function that gives a new key of dropout at each call, or None
      where nothing is dropped.

  Returns:
    The gated sums, and counts of what moved between devices; None without a
    layout, and where steps of few tokens move nothing.
  """
  if isinstance(dispatch, few_tokens.Unrolled):
    fold = functools.partial(few_tokens.fold_unrolled, params)
    return few_tokens.apply_one_by_one(ffn, fold, x, routing), None
  if isinstance(dispatch, few_tokens.Batched) and few_tokens.are_few(x):
    return few_tokens.apply_all_experts(ffn, params, x, routing), None
  E, M, dtype = routing.num_experts, x.shape[-1], ffn.shared.dtype
  axes, sizes = ffn.axes((E,), M), ffn.sizes(M, jnp.dtype(dtype))
  if isinstance(dispatch, Dropless):

    def products(p, rows, sizes, key):
      rows = checkpoint_name(rows, ROWS)
      return ffn.compute_sorted(p, rows, sizes, key, dispatch.backend)

    by_row = SortedExperts(products, params, axes, sizes)
    x, key = x.astype(dtype), next_key()
    if layout is None:
      return by_row.summed(params, x, routing, key), None
    layout = _biases_once(layout, ffn)
    if layout.exchanged and dispatch.exchange.gathers:
      return exchange_tokens(
        by_row.summed, params, axes, x, routing, layout=layout, key=key
      )
    return exchange_sorted(
      by_row,
      x,
      routing,
      layout=layout,
      exchange=dispatch.exchange,
      shadowing=dispatch.shadowing,
      key=key,
    )

  if layout is not None and layout.exchanged and dispatch.exchange.gathers:
    to_slots: Any = dispatch

    def summed(params, x, routing, key):
      rows = to_slots.dispatcher.dispatch(x, routing)
      rows = checkpoint_name(rows, ROWS)
      rows = ffn.compute(params, rows, lambda h: ffn.dropped(h, key))
      return to_slots.dispatcher.combine(rows, routing)

    layout, key = _biases_once(layout, ffn), next_key()
    return exchange_tokens(
      summed, params, axes, x.astype(dtype), routing, layout=layout, key=key
    )

  def compute(params, rows):
    rows = checkpoint_name(rows, ROWS)
    return ffn.compute(params, rows, lambda h: ffn.dropped(h, next_key()))

  experts = StackedExperts(compute, params, axes, sizes)
  return _apply_in_slots(experts, x, routing, dispatch, layout)


def _biases_once(layout: Layout, ffn: FfnLayer) -> Layout:
  """The layout, without a split of the hidden width F where there are biases.

  Each device would add the whole bias to its part of the product, and the sum
  over devices would have it several times.
  """
  return dataclasses.replace(layout, hidden=()) if ffn.use_bias else layout


def _apply_in_slots(experts, x, routing, dispatch, layout):
  """Moves groups x to slots of experts, applies these, and sums the outputs.

  The result is the gated sums [G, S, M], and counts of what moved between
  devices, or None. `experts` are `StackedExperts`, called with rows [E, R, M].
  `dispatch` has slots; `layout` is that of groups and experts on a mesh, None
  on one device.
  """
  dispatcher = dispatch.dispatcher
  if layout is not None:
    return exchange_slots(
      experts,
      x,
      routing,
      layout=layout,
      dispatcher=dispatcher,
      exchange=dispatch.exchange,
      shadowing=dispatch.shadowing,
    )
  with jax.named_scope('dispatch'):
    rows = dispatcher.dispatch(x, routing)  # [E, R, M]
  rows = experts(rows)
  with jax.named_scope('combine'):
    return dispatcher.combine(rows, routing), None


class FeedForwardExperts(nn.Module):
  """E independent feed-forward layers.

  Every expert starts from its own draw, with the fan-in of one expert. With
  E = 1 this is a dense layer. The parameters are the same whatever the dispatch
  is, except that under `Unrolled` each expert has arrays of its own.

  Attributes:
    ffn: The computation of one expert.
    dispatch: The options that say how tokens move and are multiplied.
  """

  ffn: FfnLayer
  dispatch: Dispatch = Gather()

  @nn.compact
  @checked
  def __call__(
    self, x: Float[Array, 'G S M'], routing: AnyRouting, train: bool = False
  ) -> tuple[Float[Array, 'G S M'], ExchangeStats | None]:
    """Returns the gated sums of the experts' outputs for the groups x.

    The second result is counts of what moved between devices, or None. There is
    dropout only if `train`.
    """
    ffn, dispatch = self.ffn, self.dispatch
    E, M = routing.num_experts, x.shape[-1]
    if isinstance(dispatch, few_tokens.Unrolled):
      params = [
        few_tokens.OneExpert(ffn, name=few_tokens.own_name(e))(M)
        for e in range(E)
      ]
    else:
      params = ffn.parameters(self, (E,), M)
    # The dropout of rows in slots draws its keys in a submodule.
    module = ffn.dropout_module(self, train) if dispatch.by_slot else self

    def next_key():
      return module.make_rng('dropout') if train and ffn.dropout else None

    layout = _layout(self, ffn.shared, x, E, ffn.options.hidden)
    return apply_experts(ffn, params, x, routing, dispatch, layout, next_key)


def _layout(module, shared, x, num_experts, hidden=1) -> Layout | None:
  """The layout of groups x [G, S, M] and E experts on a mesh.

  None on one device, and during the initialisation of `module`. `hidden` is the
  hidden width F of an expert; 1 where it is not to be split.
  """
  if module.is_initializing():
    return None
  return layout_of(shared.rules, x, num_experts=num_experts, hidden=hidden)


class Twin(NamedTuple):
  """A dense layer that replaces experts in a dense twin, or is a shared expert.

  Attributes:
    ffn: The width and activation of the layer.
    dropout: The rate at which its hidden values are dropped in training.
  """

  ffn: FfnOptions
  dropout: float

  def of_width(self, hidden: int) -> 'Twin':
    """The same dense layer with another hidden width."""
    return self._replace(ffn=dataclasses.replace(self.ffn, hidden=hidden))


class ExpertOptions(Options):
  """The base of the options of all kinds of expert.

  A subclass defines `module`, or `experts` if its experts are applied in a way
  of their own.

  Attributes:
    has_width: Whether an expert is a feed-forward, so that a dense layer of
      some width (`twin`) is its equivalent and can be a shared expert.
    format: The storage of the experts' quantised kernels; None where kernels
      are not quantised.
  """

  has_width: ClassVar[bool] = False
  format: ClassVar[KernelFormat | None] = None

  def within(self, ffn: FfnOptions, dropout: float) -> 'ExpertOptions':
    """The expert's options, with defaults filled in from the model's options.

    Args:
      ffn: The dense feed-forward layers of the model.
      dropout: The model's rate of dropout.
    """
    return self

  def problems_with(self, dispatch: Dispatch) -> Iterator[str]:
    """The reasons why a dispatch cannot serve these experts, as texts."""
    if not dispatch.by_slot:
      yield (
        f'dispatch={type(dispatch).__name__} serves no experts of '
        f'{type(self).__name__}: it has no rows [E, R, M]; use Gather'
      )
    elif dispatch.exchange.gathers:
      yield (
        f'experts of {type(self).__name__} are modules, whose rows have to '
        'travel: set exchange.kind to another one than an all-gather'
      )

  def module(self, shared: Shared, name: str) -> nn.Module:
    """One expert: a linen module, called as (rows [R, M], train) -> rows."""
    raise NotImplementedError

  def call(
    self, module: nn.Module, rows: Float[Array, 'R M'], train: bool
  ) -> Float[Array, 'R M']:
    """The output of one expert, a module that `module` made, for its rows.

    `train` turns on its dropout.
    """
    return module(rows, train)

  def experts(self, dispatch: Dispatch, shared: Shared) -> nn.Module:
    """The module that applies E such experts to groups, named `SCOPE`.

    The module is called as (groups [G, S, M], routing, train) and returns
    groups, and counts of what moved between devices, or None.
    """
    return ModuleExperts(self, dispatch, shared, name=SCOPE)

  def twin(self, num_selected: int) -> Twin:
    """The dense layer with the FLOPs per token of `num_selected` experts.

    Raises:
      ValueError: These experts have no dense equivalent.
    """
    name = type(self).__name__
    raise InputError(f'{name} has no dense twin: give it a method `twin`')


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
    return iter(())

  def ffn(self, shared: Shared) -> FfnLayer:
    """The computation of one expert; `within` must have filled in defaults."""
    return FfnLayer(self.twin(1).ffn, shared, self.dropout, ROLE)

  def experts(self, dispatch: Dispatch, shared: Shared) -> nn.Module:
    return FeedForwardExperts(self.ffn(shared), dispatch, name=SCOPE)

  def twin(self, num_selected: int) -> Twin:
    """The dense layer that is `num_selected` times as wide as an expert."""
    width = self.hidden * num_selected
    return Twin(FfnOptions(width, self.activation, self.bias), self.dropout)

  def shrunk(self) -> Self:
    return dataclasses.replace(self, hidden=40 if self.hidden else 0)


@dataclasses.dataclass(frozen=True)
class ModuleExpert(ExpertOptions):
  """Experts that are copies of a linen module, called as module(rows [R, M]).

  This class is for callers in Python; a config needs a class that extends
  `ExpertOptions`.

  Attributes:
    expert: The module that is copied.
  """

  expert: nn.Module

  def module(self, shared: Shared, name: str) -> nn.Module:
    """A copy of the module, which does not receive `shared`."""
    return self.expert.copy(name=name)

  def call(self, module, rows, train):
    """The output of the module, which is not told `train`."""
    return module(rows)


class ModuleExperts(nn.Module):
  """E copies of any module, each initialised independently.

  Attributes:
    options: The options of one expert.
    dispatch: The options of the dispatch, which must move tokens into slots.
    shared: The settings that all layers of the model share.
  """

  options: ExpertOptions
  dispatch: Dispatch
  shared: Shared

  @nn.compact
  @checked
  def __call__(
    self, x: Float[Array, 'G S M'], routing: AnyRouting, train: bool = False
  ) -> tuple[Float[Array, 'G S M'], ExchangeStats | None]:
    """Moves tokens to the E experts, applies these, and sums their outputs.

    The second result is counts of what moved between devices, or None.
    """
    module = self.options.module(self.shared, name='expert')

    @functools.partial(
      nn.vmap,
      axis_size=routing.num_experts,
      variable_axes={'params': 0},
      split_rngs={'params': True, 'dropout': True, 'router': True},
      metadata_params={nn.PARTITION_NAME: 'expert'},
    )
    def call(module, rows):
      y = self.options.call(module, rows, train)
      return _as_rows(type(module).__name__, y, rows)

    experts = StackedExperts(lambda _, rows: call(module, rows), {}, {}, None)
    layout = _layout(self, self.shared, x, routing.num_experts)
    output = _apply_in_slots(experts, x, routing, self.dispatch, layout)
    if self.is_initializing():
      own = self.variables['params']
      own = parameters.with_role(own, ROLE, stacked=('expert',))
      for name, subtree in own.items():
        self.put_variable('params', name, subtree)
    return output


def _as_rows(name: str, y: Any, rows: Array) -> Array:
  """An expert's output y in the type of its rows [R, M].

  The name of the expert's class is for messages.

  Raises:
    ValueError: The output is no array of numbers with a fraction, or has
      another shape than the rows.
  """
  is_real = jnp.issubdtype(getattr(y, 'dtype', np.int32), jnp.floating)
  if not (is_real and y.shape == rows.shape):
    raise InputError(
      f'expert {name} returned {type_text(y)} for rows {type_text(rows)}; an '
      'expert returns rows [R, M] of the same shape'
    )
  return y.astype(rows.dtype)


@dataclasses.dataclass(frozen=True)
class SharedExpertOptions(Options):
  """Options of the expert that serves every token of a sparse layer."""

  hidden: int = option(
    0,
    'Width of the hidden layer of the shared expert, which has the activation '
    'and the dropout of the other experts. Several shared experts are one of '
    "their widths together (DeepSeek checkpoints' n_shared_experts times "
    'moe_intermediate_size; shared_expert_intermediate_size in Qwen2-MoE); 0: '
    'there is none.',
    minimum=0,
  )
  gated: bool = option(
    False,
    "Whether the shared expert's output for a token is multiplied by the "
    'sigmoid of a learned product with the token (Qwen2-MoE).',
  )

  def problems(self) -> Iterator[str]:
    if not self.hidden:
      yield from self.in_vain('unless hidden is at least 1')

  def shrunk(self) -> Self:
    return dataclasses.replace(self, hidden=40 if self.hidden else 0)


class SharedExpert(nn.Module):
  """A feed-forward for every token, times a sigmoid gate if `options.gated`.

  Its output is added to that of the chosen experts (section 3.2 of
  arXiv:2401.06066), so that several shared experts are the same as one expert
  whose width is the sum of theirs.

  Attributes:
    options: The options of the expert.
    twin: The feed-forward layer that the expert is.
    shared: The settings that all layers of the model share.
  """

  options: SharedExpertOptions
  twin: Twin
  shared: Shared = Shared()

  @nn.compact
  @checked
  def __call__(
    self, x: Float[Array, 'B T M'], train: bool = False
  ) -> Float[Array, 'B T M']:
    """Returns the expert's output for every token; dropout only if `train`."""
    ffn, dropout = self.twin
    dtype = self.shared.dtype
    layer = FeedForward(ffn, self.shared, dropout, SHARED_EXPERT, name='ffn')
    y = layer(x.astype(dtype), train)
    if not self.options.gated:
      return y
    init = parameters.kernel(self.shared, ('embed', None), role=SHARED_EXPERT)
    w = self.param('w_gate', init, (x.shape[-1], 1), self.shared.param_dtype)
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    w, precision = w.astype(jnp.float32), jax.lax.Precision.HIGHEST
    logit = rows_matmul(rows, w, precision).reshape(*x.shape[:-1], 1)
    return y * jax.nn.sigmoid(logit).astype(dtype)
