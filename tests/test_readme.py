"""What the README shows is true: its code runs, its paths and keys exist."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np

from moe_jax.config import flatten

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / 'README.md').read_text(encoding='utf-8')


def blocks(language):
  return re.findall(rf'```{language}\n(.*?)```', TEXT, flags=re.DOTALL)


def test_the_python_runs_and_has_the_shapes_it_says():
  scope = {}
  for block in blocks('python'):
    exec(compile(block, 'README.md', 'exec'), scope)
  assert scope['variables']['params']['experts']['w_in'].value.shape == (
    8,
    64,
    256,
  )
  aux, rows, y = scope['aux'], scope['rows'], scope['y']
  assert aux.stats.load.shape == (8,)
  np.testing.assert_allclose(aux.stats.load.sum(), 2 * aux.stats.tokens)
  assert rows.shape == (4, 2 * 5, 64)
  # Gates of a random choice are raw probabilities; what is dropped is zero.
  assert y.shape == (2, 16, 64)
  assert jnp.isfinite(y).all()
  config = scope['get_config']()
  assert config.model.moe.num_experts == 32
  assert config.evals.wide.model_overrides.moe.capacity_factor == 4.0


def test_paths_exist():
  named = re.findall(r'`((?:configs|experiments|colab|tests)/[\w./]+)`', TEXT)
  named += [f'configs/{name}' for name in re.findall(r'`(\w+\.py)`', TEXT)]
  named += re.findall(r'--config=(configs/\w+\.py)', TEXT)
  named += [
    name.replace('.', '/') + '.py'
    for name in re.findall(r'python -m ((?:moe_jax|experiments)[\w.]+)', TEXT)
  ]
  assert len(named) > 8
  missing = [name for name in named if not (ROOT / name).exists()]
  assert not missing


def test_config_keys_exist():
  from configs import base

  known = flatten(base.get_config())
  named = re.findall(r'--config\.([\w.]+)=', TEXT)
  named += re.findall(r'`config\.([\w.]+)`', TEXT)
  assert named
  assert not [key for key in named if key not in known]
