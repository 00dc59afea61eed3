"""Parameters and FLOPs, counted from a model's config and parameters' shapes.

Not here: bytes (`memory.py`), or what is printed (`cost.py`).
"""

import dataclasses
import math

from moe_jax.analysis.halves import (
  Half,
  capacity,
  group_size,
  halves,
  param_shapes,
)
from moe_jax.layers.moe import MoeConfig
from moe_jax.layers.routers.router_config import BY_EXPERT
from moe_jax.models import LstmLm, LstmLmConfig, Model

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
  shapes = param_shapes(model, seq_len)
  sizes = {name: math.prod(leaf.shape) for name, leaf in shapes.items()}
  if isinstance(model, LstmLm):
    return _of_lstms(model.config, sizes, seq_len, batch_size)
  parts = halves(model, seq_len, target_len)
  *_, last = parts
  flops = [_token_flops(sizes, half) for half in parts]
  logits = 2 * model.config.vocab_size * model.config.embedding.width
  cross = sum(n for name, n in sizes.items() if _reads_memory(name))
  flops[-1] = _more_products(flops[-1], logits - 2 * cross)
  if last.memory_len:
    flops[0] = _more_products(flops[0], 2 * cross)
  experts = sum(n for name, n in sizes.items() if '/experts/' in name)
  total = sum(sizes.values())
  return Cost(
    total_params=total,
    active_params=total
    - experts
    + sum(_active(_own(sizes, h), h.stack.block.moe) for h in parts),
    expert_params=experts,
    embedding_params=sum(
      n for name, n in sizes.items() if name.endswith('embedding')
    ),
    decoder=flops[-1],
    encoder=flops[0] if last.memory_len else None,
    decoder_len=last.length,
    encoder_len=last.memory_len,
    capacity_slack=_slack(parts, batch_size),
  )


def _of_lstms(
  c: LstmLmConfig, sizes: dict[str, int], seq_len: int, batch_size: int
) -> Cost:
  """As `count`, of the sizes of the parameters."""
  experts = sum(n for name, n in sizes.items() if '/experts/' in name)
  total, active = sum(sizes.values()), _active(sizes, c.moe)
  layers = {n: size for n, size in sizes.items() if '/' in n}
  logits = 2 * c.vocab_size * c.embedding.width
  flops = _more_products(_products(layers, c.moe), logits)
  slack = 1.0
  if c.moe is not None:
    slack = _rows(c.moe, batch_size, seq_len) / c.moe.router.num_selected
  return Cost(
    total_params=total,
    active_params=total - experts + active,
    expert_params=experts,
    embedding_params=sum(
      n for name, n in sizes.items() if name.endswith('embedding')
    ),
    decoder=flops,
    encoder=None,
    decoder_len=seq_len,
    encoder_len=0,
    capacity_slack=slack,
  )


def _is_vector(name: str) -> bool:
  """Norm scales, biases and relative-position tables: nothing multiplied."""
  last = name.rsplit('/', 1)[-1]
  return last in ('b', 'scale', 'bias', 'table') or last.startswith('b_')


def short(n: float | int) -> str:
  """46702792704 -> '46.7B'."""
  for unit, size in _UNITS:
    if n >= size:
      return f'{n / size:.3g}{unit}'
  return f'{n:.0f}'


def _token_flops(sizes: dict[str, int], half: Half) -> TokenFlops:
  """Of a stack's own parameters, all of them on its own tokens."""
  own = _own(sizes, half)
  a, layers = half.stack.block.attention, len(half.stack.sparse)
  attention = 4 * layers * half.keys * a.num_heads * a.head_width
  flops = _products(own, half.stack.block.moe)
  return dataclasses.replace(flops, attention=attention)


def _own(sizes: dict[str, int], half: Half) -> dict[str, int]:
  """The parameters of a stack."""
  return {
    name: n
    for name, n in sizes.items()
    if name.startswith(half.prefix) and '/' in name
  }


def _products(sizes: dict[str, int], moe: MoeConfig | None) -> TokenFlops:
  """Of these parameters; of experts and branches those that a token meets."""
  kernels = {name: n for name, n in sizes.items() if not _is_vector(name)}
  router = {name: n for name, n in kernels.items() if '/router/' in name}
  experts = sum(n for name, n in kernels.items() if '/experts/' in name)
  others = sum(kernels.values()) - sum(router.values()) - experts
  met = 0
  for name, n in router.items():
    if '/w_branch' in name:
      n = n // moe.router.branching * moe.router.branches_selected
    met += n
  return TokenFlops(
    products=2 * others, experts=2 * _active(kernels, moe), router=2 * met
  )


def _active(sizes: dict[str, int], moe: MoeConfig | None) -> int:
  """Parameters of the K experts that a token meets, kernels and biases."""
  if moe is None:
    return 0
  experts = sum(n for name, n in sizes.items() if '/experts/' in name)
  return experts // moe.router.num_experts * moe.router.num_selected


def _more_products(flops: TokenFlops, more: int) -> TokenFlops:
  return dataclasses.replace(flops, products=flops.products + more)


def _reads_memory(name: str) -> bool:
  """Kernels that multiply the encoder's output, once per token of it."""
  return name.endswith(('cross_attention/w_key', 'cross_attention/w_value'))


def _slack(parts: list[Half], batch_size: int) -> float:
  """Rows over assignments, of the layers that have experts."""
  rows = assignments = 0.0
  for half in parts:
    moe = half.stack.block.moe
    if not half.num_sparse:
      continue
    weight = half.num_sparse * half.length
    rows += weight * _rows(moe, batch_size, half.length)
    assignments += weight * moe.router.num_selected
  return rows / assignments if assignments else 1.0


def _rows(moe: MoeConfig, batch_size: int, length: int) -> float:
  """Rows that a layer's experts multiply, per token."""
  r = moe.router
  if moe.dispatch == 'dropless' and r.kind not in BY_EXPERT:
    return float(r.num_selected)
  S = group_size(moe, batch_size, length)
  return capacity(moe, S) * r.num_experts / S
