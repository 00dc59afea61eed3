"""The examples in the README of `moe_jax/data` run."""

import types

import numpy as np

from moe_jax import data
from moe_jax.config import read_options, section_of
from tests import test_readme


def test_the_printed_code_runs(tmp_path, monkeypatch):
  config_code, python_code, mixture_code, questions_code, own_kind_code = (
    test_readme.blocks('moe_jax/data/README.md')
  )
  (tmp_path / 'books').mkdir()
  for name in ('a', 'b'):
    (tmp_path / 'books' / f'{name}.txt').write_text('abcdefgh ' * 50)
  monkeypatch.chdir(tmp_path)
  names = {}
  exec(python_code, names)
  assert next(names['batches'])['tokens'].shape == (8, 128)
  options = {}
  exec(questions_code, {})
  for code in (config_code, mixture_code, own_kind_code):
    config = types.SimpleNamespace(data=section_of(data.DataOptions))
    exec(code, {'config': config})
    options[code] = read_options(data.DataOptions, config.data)
  dataset = data.load(options[config_code])
  assert dataset.digest == names['dataset'].digest
  assert data.load(options[own_kind_code]).source == 'counting to 3'
  # The printed order of sources is that of the mixture; sorted, 0 is reverse.
  mixture = data.load(options[mixture_code])
  part, number = mixture.splits['train'].locate(np.arange(8))
  assert part.tolist() == [1, 0, 1, 1, 1, 0, 1, 1]
  assert number.tolist() == [0, 0, 1, 2, 3, 1, 4, 5]
  assert mixture.per_period == {'reverse': 1, 'sums': 3}
