"""What the README shows is true: its code runs, its paths and keys exist."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import mixtral_8x7b
from moe_jax import interop, models
from moe_jax.config import flatten

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / 'README.md').read_text(encoding='utf-8')


def blocks(language):
  return re.findall(rf'```{language}\n(.*?)```', TEXT, flags=re.DOTALL)


def checkpoint(folder):
  """A small Mixtral as transformers would have written it."""
  config = mixtral_8x7b.get_config('runlocal').unlock()
  config.model.vocab_size = 11
  model = models.build(config)
  params = nn.meta.unbox(models.init_params(model, jax.random.key(0), 8))
  interop.save(model, {'params': params}, folder)
  return folder


@pytest.mark.slow
def test_the_python_runs_and_has_the_shapes_it_says(tmp_path):
  scope = {'source': checkpoint(tmp_path / 'in'), 'folder': tmp_path / 'out'}
  first = {}
  for block in blocks('python'):
    exec(compile(block, 'README.md', 'exec'), scope)
    first = {**scope, **first}  # names come again
  assert first['variables']['params']['experts']['w_in'].value.shape == (
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
  assert scope['made'].tokens.shape == (2, 16)
  assert interop.load(tmp_path / 'out')[0] == scope['model']
  assert scope['config'].evals.chosen.kind == 'choice'


def runs_as_package(name):
  return (ROOT / name / '__main__.py').exists()


def test_paths_exist():
  named = re.findall(r'`((?:configs|experiments|colab|tests)/[\w./]+)`', TEXT)
  named += [f'configs/{name}' for name in re.findall(r'`(\w+\.py)`', TEXT)]
  named += re.findall(r'--config=(configs/\w+\.py)', TEXT)
  named += [
    name.replace('.', '/') + '.py'
    for name in re.findall(r'python -m ((?:moe_jax|experiments)[\w.]+)', TEXT)
  ]
  assert len(named) > 8
  commands = {name.removesuffix('.py') for name in named}
  packages = {f'{name}.py' for name in commands if runs_as_package(name)}
  missing = [
    name
    for name in named
    if name not in packages and not (ROOT / name).exists()
  ]
  assert not missing


def test_config_keys_exist():
  from configs import base

  known = flatten(base.get_config())
  known = {*known, *base.get_config()}
  named = re.findall(r'--config\.([\w.]+)=', TEXT)
  named += re.findall(r'`config\.([\w.]+)`', TEXT)
  assert named
  assert not [key for key in named if key not in known]
