"""The examples in the room's README hold."""

import pathlib
import re

from moe_jax import parallel

README = pathlib.Path(parallel.__file__).parent / 'README.md'
TEXT = README.read_text(encoding='utf-8')


def test_the_example_splits_a_kernel(capsys):
  (code,) = re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL)
  exec(compile(code, str(README), 'exec'), {})
  output = capsys.readouterr().out
  assert "'expert'" in output and output.count('None') == 2


def test_every_file_is_named():
  files = {path.name for path in README.parent.glob('*.py')}
  assert [n for n in files - {'__init__.py'} if n not in TEXT] == []
