"""Windows of Qwen2-MoE and Qwen3-MoE are those of transformers."""

import numpy as np
import pytest

from moe_jax import interop
from moe_jax.interop import checkpoint_folder
from moe_jax.interop.verifying import verify
from tests.interop import oracle

FULL, WINDOW = 'full_attention', 'sliding_attention'
# A prompt has eleven tokens.
WINDOWED = dict(use_sliding_window=True, sliding_window=4)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('kind', 'windows'), [('qwen2_moe', (4, 0)), ('qwen3_moe', (4, 4))]
)
def test_windows_shorter_than_the_prompt(kind, windows, tmp_path):
  theirs, ours = tmp_path / 'theirs', tmp_path / 'ours'
  model = oracle.make(kind, num_hidden_layers=2, **WINDOWED)
  expected = oracle.write(model, theirs)
  verdict = verify(theirs, theirs / 'expected.npz')
  assert verdict.good, verdict.describe()
  # Without the window transformers has other logits.
  without = oracle.make(kind, num_hidden_layers=2)
  logits = oracle.logits(without, oracle.inputs(without))
  assert np.abs(logits - expected['logits']).max() > 0.1
  # transformers reads the same windows from what is exported.
  options, _, variables = interop.load(theirs)
  assert options.windows == windows
  interop.save(options, variables, ours)
  config = type(model.config).from_pretrained(ours)
  assert config.sliding_window == 4
  assert getattr(config, 'layer_types', None) in ([WINDOW, FULL], None)


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
  theirs = cls(num_hidden_layers=5, **layers)
  ours = checkpoint_folder.from_config(
    dict(model_type='qwen2_moe', num_hidden_layers=5, **layers)
  )
  kinds = [WINDOW if window else FULL for window in ours.windows]
  assert kinds == theirs.layer_types
  assert max(ours.windows) == (4 if WINDOW in kinds else 0)


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
