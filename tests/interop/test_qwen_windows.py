"""Layers with windows of Qwen2-MoE are those of transformers.

Their logits are in `test_parity.py`.
"""

import pytest

from moe_jax.interop import checkpoint_folder
from tests.interop import oracle

FULL, WINDOW = 'full_attention', 'sliding_attention'
WINDOWED = dict(use_sliding_window=True, sliding_window=4)


@pytest.mark.parametrize(
  'layers',
  [
    dict(max_window_layers=3, **WINDOWED),
    dict(max_window_layers=0, **WINDOWED),
    dict(layer_types=[FULL, WINDOW, WINDOW, FULL, FULL], **WINDOWED),
    dict(max_window_layers=3),
  ],
)
def test_layers_with_a_window(layers):
  cls = oracle.CLASSES['qwen2_moe'].config_class
  hf_config = cls(num_hidden_layers=5, **layers)
  options = checkpoint_folder.from_config(
    dict(model_type='qwen2_moe', num_hidden_layers=5, **layers)
  )
  kinds = [WINDOW if window else FULL for window in options.windows]
  assert kinds == hf_config.layer_types
  assert max(options.windows) == (4 if WINDOW in kinds else 0)


@pytest.mark.parametrize(
  ('layers', 'message'),
  [
    (dict(use_sliding_window=True, sliding_window=None), 'sliding_window=None'),
    (dict(layer_types=[WINDOW, FULL]), 'needs use_sliding_window'),
  ],
)
def test_a_window_without_a_width_is_refused(layers, message):
  config = dict(model_type='qwen2_moe', num_hidden_layers=2, **layers)
  with pytest.raises(ValueError, match=message):
    checkpoint_folder.from_config(config)
