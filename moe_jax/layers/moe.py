"""The sparse layer: group -> route -> dispatch -> experts -> combine.

This file alone forms groups. The rules are `moe_jax.routing`, the movement
`moe_jax.dispatch`, the products `moe_jax.layers.experts.slots`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from moe_jax import dispatch
from moe_jax.config import unknown
from moe_jax.kernels.backends import check as check_backend
from moe_jax.layers.experts.few_tokens import (
  FEW_TOKENS,
  BatchedExperts,
  UnrolledExperts,
)
from moe_jax.layers.experts.slots import Experts, copied, vmapped
from moe_jax.layers.experts.sorted_rows_experts import DroplessExperts
from moe_jax.layers.ffn import FfnConfig
from moe_jax.layers.routers.router_config import BY_EXPERT, RouterConfig
from moe_jax.layers.routers.two_levels import make_router
from moe_jax.parallel import exchange as exchange_lib
from moe_jax.routing import MoeAux
from moe_jax.shapes import Array, Bool, Float, Int, Shaped, UInt32

DECODING = ('', 'unrolled', 'batched')
_OWN_ROWS = (
  "dispatch='dropless' with an expert of your own: its rows are not [E, R, M]; "
  "use 'gather'"
)


@dataclasses.dataclass(frozen=True)
class MoeConfig:
  """A mixture-of-experts layer.

  Attributes:
    router: Who goes where.
    expert: The feed-forward layer that each expert is.
    group_size: S, in tokens: a divisor or a multiple of T; 0 is T, one group
      a sequence; -1 is the whole batch. Capacity and balance are per group.
    dispatch: 'gather' (default), 'einsum' (the readable reference), or
      'dropless' (rows sorted by expert, no slots; with capacity rule 'all', or
      where experts choose and nothing is dropped).
    grouped_matmul: Who multiplies under 'dropless': 'auto' is the platform's;
      see `kernels.BACKENDS`.
    route_padding: Whether padding takes slots and counts as tokens, as in
      transformers' Switch. Then it attends to the first example of its row, and
      not to other padding: what it saw decides which slots it takes.
    decoding: For steps of few tokens on a CPU, in place of a dispatcher:
      'unrolled', experts have arrays of their own, or 'batched', all multiply
      all tokens; see `layers/experts/few_tokens.py`.
    output_masking: Rate at which an expert's output for a token is masked in
      training, without making up for it; in evaluation outputs are multiplied
      by 1 - rate (NLLB's expert output masking, arXiv:2207.04672).
  """

  router: RouterConfig
  expert: FfnConfig
  group_size: int = 0
  dispatch: str = 'gather'
  grouped_matmul: str = 'auto'
  route_padding: bool = False
  decoding: str = ''
  output_masking: float = 0.0
  exchange: exchange_lib.ExchangeConfig = exchange_lib.ExchangeConfig()

  def __post_init__(self):
    dispatch.get(self.dispatch)
    check_backend(self.grouped_matmul)
    rule = self.router.capacity.rule
    by_expert = self.router.kind in BY_EXPERT
    if self.dispatch == 'dropless' and rule != 'all' and not by_expert:
      raise ValueError(
        f"dispatch='dropless' with capacity_rule={rule!r}, which drops; use "
        "capacity_rule='all', or dispatch='gather'"
      )
    if self.decoding not in DECODING:
      raise unknown('decoding', self.decoding, DECODING)
    if self.group_size < -1:
      raise ValueError(f'group_size={self.group_size} must be at least -1')
    if not 0 <= self.output_masking < 1:
      raise ValueError(f'output_masking={self.output_masking} not in [0, 1)')


class MoE(nn.Module):
  """Routes every token to K of E experts and sums their gated outputs.

  A token dropped everywhere gets zeros: the residual alone carries it.

  Attributes:
    config: The layer.
    expert: Another linen module `[R, M] -> [R, M]` to be the experts in place
      of `config.expert`; it is copied E times, each copy with its own start.
      Not with dispatch='dropless', whose rows differ in number. It may be
      another `MoE`: its routers see the rows that tokens are in (its group_size
      of 0 is an expert's rows), and its losses are added to this layer's, so
      that a token pays for each of the inner layers it meets. Statistics are
      this layer's alone.
  """

  config: MoeConfig
  expert: nn.Module | None = None

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T M'],
    token_mask: Bool[Array, 'B T'] | None = None,
    train: bool = False,
    hash_ids: UInt32[Array, 'B T'] | None = None,
    layer: int | Int[Array, ''] = 0,
  ) -> tuple[Float[Array, 'B T M'], MoeAux]:
    """Returns the output and the unweighted losses and statistics.

    Args:
      x: Token representations, of any float type.
      token_mask: False for padding, which takes no slot and gets zeros.
      train: Turns on router noise and dropout (rngs 'router', 'dropout').
      hash_ids: What tokens are hashed by; see `Router`.
      layer: Likewise.
    """
    c = self.config
    B, T, M = x.shape
    if token_mask is None or c.route_padding:
      token_mask = jnp.ones((B, T), bool)
    groups, mask = to_groups(x, token_mask, c.group_size)
    if hash_ids is not None:
      hash_ids = in_groups(hash_ids, groups.shape[1])
    router = make_router(c.router, name='router')
    chosen, aux = router(groups, mask, train, hash_ids, layer)
    chosen = self._mask_outputs(chosen, train)
    groups = groups.astype(c.expert.dtype)
    if isinstance(self.expert, MoE):
      y, inner = self._serve_by_moe(groups, chosen, train)
      aux = _with_losses(aux, inner)
    else:
      y = self._serve(groups, chosen, train)  # [G, S, M]
    return y.reshape(-1, M)[: B * T].reshape(B, T, M), aux

  def _mask_outputs(self, chosen, train):
    """A masked output is one of gate zero."""
    rate = self.config.output_masking
    if not rate:
      return chosen
    left = 1.0 - rate
    if train:
      key, shape = self.make_rng('router'), chosen.gate.shape
      left = jax.random.bernoulli(key, left, shape).astype(jnp.float32)
    return dataclasses.replace(chosen, gate=chosen.gate * left)

  def _serve(self, groups, chosen, train):
    c = self.config
    if c.decoding == 'unrolled':
      return UnrolledExperts(c.expert, name='experts')(groups, chosen)
    if c.decoding == 'batched' and groups[..., 0].size <= FEW_TOKENS:
      return BatchedExperts(c.expert, name='experts')(groups, chosen)
    mover = dispatch.get(c.dispatch)
    if mover is dispatch.dropless:
      if self.expert is not None:
        raise ValueError(_OWN_ROWS)
      experts = DroplessExperts(
        c.expert, c.grouped_matmul, c.exchange, name='experts'
      )
      return experts(groups, chosen, train)
    if self.expert is None:
      experts = functools.partial(
        Experts(c.expert, name='experts'), train=train
      )
    else:
      experts = functools.partial(vmapped, self.expert)
    place = exchange_lib.layout(
      c.exchange,
      groups,
      num_experts=chosen.num_experts,
      hidden=c.expert.hidden,
    )
    if place is not None and not self.is_initializing():
      return self._exchange(place, mover, experts, groups, chosen)
    with jax.named_scope('dispatch'):
      rows = mover.dispatch(groups, chosen)  # [E, R, M]
    rows = experts(rows)
    with jax.named_scope('combine'):
      return mover.combine(rows, chosen)

  def _serve_by_moe(self, groups, chosen, train):
    """The output, and the aux of the experts, which are mixtures themselves.

    Without `exchange`: on a mesh the compiler places what moves.
    """
    mover = dispatch.get(self.config.dispatch)
    if mover is dispatch.dropless:
      raise ValueError(_OWN_ROWS)
    rows = mover.dispatch(groups, chosen)  # [E, R, M]
    filled = mover.dispatch(jnp.ones_like(groups[..., :1]), chosen)[..., 0] > 0

    def call(moe, rows, filled):
      y, aux = moe(rows[None], filled[None], train)
      return y[0], aux

    rows, aux = copied(call, self.expert, rows, filled)
    return mover.combine(rows, chosen), aux

  def _exchange(self, place, mover, experts, groups, chosen):
    """Every device routes and moves its own groups, and serves its experts."""
    c = self.config.exchange
    with jax.named_scope('dispatch'):
      chunks = exchange_lib.dispatch(c, place, mover, groups, chosen)
    for i, rows in enumerate(chunks):
      with jax.named_scope('exchange'):
        rows = exchange_lib.to_experts(c, place, rows)
      rows = experts(rows)
      with jax.named_scope('exchange'):
        chunks[i] = exchange_lib.to_groups(c, place, rows)
    with jax.named_scope('combine'):
      return exchange_lib.combine(place, mover, chunks, chosen)


def _with_losses(aux: MoeAux, inner: MoeAux) -> MoeAux:
  """An aux with the losses of others, whose leaves are [E, ...], added."""
  names = (name for name in aux._fields if name.endswith('_loss'))
  return aux._replace(
    **{name: getattr(aux, name) + getattr(inner, name).sum() for name in names}
  )


def to_groups(
  x: Float[Array, 'B T M'], token_mask: Bool[Array, 'B T'], group_size: int
) -> tuple[Float[Array, 'G S M'], Bool[Array, 'G S']]:
  """Cuts the batch into groups of consecutive tokens, padded with mask False.

  Raises:
    ValueError: group_size neither divides T nor is a multiple of it.
  """
  B, T, M = x.shape
  S = B * T if group_size == -1 else group_size or T
  if T % S and S % T:
    raise ValueError(
      f'group_size={S} is neither a divisor nor a multiple of seq_len={T}'
    )
  padding = -(B * T) % S
  x = jnp.pad(x.reshape(B * T, M), ((0, padding), (0, 0)))
  return x.reshape(-1, S, M), in_groups(token_mask, S)


def in_groups(
  values: Shaped[Array, 'B T'], group_size: int
) -> Shaped[Array, 'G S']:
  """A number a token, cut as `to_groups` does, padded with zeros."""
  padding = -values.size % group_size
  return jnp.pad(values.reshape(-1), (0, padding)).reshape(-1, group_size)
