"""Code in the READMEs runs, and the links and keys that they name exist."""

import json
import pathlib
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from flax import linen as nn

from moe_jax import interop, kernels, models, run_config
from moe_jax.config import flatten
from moe_jax.configs import base, mixtral_8x7b

ROOT = pathlib.Path(__file__).parents[1]
READMES = sorted(
  path.relative_to(ROOT)
  for path in (ROOT / 'README.md', *ROOT.glob('[a-z]*/README.md'))
) + sorted(path.relative_to(ROOT) for path in ROOT.glob('moe_jax/*/README.md'))
# Other tests run the code of these READMEs.
APART = (
  *('moe_jax/models', 'moe_jax/data', 'moe_jax/analysis', 'moe_jax/layers'),
  'moe_jax/kernels',
)
# The first line of a block of Python that the reader saves as this file.
SAVED = r'# (\w+\.py)\n'
each_readme = pytest.mark.parametrize('readme', READMES, ids=str)


def text_of(readme):
  return (ROOT / readme).read_text(encoding='utf-8')


def blocks(readme, language='python'):
  fenced = r'^```(\w*)\n(.*?)^```'
  matches = re.findall(fenced, text_of(readme), flags=re.DOTALL | re.MULTILINE)
  return [block for name, block in matches if name == language]


def mixtral(vocab_size):
  """Options of a small Mixtral."""
  options = run_config.read(mixtral_8x7b.get_config('runlocal'))
  return options.filled(vocab_size)


def checkpoint(folder, options):
  """A checkpoint of random parameters as transformers writes it."""
  key = jax.random.key(0)
  params = nn.meta.unbox(models.init_params(options.build(), key))
  interop.save(options.model, {'params': params}, folder)
  return folder


def run(readme, **variables):
  """Runs the Python blocks of a README that are no files, as one module."""
  name = 'readme_' + re.sub(r'\W', '_', str(readme))
  module = sys.modules[name] = types.ModuleType(name)
  vars(module).update(variables)
  for block in blocks(readme):
    if not re.match(SAVED, block):
      exec(compile(block, str(readme), 'exec'), vars(module))
  return vars(module)


def test_the_layer_of_the_readme_has_the_shapes_it_says():
  scope = run('README.md')
  kernel = scope['variables']['params']['experts']['w_in'].value
  assert kernel.shape == (8, 64, 256)
  aux = scope['aux']
  assert aux.stats.load.shape == (8,)
  np.testing.assert_allclose(aux.stats.load.sum(), 2 * aux.stats.tokens)
  options = run_config.read(scope['get_config']())
  assert options.model.moe.num_experts == 32
  assert type(options.model.moe.capacity).__name__ == 'PerAssignment'


@pytest.mark.slow
@pytest.mark.parametrize(
  'readme',
  [
    path
    for path in READMES
    if str(path.parent) not in (*APART, '.') and blocks(path)
  ],
  ids=str,
)
def test_the_python_of_a_room_runs(readme, tmp_path):
  variables = {}
  if 'source' in text_of(readme) and readme.parent.name == 'interop':
    variables = dict(
      source=checkpoint(tmp_path / 'in', mixtral(11)), folder=tmp_path / 'out'
    )
  scope = run(readme, **variables)
  if 'get_config' in scope:
    run_config.read(scope['get_config']())
  if 'y' in scope:
    assert np.isfinite(scope['y']).all()
  if 'output' in scope:
    assert scope['output'].tokens.shape[0] == 2
  if 'losses' in scope:
    assert scope['losses'][-1] < scope['losses'][0]


def test_twelve_files_can_be_read_in_an_hour():
  section = text_of('README.md').split('## Twelve files')[1].split('\n## ')[0]
  files = re.findall(r'^\| \[[^]]*\]\((.*?\.py)\)', section, re.MULTILINE)
  lines = sum(len(text_of(file).splitlines()) for file in files)
  assert len(files) == 12 and lines <= 2500


@pytest.mark.slow
def test_a_type_checker_finds_no_error_in_the_readers_code(tmp_path):
  pytest.importorskip('pyright')
  for number, readme in enumerate(('README.md', 'moe_jax/layers/README.md')):
    code = '\n\n'.join(blocks(readme))
    (tmp_path / f'mine_{number}.py').write_text(code)
  rules = {'typeCheckingMode': 'basic', 'extraPaths': [str(ROOT)]}
  (tmp_path / 'pyrightconfig.json').write_text(json.dumps(rules))
  command = [sys.executable, '-m', 'pyright', '-p', str(tmp_path)]
  checked = subprocess.run(command, capture_output=True, text=True)
  assert checked.returncode == 0, checked.stdout


@each_readme
def test_links_exist(readme):
  text, folder = text_of(readme), (ROOT / readme).parent
  links = re.findall(r'\]\((?!https?:)([^)#]+)', text)
  assert not [link for link in links if not (folder / link).exists()]


@each_readme
def test_config_keys_exist(readme):
  config = base.get_config()
  config_keys = {*flatten(config), *_sections_of(config)}
  keys = re.findall(r'--config\.([\w.]+)=', text_of(readme))
  keys += re.findall(r'`config\.([\w.]+)`', text_of(readme))
  assert not [key for key in keys if key not in config_keys]


def _sections_of(config, prefix=''):
  for key, value in config.items():
    if hasattr(value, 'items'):
      yield f'{prefix}{key}'
      yield from _sections_of(value, f'{prefix}{key}.')


def test_the_backend_of_the_kernels_readme_multiplies_as_blocks_do():
  scope = run(pathlib.Path('moe_jax/kernels/README.md'))
  np.testing.assert_allclose(
    scope['mask_product'], scope['block_product'], atol=1e-5
  )
  x, w, sizes = scope['x'], scope['w_in'], scope['sizes']
  _, vjp = jax.vjp(
    lambda w: kernels.grouped_matmul(x, w, sizes, backend='blocks'), w
  )
  dy = scope['mask_product']
  np.testing.assert_allclose(
    scope['outer'](x, dy, sizes), *vjp(dy), rtol=1e-4, atol=1e-4
  )
