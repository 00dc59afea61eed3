"""Parameters and FLOPs, counted from a model's config and parameters' shapes.

Not here: bytes (`memory.py`), or what is printed (`cost.py`).
"""

import dataclasses
from collections.abc import Iterable

from moe_jax.analysis.halves import (
  Counted,
  Half,
  counted,
  group_size,
  halves,
  is_dropless,
)
from moe_jax.layers.moe import MoeOptions
from moe_jax.models import Model

_UNITS = (('P', 1e15), ('T', 1e12), ('B', 1e9), ('M', 1e6), ('k', 1e3))


@dataclasses.dataclass(frozen=True)
class TokenFlops:
  """FLOPs of the forward pass per token, two a multiply-add.

  Attributes:
    products: With all kernels that the next two do not have.
    experts: Of the K experts that a token meets, slots left empty not counted.
    router: The routers' products.
    attention: Scores and weighted sums over the whole sequence, not halved
      where it is causal, nor cut to a window.
  """

  products: int = 0
  experts: int = 0
  router: int = 0
  attention: int = 0

  @property
  def total(self) -> int:
    """All of them."""
    return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Cost:
  """Counts of one model.

  Attributes:
    total_params: All parameters.
    active_params: All but those of the E - K experts that a token does not
      meet.
    expert_params: Of all experts together.
    embedding_params: Tables that are looked up, not multiplied.
    decoder: Per token of the decoder.
    encoder: Per token that an encoder reads; the decoder's keys and values of
      it, which cross-attention makes once, are counted here. None in a
      decoder-only model.
    decoder_len: Tokens of the decoder in an example.
    encoder_len: Tokens that the encoder reads; 0 without one.
    capacity_slack: Rows that experts multiply per assignment: slots over
      K * tokens, in full groups. Below 1.0 some are dropped for certain; 1.0
      if dense or dropless.
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

  @property
  def example_flops(self) -> int:
    """Of the forward pass over an example, both halves."""
    return self._of_example('total')

  @property
  def forward_flops(self) -> int:
    """Per token of either half: an example's over its tokens."""
    return self.example_flops // (self.encoder_len + self.decoder_len)

  @property
  def router_flops(self) -> int:
    """The routers' part of `forward_flops`."""
    return self._of_example('router') // (self.encoder_len + self.decoder_len)

  @property
  def training_flops(self) -> int:
    """Per token, forward and backward: three times forward."""
    return 3 * self.forward_flops

  @property
  def prefill_flops(self) -> int:
    """Per token that is read before the first one is generated."""
    return (self.encoder or self.decoder).total

  @property
  def decode_flops(self) -> int:
    """Per generated token, over a cache of an example's length."""
    return self.decoder.total

  @property
  def computed_flops(self) -> int:
    """Of the forward pass over an example as it is run: all slots multiply."""
    empty = (self.capacity_slack - 1) * self._of_example('experts')
    return self.example_flops + round(empty)

  def describe(self) -> str:
    """A few lines for a person."""
    lines = [
      f'parameters: {short(self.total_params)} total, '
      f'{short(self.active_params)} active per token, '
      f'{short(self.expert_params)} in experts',
      f'FLOPs per token: {short(self.forward_flops)} forward, '
      f'{short(self.training_flops)} training '
      f'(router {self.router_flops / self.forward_flops:.1%}; experts '
      f'multiply {self.capacity_slack:.2f} rows per assignment)',
    ]
    if self.encoder:
      lines.append(
        f'forward: {short(self.encoder.total)} a token of the encoder, '
        f'{short(self.decoder.total)} one of the decoder, '
        f'{short(self.example_flops)} an example of {self.encoder_len} and '
        f'{self.decoder_len}'
      )
    return '\n'.join(lines)

  def _of_example(self, part: str) -> int:
    of_encoder = getattr(self.encoder, part) if self.encoder else 0
    own = getattr(self.decoder, part)
    return self.encoder_len * of_encoder + self.decoder_len * own


def count(
  model: Model, seq_len: int, target_len: int = 0, batch_size: int = 1
) -> Cost:
  """Counts `model`.

  Args:
    model: Of tokens.
    seq_len: T; of an encoder-decoder T_enc.
    target_len: T_dec of an encoder-decoder; 0 is `seq_len`.
    batch_size: Examples of a batch, where that is a routing group.
  """
  parameters, width = counted(model, seq_len), model.embedding.width
  parts = halves(model, seq_len, target_len) if model.stacks else []
  if parts:
    flops = [_of_half(parameters, half, width) for half in parts]
    own_len, memory_len = parts[-1].length, parts[-1].memory_len
  else:
    layers = [p for p in parameters if not p.outside_layers]
    flops = [_products(layers, model.moe, len(model.sparse_layers), width)]
    own_len, memory_len = seq_len, 0
  cross = sum(_memory_products(half, width) for half in parts)
  logits = 2 * model.vocab_size * width
  flops[-1] = _more_products(flops[-1], logits - cross)
  if memory_len:
    flops[0] = _more_products(flops[0], cross)
  experts = _size(p for p in parameters if p.of_expert)
  total = _size(parameters)
  return Cost(
    total_params=total,
    active_params=total - experts + _met(model, parameters, parts),
    expert_params=experts,
    embedding_params=_size(p for p in parameters if p.role.role == 'embedding'),
    decoder=flops[-1],
    encoder=flops[0] if memory_len else None,
    decoder_len=own_len,
    encoder_len=memory_len,
    capacity_slack=_slack(model, parts, batch_size, seq_len),
  )


def _size(parameters: Iterable[Counted]) -> int:
  return sum(p.size for p in parameters)


def _met(model: Model, parameters: list[Counted], parts: list[Half]) -> int:
  """Parameters of the experts that a token meets, in all layers."""
  if not parts:
    return _active(parameters, model.moe)
  return sum(_active(_own(parameters, h), h.moe) for h in parts)


def short(n: float | int) -> str:
  """46702792704 -> '46.7B'."""
  for unit, size in _UNITS:
    if n >= size:
      return f'{n / size:.3g}{unit}'
  return f'{n:.0f}'


def _of_half(parameters: list[Counted], half: Half, width: int) -> TokenFlops:
  """The FLOPs of a stack's own parameters, all of them on its own tokens."""
  a, layers = half.stack.block.attention.within(width), len(half.stack.sparse)
  flops = _products(_own(parameters, half), half.moe, half.num_sparse, width)
  scores = 4 * layers * half.keys * a.num_heads * a.head_width
  return dataclasses.replace(flops, attention=scores)


def _own(parameters: list[Counted], half: Half) -> list[Counted]:
  """The parameters of a stack."""
  n = len(half.path)
  return [
    p for p in parameters if p.path[:n] == half.path and not p.outside_layers
  ]


def _products(
  parameters: list[Counted],
  moe: MoeOptions | None,
  num_sparse: int,
  width: int,
) -> TokenFlops:
  """The FLOPs of products with these parameters, for a token.

  Args:
    parameters: Those of layers.
    moe: The mixture of the sparse layers; None without experts.
    num_sparse: The number of layers that have it.
    width: M.
  """
  kernels = [p for p in parameters if p.role.form == 'kernel']
  others = (p for p in kernels if not (p.of_expert or p.role.role == 'router'))
  router = 0
  if moe is not None:
    router = num_sparse * moe.router.multiply_adds(moe.sizes, width)
  return TokenFlops(
    products=2 * _size(others),
    experts=2 * _active(kernels, moe),
    router=2 * router,
  )


def _active(parameters: list[Counted], moe: MoeOptions | None) -> int:
  """Parameters of the K experts that a token meets, kernels and biases."""
  if moe is None:
    return 0
  experts = _size(p for p in parameters if p.of_expert)
  return experts // moe.num_experts * moe.num_selected


def _more_products(flops: TokenFlops, more: int) -> TokenFlops:
  return dataclasses.replace(flops, products=flops.products + more)


def _memory_products(half: Half, width: int) -> int:
  """FLOPs of the products with the encoder's output, per token of it."""
  if not half.stack.block.cross:
    return 0
  a = half.stack.block.attention.within(width)
  keys_and_values = 2 * width * a.num_kv_heads * a.head_width
  return 2 * len(half.stack.sparse) * keys_and_values


def _slack(
  model: Model, parts: list[Half], batch_size: int, seq_len: int
) -> float:
  """Rows over assignments, of the layers that have experts."""
  if model.moe is None:
    return 1.0
  if not parts:
    return _rows(model.moe, batch_size, seq_len) / model.moe.num_selected
  rows = assignments = 0.0
  for half in parts:
    if half.moe is not None:
      weight = half.num_sparse * half.length
      rows += weight * _rows(half.moe, batch_size, half.length)
      assignments += weight * half.moe.num_selected
  return rows / assignments


def _rows(moe: MoeOptions, batch_size: int, length: int) -> float:
  """Rows that a layer's experts multiply, per token."""
  if is_dropless(moe):
    return float(moe.num_selected)
  S = group_size(moe, batch_size, length)
  return moe.router.training_slots(moe.sizes, S) * moe.num_experts / S
