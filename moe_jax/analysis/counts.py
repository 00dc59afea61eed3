"""Parameters and FLOPs of a model, counted from its shapes and options.

Nothing is measured, and nothing is read from a compiled program. Parameters are
told apart by the roles that modules give them, such as 'expert', never by name.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moe_jax.errors import InputError
from moe_jax.layers import parameters
from moe_jax.layers.attention import AttentionBase
from moe_jax.layers.experts import ROLE as EXPERT
from moe_jax.layers.ffn import ACTIVATIONS
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.parameters import Role
from moe_jax.layers.routers import Hierarchical, RouterOptions, Sizes, TokenInfo
from moe_jax.layers.routers.steps import AXES, ROLE
from moe_jax.layers.shared import Shared
from moe_jax.models import Model
from moe_jax.models.stack import StackConfig, kept_names
from moe_jax.models.trees import describe, flatten

_UNITS = (('P', 1e15), ('T', 1e12), ('B', 1e9), ('M', 1e6), ('k', 1e3))


class Half(NamedTuple):
  """The encoder or the decoder of a model, with the lengths of its sequences.

  Attributes:
    path: Path of the stack's parameters in the tree of all parameters; it is
      empty in a model without an encoder.
    stack: Configuration of the stack of blocks.
    length: Number of tokens of the stack's own sequence in an example.
    memory_len: Number of tokens that the encoder reads in an example, which
      the decoder attends to; 0 in the encoder itself and in a model without
      an encoder.
    width: Width M of the model.
  """

  path: tuple[str, ...]
  stack: StackConfig
  length: int
  memory_len: int
  width: int

  @property
  def attention(self) -> AttentionBase:
    """Options of attention, in which sizes of 0 are replaced by actual ones."""
    return self.stack.block.attention.within(self.width)

  @property
  def itemsize(self) -> int:
    """Bytes of one number in the dtype of the activations."""
    return jnp.dtype(self.stack.block.shared.dtype).itemsize

  @property
  def keys(self) -> int:
    """Number of keys of each query, masked ones and the encoder's included."""
    crosses = self.stack.block.cross
    return self.length + (self.memory_len if crosses else 0)

  @property
  def moe(self) -> MoeOptions | None:
    """The options of the last sparse layer; None if no layer is sparse."""
    return self.moes[-1] if self.moes else None

  @property
  def moes(self) -> list[MoeOptions]:
    """The options of each sparse layer, in order."""
    return [moe for moe in self.stack.moes if moe is not None]


def halves(model: Model, seq_len: int, target_len: int = 0) -> list[Half]:
  """The stacks of a model with the lengths of their sequences, encoder first.

  Args:
    model: A model, whose stacks without blocks (those of LSTMs) are left out.
    seq_len: Number of tokens of a row; in an encoder-decoder, of the encoder's
      row.
    target_len: Number of tokens of a decoder's row in an encoder-decoder; 0
      stands for `seq_len`.
  """
  lengths = [(seq_len, 0)]
  if model.has_encoder:
    lengths.append((target_len or seq_len, seq_len))
  return [
    Half(stack.path, stack.blocks, *own_lengths, model.embedding.width)
    for stack, own_lengths in zip(model.stacks, lengths)
    if stack.blocks is not None
  ]


class SizedParameter(NamedTuple):
  """A parameter with its size, role and number of experts.

  Attributes:
    path: Path of the parameter in the tree of all parameters; its beginning
      says which stack has the parameter.
    size: Number of its values.
    role: Part of the model that the parameter belongs to, and its use there.
    num_experts: Number of the experts whose values the parameter stacks; 1 for
      parameters without a dimension of experts.
  """

  path: tuple[str, ...]
  size: int
  role: Role
  num_experts: int = 1

  @property
  def of_expert(self) -> bool:
    """Whether the parameter belongs to the experts of a sparse layer."""
    return self.role.role == EXPERT

  @property
  def outside_layers(self) -> bool:
    """Whether the embedding or the output projection has the parameter."""
    return self.role.role in ('embedding', 'head')


def sized_parameters(model: Model) -> list[SizedParameter]:
  """Every parameter of a model, with its size and its role.

  Raises:
    ValueError: Kernels are quantised: the number of their stored values is not
      that of the parameters.
  """
  for moe in model.stacks.mixtures:
    if format := moe.expert.format:
      raise InputError(
        f'the model has kernels in codes of {format.name!r}, whose number is '
        'not that of its parameters; count the model that they were made of'
      )
  trees = describe(model)
  roles, axes = flatten(trees.roles), flatten(trees.axes)
  return [
    SizedParameter(
      path,
      leaf.size,
      roles[path],
      leaf.shape[axes[path].index(EXPERT)] if EXPERT in axes[path] else 1,
    )
    for path, leaf in flatten(trees.shapes).items()
  ]


def group_size(moe: MoeOptions, batch_size: int, length: int) -> int:
  """S, the tokens of a routing group, if a row of the batch has `length`."""
  if moe.group_size == -1:
    return batch_size * length
  return moe.group_size or length


def training_slots(moe: MoeOptions, group_size: int) -> int:
  """An expert's slots per group in training; without capacity, `group_size`."""
  (routing, _), _ = _in_training(moe.router, moe.sizes, group_size, 1)
  return group_size if routing.capacity is None else routing.capacity


def router_multiply_adds(moe: MoeOptions, width: int) -> int:
  """The number of multiplications in the router's products for one token.

  This is the size of the router's kernels. The kernels of a hierarchical
  router's branches are stacked, and only the chosen branches' count.
  """
  _, variables = _in_training(moe.router, moe.sizes, 1, width)
  boxes = parameters.with_role(variables.get('params', {}), ROLE)
  total = 0
  for box in flatten(boxes).values():
    size = box.value.size if box.form == 'kernel' else 0
    if isinstance(moe.router, Hierarchical) and box.names[0] != AXES[0]:
      size = size * moe.router.branches_selected // moe.router.branching
    total += size
  return total


@functools.lru_cache
def _in_training(
  router: RouterOptions, sizes: Sizes, group_size: int, width: int
) -> Any:
  """The shapes of ((routing, aux), variables) of a router in training.

  They are for one group of `group_size` tokens of model width `width`; `sizes`
  has the numbers of experts that the router chooses from and selects.
  """
  module = router.module(sizes, Shared(num_tasks=1), 'router')

  def run():
    key, ids = jax.random.key(0), jnp.zeros((1, group_size), jnp.int32)
    info = TokenInfo(ids, ids, ids, ids, ids).only(router.reads)
    x, mask = jnp.zeros((1, group_size, width)), jnp.ones(ids.shape, bool)
    rngs = {'params': key, 'router': key}
    return module.init_with_output(rngs, x, mask, True, info)

  return jax.eval_shape(run)


def group_rows(moe: MoeOptions, S: int) -> int:
  """The number of rows that a layer's experts compute for a group of S tokens.

  A row is the vector [M] of a slot; slots without a token are counted, too.
  """
  slots = moe.expert_slots(training_slots(moe, S), S)
  rows = slots * moe.num_retained
  is_dropless = not moe.dispatch.by_slot and not moe.router.by_expert
  return min(rows, S * moe.num_selected) if is_dropless else rows


@dataclasses.dataclass
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


class Cost(NamedTuple):
  """The parameters and the FLOPs of one model.

  Attributes:
    total_params: Number of all parameters.
    active_params: Number of the parameters that compute one token: all but
      parameters of the E - K experts of each layer that are not chosen.
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
      generated token. Latent attention reads its cache without expanding it.
    recomputed_flops: FLOPs of what `remat` computes again in the backward pass,
      for a token, averaged over an example.
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
  recomputed_flops: int = 0

  @property
  def example_flops(self) -> int:
    """FLOPs of the forward pass for an example, of encoder and decoder."""
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
    """FLOPs of a training token: three times the FLOPs of its forward pass."""
    return 3 * self.forward_flops

  @property
  def prefill_flops(self) -> int:
    """FLOPs for each token of a prompt, which is read before generation."""
    return (self.encoder or self.decoder).total

  @property
  def decode_flops(self) -> int:
    """FLOPs for a generated token, with a cache as long as an example."""
    return self.decoder.total - self.decoder.attention + self.step_attention

  def describe(self) -> str:
    """The counts as two to four lines of text."""
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
      if self.capacity_slack < 1:
        lines.append(
          f'WARNING: at most {self.capacity_slack:.0%} of the choices find a '
          'slot, however even the load is (model.moe.capacity; a factor '
          "'per_token' does not grow with num_selected, one 'per_assignment' "
          'does)'
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
  """Counts the parameters and the FLOPs of a model.

  Args:
    model: The model.
    seq_len: Number of tokens of a row; in an encoder-decoder, of the encoder's
      row.
    target_len: Number of tokens of a decoder's row in an encoder-decoder; 0
      stands for `seq_len`.
    batch_size: Number of rows in a batch, which matters where a whole batch is
      one routing group.
  """
  sized, width = sized_parameters(model), model.embedding.width
  layers = [p for p in sized if not p.outside_layers]
  stacks = halves(model, seq_len, target_len)
  parts = [
    ([p for p in layers if p.path[: len(half.path)] == half.path], half.moes)
    for half in stacks
  ]
  parts = parts or [(layers, [*model.stacks.mixtures])]
  flops = [_products(kernels, moes, width) for kernels, moes in parts]
  decoder_len, memory_len, step_attention = seq_len, 0, 0
  for part, half in zip(flops, stacks):
    decoder_len, memory_len = half.length, half.memory_len
    num_layers = len(half.stack.sparse)
    a, per_width = half.attention, 2 * num_layers * half.keys
    part.attention = per_width * a.num_heads * sum(a.head_widths)
    step_attention = per_width * a.decoding_products
    if half.stack.block.cross:  # keys and values of the encoder's tokens
      cross_flops = 2 * num_layers * width * a.cached_values
      part.products -= cross_flops
      flops[0].products += cross_flops
  again = sum(
    half.length * recomputed(half, f) for half, f in zip(stacks, flops)
  )
  flops[-1].products += 2 * model.vocab_size * width
  lengths = [(moe, half.length) for half in stacks for moe in half.moes]
  lengths = lengths or [(moe, seq_len) for moe in model.stacks.mixtures]
  experts, total = _size(p for p in layers if p.of_expert), _size(sized)
  return Cost(
    total_params=total,
    active_params=total - experts + sum(_chosen(*part) for part in parts),
    expert_params=experts,
    embedding_params=_size(p for p in sized if p.role.role == 'embedding'),
    decoder=flops[-1],
    encoder=flops[0] if memory_len else None,
    decoder_len=decoder_len,
    encoder_len=memory_len,
    capacity_slack=_slack(lengths, batch_size),
    step_attention=step_attention,
    recomputed_flops=again // (decoder_len + memory_len),
  )


def recomputed(half: Half, flops: TokenFlops) -> int:
  """FLOPs for a token of what `remat` computes again in the backward pass.

  Of a block's last product only the residual stream is made, so that it is not
  computed again; those of experts are, for the gradients of gates. Attention's
  scores are, too, as its output alone does not give their gradient.

  Args:
    half: The stack of blocks.
    flops: FLOPs of its forward pass for a token, without the output logits.
  """
  c, block, moe = half.stack, half.stack.block, half.moe
  if (kept := kept_names(c.remat)) is None:
    return 0
  scores = flops.attention
  if 'attention' in kept:
    queries, values = half.attention.head_widths
    scores = scores * queries // (queries + values)
  if 'products' in kept:
    return scores
  # Triples: a feed-forward's options, its number of vectors for a token in all
  # layers, and whether its last product ends a block, so that it is left out.
  num_sparse = sum(c.sparse)
  ffns = [(block.ffn, len(c.sparse) - num_sparse, True)]
  if block.moe is not None and num_sparse:
    has_extra = block.moe.extra_ffn
    ffns.append((block.ffn, num_sparse * has_extra, True))
    if moe is None:
      ffns.append((block.moe.twin().ffn, num_sparse, not has_extra))
    elif (shared := moe.shared_twin) is not None:
      ffns.append((shared.ffn, num_sparse, not has_extra))
    if moe is not None and moe.dispatch.by_slot:
      rows = num_sparse * moe.num_selected
      ffns.append((moe.expert.twin(1).ffn, rows, False))
  total = flops.products + flops.experts + flops.router + scores
  for ffn, rows, is_last in ffns:
    left_out = is_last
    if 'hidden' in kept:
      left_out += len(ACTIVATIONS[ffn.activation].kernels)
    total -= rows * 2 * half.width * ffn.hidden * left_out
  return total


def short(n: float | int) -> str:
  """A number with three digits and a letter: 46702792704 is '46.7B'."""
  for unit, size in _UNITS:
    if n >= size:
      return f'{n / size:.3g}{unit}'
  return f'{n:.0f}'


def _size(sized: Iterable[SizedParameter]) -> int:
  return sum(p.size for p in sized)


def _products(
  layers: list[SizedParameter], moes: list[MoeOptions], width: int
) -> TokenFlops:
  """FLOPs for one token of the products with the kernels of all layers.

  `layers` has the parameters of all layers, and `moes` the options of the
  sparse ones; `width` is M.
  """
  kernels = [p for p in layers if p.role.form == 'kernel']
  dense = (p for p in kernels if not (p.of_expert or p.role.role == 'router'))
  router = sum(router_multiply_adds(moe, width) for moe in moes)
  return TokenFlops(
    products=2 * _size(dense),
    experts=2 * _chosen(kernels, moes),
    router=2 * router,
  )


def _chosen(layers: list[SizedParameter], moes: list[MoeOptions]) -> int:
  """How many values of `layers` belong to a token's K experts; 0 if no `moes`.

  `layers` has the parameters of layers, `moes` the options of sparse layers.
  """
  expert_size = sum(p.size // p.num_experts for p in layers if p.of_expert)
  return expert_size * moes[0].num_selected if moes else 0


def _slack(lengths: Sequence[tuple[MoeOptions, int]], batch_size: int) -> float:
  """Rows that experts multiply, divided by the number of choices of experts.

  Both are sums over sparse layers. For each of them `lengths` has its options
  and the number T of tokens of its sequence. Without choices the result is 1.
  """
  rows = choices = 0.0
  for moe, T in lengths:
    S = group_size(moe, batch_size, T)
    rows += T * group_rows(moe, S) / S
    choices += T * moe.num_selected
  return rows / choices if choices else 1.0
