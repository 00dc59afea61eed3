"""The examples in the room's README run."""

import pathlib
import re

import jax
import numpy as np
import pytest

from moe_jax import layers

README = pathlib.Path(layers.__file__).parent / 'README.md'
TEXT = README.read_text(encoding='utf-8')


@pytest.mark.slow
def test_the_examples_run_one_after_the_other():
  scope = {'__name__': 'readme'}
  layer_code, router_code = re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL)
  exec(compile(layer_code, str(README), 'exec'), scope)
  assert scope['y'].shape == scope['x'].shape
  exec(compile(router_code, str(README), 'exec'), scope)
  layer, x = scope['layer'], scope['x']
  run = jax.jit(lambda key: layer.init_with_output(key, x)[0][1])
  load = run(jax.random.key(0)).stats.load
  np.testing.assert_array_equal(load, [0, x[..., 0].size, 0, 0])


def test_every_file_of_the_room_is_named():
  files = {path.name for path in README.parent.glob('*.py')}
  assert [n for n in files - {'__init__.py'} if n not in TEXT] == []
