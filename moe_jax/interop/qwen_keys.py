"""Keys of config.json that Qwen2-MoE and Qwen3-MoE share.

The keys decide the sparse layers, the width of experts, and the width of
windows.
"""

from collections.abc import Iterator
from typing import Any

from moe_jax.interop import decoder_keys
from moe_jax.interop.architecture import is_sparse
from moe_jax.interop.config_keys import COUNT, OPTIONAL_COUNT, SIZE, Values
from moe_jax.models import DecoderOptions

HONOURED: dict[str, tuple[Any, Any]] = {
  'decoder_sparse_step': (SIZE, 1),
  'mlp_only_layers': (list | None, None),
  'norm_topk_prob': (bool, False),
  'use_sliding_window': (bool, False),
  'sliding_window': (OPTIONAL_COUNT, 4096),
}


def problems(c: Values) -> Iterator[str]:
  """A text for each value that our decoders cannot express."""
  yield from decoder_keys.problems(c)
  yield from decoder_keys.gate_problems(c)
  if c.use_sliding_window and c.sliding_window == 0:
    yield 'sliding_window=0 must be at least 1 with use_sliding_window=True'
  for layer in c.mlp_only_layers or ():
    if not COUNT.holds(layer):
      yield f'mlp_only_layers has {layer!r:.80}, which is no layer'
  if not any(_sparse(c)):
    yield (
      f'decoder_sparse_step={c.decoder_sparse_step} and mlp_only_layers='
      f'{c.mlp_only_layers} leave no layer sparse of {c.num_hidden_layers}'
    )


def _sparse(c: Values) -> tuple[bool, ...]:
  """Whether each layer is sparse."""
  dense = c.mlp_only_layers or ()
  return tuple(
    is_sparse(i, c.decoder_sparse_step, 0) and i not in dense
    for i in range(c.num_hidden_layers)
  )


def layers(c: Values) -> str:
  """The option `moe.layers`."""
  return decoder_keys.layers(_sparse(c))


def describe(o: DecoderOptions, architecture: str) -> dict[str, Any]:
  """The keys that both architectures have, of a model.

  Raises:
    ValueError: As `decoder_keys.describe`.
  """
  shared = decoder_keys.describe(o, architecture)
  moe = decoder_keys.moe_options(o)
  return shared | dict(
    intermediate_size=o.ffn.hidden,
    moe_intermediate_size=decoder_keys.expert_of(o).hidden,
    decoder_sparse_step=1,
    mlp_only_layers=[i for i, flag in enumerate(o.sparse) if not flag],
    num_experts=moe.num_experts,
    norm_topk_prob=decoder_keys.is_renormalized(moe.router),
    use_sliding_window=any(o.windows),
    sliding_window=o.attention.window or None,
  )
