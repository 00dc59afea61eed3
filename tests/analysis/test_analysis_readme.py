"""The examples in the room's README run, and it names every file."""

import pathlib
import re

import numpy as np

from moe_jax import analysis

README = pathlib.Path(analysis.__file__).parent / 'README.md'
TEXT = README.read_text(encoding='utf-8')


def test_the_example_counts_pairs_of_experts(capsys):
  (code,) = re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL)
  scope = {'__name__': 'readme'}
  exec(compile(code, str(README), 'exec'), scope)
  # Every sparse layer has 8 rows of 16 tokens, each with two choices.
  first, *rest = capsys.readouterr().out.splitlines()
  assert first == '{1: 256, 3: 256}'
  assert rest[0].startswith('parameters: ')
  for matrix in scope['matrices'].values():
    np.testing.assert_array_equal(matrix, matrix.T)
    # Each token is in one pair of different experts, counted both ways.
    assert matrix.sum() == 2 * 256


def test_every_file_is_named():
  files = {path.name for path in README.parent.glob('*.py')}
  assert [name for name in files - {'__init__.py'} if name not in TEXT] == []
