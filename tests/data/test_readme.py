"""The examples in the room's README run."""

import pathlib
import re
import types

from moe_jax import data, sections

README = pathlib.Path(data.__file__).parent / 'README.md'


def test_the_printed_code_runs(tmp_path, monkeypatch):
  in_config, in_python, own = re.findall(
    r'```python\n(.*?)```', README.read_text(), re.DOTALL
  )
  (tmp_path / 'books').mkdir()
  for name in ('a', 'b'):
    (tmp_path / 'books' / f'{name}.txt').write_text('abcdefgh ' * 50)
  monkeypatch.chdir(tmp_path)
  names = {}
  exec(in_python, names)
  assert next(names['batches'])['tokens'].shape == (8, 128)
  options = {}
  for code in (in_config, own):
    config = types.SimpleNamespace(data=sections.section(data.DataOptions))
    exec(code, {'config': config})
    options[code] = sections.read(data.DataOptions, config.data)
  dataset = data.load(options[in_config])
  assert dataset.digest == names['dataset'].digest
  assert data.load(options[own]).source == 'counting to 3'


def test_every_kind_is_listed():
  text = README.read_text()
  for kinds in (data.SOURCES, data.TASKS):
    for name in kinds.builtin:
      assert f'`{name}`' in text
