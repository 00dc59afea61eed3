"""Parameters and FLOPs of a model, counted from its shapes and options.

Nothing is measured, and nothing is read from a compiled program.
"""

import dataclasses
from collections.abc import Iterable

from moe_jax.analysis.model_parts import (
  Half,
  SizedParameter,
  group_size,
  halves,
  is_dropless,
  sized_parameters,
)
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.models import Model

_UNITS = (('P', 1e15), ('T', 1e12), ('B', 1e9), ('M', 1e6), ('k', 1e3))


@dataclasses.dataclass(frozen=True)
class TokenFlops:
  """FLOPs of the forward pass for one token; a multiply-add is two FLOPs.

  Attributes:
    products: FLOPs of the products with all kernels but the experts' and the
      routers'.
    experts: FLOPs of the products with the kernels of the K experts that the
      token chooses. Slots that stay empty are not counted.
    router: FLOPs of the products with the routers' kernels.
    attention: FLOPs of attention's scores and weighted sums over the whole
      sequence. They are not halved where attention is causal, nor cut to a
      window.
  """

  products: int = 0
  experts: int = 0
  router: int = 0
  attention: int = 0

  @property
  def total(self) -> int:
    """The sum of the four attributes."""
    return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Cost:
  """The parameters and the FLOPs of one model.

  Attributes:
    total_params: Number of all parameters.
    active_params: Number of the parameters that compute one token: all but
      those of the E - K experts in each layer that it does not choose.
    expert_params: Number of the parameters of all experts together.
    embedding_params: Number of the parameters of the tables that are indexed
      by token or position.
    decoder: FLOPs for a token of the decoder, or of a model without encoder.
    encoder: FLOPs for a token that an encoder reads; None in a model without
      encoder. The decoder's cross-attention makes keys and values of each such
      token once, which is counted here.
    decoder_len: Number of tokens of the decoder in an example.
    encoder_len: Number of tokens that the encoder reads in an example; 0 in a
      model without encoder.
    capacity_slack: Number of rows that experts multiply for each choice of an
      expert, in full groups: E * slots / (K * tokens). Below 1.0 some choices
      are dropped for certain. It is 1.0 in dense and dropless models.
    step_attention: FLOPs of attention's scores and weighted sums for a
      generated token. Latent attention does not expand what is in the cache.
  """

  total_params: int
  active_params: int
  expert_params: int
  embedding_params: int
  decoder: TokenFlops
  encoder: TokenFlops | None
  decoder_len: int
  encoder_len: int
  capacity_slack: float
  step_attention: int = 0

  @property
  def example_flops(self) -> int:
    """FLOPs of the forward pass for an example, an encoder's included."""
    return self._per_example('total')

  @property
  def forward_flops(self) -> int:
    """FLOPs of the forward pass for a token, averaged over an example."""
    return self.example_flops // (self.encoder_len + self.decoder_len)

  @property
  def router_flops(self) -> int:
    """The routers' part of `forward_flops`."""
    return self._per_example('router') // (self.encoder_len + self.decoder_len)

  @property
  def training_flops(self) -> int:
    """FLOPs of both passes for a token: three times those of the forward."""
    return 3 * self.forward_flops

  @property
  def prefill_flops(self) -> int:
    """FLOPs for each token that is read before the first one is generated."""
    return (self.encoder or self.decoder).total

  @property
  def decode_flops(self) -> int:
    """FLOPs for a generated token, with a cache as long as an example."""
    return self.decoder.total - self.decoder.attention + self.step_attention

  @property
  def computed_flops(self) -> int:
    """FLOPs of the forward pass for an example, those of empty slots too."""
    empty = (self.capacity_slack - 1) * self._per_example('experts')
    return self.example_flops + round(empty)

  def describe(self) -> str:
    """The counts in two or three lines for a person."""
    lines = [
      f'parameters: {short(self.total_params)} in all, '
      f'{short(self.active_params)} active per token, '
      f'{short(self.expert_params)} in experts',
      f'FLOPs per token: {short(self.forward_flops)} forward, '
      f'{short(self.training_flops)} in training',
    ]
    if self.expert_params:
      lines[-1] += (
        f' (routers have {self.router_flops / self.forward_flops:.1%} of them; '
        f'experts multiply {self.capacity_slack:.2f} rows for each choice)'
      )
    if self.encoder:
      lines.append(
        f'FLOPs forward: {short(self.encoder.total)} for a token of the '
        f'encoder, {short(self.decoder.total)} for one of the decoder, '
        f'{short(self.example_flops)} for an example of {self.encoder_len} and '
        f'{self.decoder_len} tokens'
      )
    return '\n'.join(lines)

  def _per_example(self, part: str) -> int:
    encoder_flops = getattr(self.encoder, part) if self.encoder else 0
    decoder_flops = getattr(self.decoder, part)
    return self.encoder_len * encoder_flops + self.decoder_len * decoder_flops


def count(
  model: Model, seq_len: int, target_len: int = 0, batch_size: int = 1
) -> Cost:
  """Counts the parameters and the FLOPs of a model of tokens.

  Args:
    model: The model.
    seq_len: Number of tokens of a row; of an encoder-decoder, of the encoder's
      row.
    target_len: Number of tokens of a decoder's row in an encoder-decoder; 0
      stands for `seq_len`.
    batch_size: Number of rows in a batch, which matters where a whole batch is
      one routing group.
  """
  parameters, width = sized_parameters(model), model.embedding.width
  stacks = halves(model, seq_len, target_len) if model.stacks else []
  if stacks:
    flops = [_flops_of_half(parameters, half, width) for half in stacks]
    decoder_len, memory_len = stacks[-1].length, stacks[-1].memory_len
  else:
    layers = [p for p in parameters if not p.outside_layers]
    moes = [moe for moe in model.moes if moe is not None]
    flops = [_products(layers, moes, width)]
    decoder_len, memory_len = seq_len, 0
  cross_flops = sum(_memory_flops(half, width) for half in stacks)
  logit_flops = 2 * model.vocab_size * width
  flops[-1] = _with_products(flops[-1], logit_flops - cross_flops)
  if memory_len:
    flops[0] = _with_products(flops[0], cross_flops)
  experts = _size(p for p in parameters if p.of_expert)
  total = _size(parameters)
  return Cost(
    total_params=total,
    active_params=total - experts + _active(model, parameters, stacks),
    expert_params=experts,
    embedding_params=_size(p for p in parameters if p.role.role == 'embedding'),
    decoder=flops[-1],
    encoder=flops[0] if memory_len else None,
    decoder_len=decoder_len,
    encoder_len=memory_len,
    capacity_slack=_slack(model, stacks, batch_size, seq_len),
    step_attention=_step_attention(stacks[-1], width) if stacks else 0,
  )


def short(n: float | int) -> str:
  """A number with three digits and a letter: 46702792704 is '46.7B'."""
  for unit, size in _UNITS:
    if n >= size:
      return f'{n / size:.3g}{unit}'
  return f'{n:.0f}'


def _size(parameters: Iterable[SizedParameter]) -> int:
  return sum(p.size for p in parameters)


def _active(
  model: Model, parameters: list[SizedParameter], stacks: list[Half]
) -> int:
  """The parameters of the experts that a token chooses, in all layers."""
  if not stacks:
    return _chosen(parameters, [moe for moe in model.moes if moe is not None])
  return sum(_chosen(_of_stack(parameters, half), half.moes) for half in stacks)


def _flops_of_half(
  parameters: list[SizedParameter], half: Half, width: int
) -> TokenFlops:
  """FLOPs of a stack's own parameters, all of them for its own tokens."""
  a, layers = half.stack.block.attention.within(width), len(half.stack.sparse)
  flops = _products(_of_stack(parameters, half), half.moes, width)
  scores = 2 * layers * half.keys * a.scoring_products
  return dataclasses.replace(flops, attention=scores)


def _step_attention(half: Half, width: int) -> int:
  """FLOPs of attention in all layers for a token that is generated."""
  a, layers = half.stack.block.attention.within(width), len(half.stack.sparse)
  return 2 * layers * half.keys * a.decoding_products


def _of_stack(
  parameters: list[SizedParameter], half: Half
) -> list[SizedParameter]:
  """The parameters of a stack."""
  n = len(half.path)
  return [
    p for p in parameters if p.path[:n] == half.path and not p.outside_layers
  ]


def _products(
  parameters: list[SizedParameter],
  moes: list[MoeOptions],
  width: int,
) -> TokenFlops:
  """FLOPs of the products with the kernels of layers, for one token.

  Args:
    parameters: The parameters of the layers.
    moes: The mixtures of the layers that have experts.
    width: M, the width of the residual stream.
  """
  kernels = [p for p in parameters if p.role.form == 'kernel']
  dense = (p for p in kernels if not (p.of_expert or p.role.role == 'router'))
  router = sum(moe.router.multiply_adds(moe.sizes, width) for moe in moes)
  return TokenFlops(
    products=2 * _size(dense),
    experts=2 * _chosen(kernels, moes),
    router=2 * router,
  )


def _chosen(parameters: list[SizedParameter], moes: list[MoeOptions]) -> int:
  """The number of these parameters that belong to a token's K experts."""
  if not moes:
    return 0
  expert_size = sum(p.size // p.num_experts for p in parameters if p.of_expert)
  return expert_size * moes[0].num_selected


def _with_products(flops: TokenFlops, extra_flops: int) -> TokenFlops:
  return dataclasses.replace(flops, products=flops.products + extra_flops)


def _memory_flops(half: Half, width: int) -> int:
  """FLOPs of cross-attention's keys and values, for a token of the encoder."""
  if not half.stack.block.cross:
    return 0
  a = half.stack.block.attention.within(width)
  return 2 * len(half.stack.sparse) * width * a.cached_values


def _slack(
  model: Model, stacks: list[Half], batch_size: int, seq_len: int
) -> float:
  """Rows that experts multiply over choices, in the layers with experts."""
  if model.moe is None:
    return 1.0
  if not stacks:
    return _rows(model.moe, batch_size, seq_len) / model.moe.num_selected
  rows = choices = 0.0
  for half in stacks:
    for moe in half.moes:
      rows += half.length * _rows(moe, batch_size, half.length)
      choices += half.length * moe.num_selected
  return rows / choices


def _rows(moe: MoeOptions, batch_size: int, length: int) -> float:
  """Rows that the experts of a layer multiply, for each token."""
  S = group_size(moe, batch_size, length)
  slots = moe.expert_slots(moe.router.training_slots(moe.sizes, S), S)
  rows = slots * moe.num_retained / S
  return min(rows, float(moe.num_selected)) if is_dropless(moe) else rows
