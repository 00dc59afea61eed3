"""PyTorch's fused attention, forward and backward, for `bench_attention`."""

import functools
from collections.abc import Callable, Sequence

# B, T, H and D of a case, and whether rows hold several documents.
Case = tuple[tuple[int, int, int, int], bool]


def programs(cases: Sequence[Case]) -> dict[Case, Callable[[], None]]:
  """Functions that call the attention of each case and take its gradient."""
  return {case: _program(*case) for case in cases}


def _program(shape, packed):
  import torch

  B, T, H, D = shape
  torch.manual_seed(0)
  query, key, value, toward = (torch.randn(B, T, H, D) for _ in range(4))
  inputs = [x.requires_grad_() for x in (query, key, value)]
  mask = None
  if packed:
    ids = torch.arange(T).expand(B, T) // (-(-T // 3))
    mask = ids[:, None, :, None] == ids[:, None, None, :]
    mask = mask & torch.ones(T, T, dtype=torch.bool).tril()
  attention = functools.partial(
    torch.nn.functional.scaled_dot_product_attention,
    attn_mask=mask,
    is_causal=mask is None,
  )

  def run():
    y = attention(*(x.transpose(1, 2) for x in inputs))
    torch.autograd.grad(y.transpose(1, 2), inputs, toward)

  return run
