"""The key `layer_types` of config.json: layers with and without a window."""

from collections.abc import Iterator, Sequence
from typing import Any

from moe_jax.interop import decoder_keys
from moe_jax.models import DecoderOptions

WINDOW, FULL = 'sliding_attention', 'full_attention'


def problems(kinds: Sequence[Any], num_layers: int) -> Iterator[str]:
  """A text for each unknown kind of a layer, and one for a wrong number.

  Args:
    kinds: The value of `layer_types`, or the kinds that other keys decide.
    num_layers: The number of layers.
  """
  for kind in kinds:
    if kind not in (WINDOW, FULL):
      yield f'layer_types has {kind!r:.80}, neither {WINDOW} nor {FULL}'
  if len(kinds) != num_layers:
    yield (
      f'layer_types has {len(kinds)} layers, num_hidden_layers={num_layers}'
    )


def options(kinds: Sequence[str], window: int) -> dict[str, Any]:
  """The options of attention for kinds of layers without problems.

  Args:
    kinds: The kind of each layer.
    window: The number of tokens in the window, the token itself included.
  """
  full = [kind == FULL for kind in kinds]
  if all(full):
    return dict(window=0)
  layers = decoder_keys.layers(full) if any(full) else 'none'
  return dict(window=window, full_layers=layers)


def layer_types(o: DecoderOptions) -> list[str]:
  """The value of `layer_types` for a model."""
  return [WINDOW if window else FULL for window in o.windows]
