"""The embedded corpus: its files, their splits, and functions as pairs.

The oracles are `source_files` and `documented_functions`, which are judged on
files of the test.
"""

import hashlib

import pytest

from moe_jax.data import DocstringsSource, PythonStdlibSource, Selection
from moe_jax.data.sources import python_stdlib
from moe_jax.data.sources.python_stdlib import documented_functions

PART = PythonStdlibSource('email,json')


def texts(source, split):
  return list(source.texts(split))


def test_the_default_list_gives_8_megabytes():
  files = dict(python_stdlib.source_files())
  total = sum(len(text.encode()) for text in files.values())
  held_out = [n for n in files if python_stdlib.split_of(n) == 'validation']
  assert total >= 8_000_000
  assert 0.02 < len(held_out) / len(files) < 0.1
  folders = {part for name in files for part in name.split('/')[:-1]}
  assert not folders & {'test', 'tests', 'site-packages'}
  # Modules that distributions leave out are only had by name.
  assert not folders & {*python_stdlib.OPTIONAL_MODULES}
  names = [name for name, _ in python_stdlib.source_files(['encodings'])]
  assert 'encodings/ascii.py' in names


def test_listed_modules_alone_and_the_digest_of_names_and_text(tmp_path):
  for name in ('json/a.py', 'json/test/b.py', 'json/c.txt', 'csv.py', 'os.py'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(f'# {name} é', encoding='utf-8')
  (tmp_path / 'json' / 'latin.py').write_bytes(b'# \xe9')

  def files():
    return [*python_stdlib.source_files(['json', 'csv', 'wave'], tmp_path)]

  assert files() == [('csv.py', '# csv.py é'), ('json/a.py', '# json/a.py é')]
  digests = {python_stdlib.content_digest(files())}
  (tmp_path / 'json' / 'a.py').write_text('changed')
  digests.add(python_stdlib.content_digest(files()))
  (tmp_path / 'json' / 'a.py').rename(tmp_path / 'json' / 'b.py')
  digests.add(python_stdlib.content_digest(files()))
  assert len(digests) == 3
  (tmp_path / 'os.py').write_text('another module')
  assert python_stdlib.content_digest(files()) in digests


@pytest.mark.parametrize('split', ['train', 'validation'])
def test_functions_are_in_the_split_of_their_file(split):
  functions = [
    (source, docstring)
    for name, text in python_stdlib.source_files(['email', 'json'])
    for _, source, docstring in documented_functions(text)
    if python_stdlib.split_of(name) == split
  ]
  pairs = DocstringsSource('email,json').pairs().pairs(split)
  assert functions and sorted(pairs) == sorted(functions)


def test_the_order_and_the_parts_are_those_of_tfds():
  # TFDS orders examples by the md5 of the split's name and their keys.
  def ordered(split):
    files = [
      (hashlib.md5(f'{split}{name}'.encode()).digest(), text)
      for name, text in python_stdlib.source_files(['email', 'json'])
      if python_stdlib.split_of(name) == split
    ]
    return [text for _, text in sorted(files)]

  train, validation = ordered('train'), ordered('validation')
  cut = round(0.9 * len(train))
  for splits, *expected in (
    (('train', 'validation'), train, validation),
    (
      ('train[:90%]', 'train[90%:]+validation'),
      train[:cut],
      train[cut:] + validation,
    ),
    (('train[3:7]', 'all'), train[3:7], train + validation),
  ):
    source = PART.texts(Selection(splits))
    assert [texts(source, s) for s in ('train', 'validation')] == expected


def test_only_the_first_bytes_are_trained_on():
  whole = PART.texts()
  part = PythonStdlibSource('email,json', train_bytes=70000).texts()
  part_text, whole_text = (''.join(texts(s, 'train')) for s in (part, whole))
  assert len(part_text.encode()) == 70000 and whole_text.startswith(part_text)
  assert texts(part, 'validation') == texts(whole, 'validation')
  # A cut within a character leaves it out.
  assert [*python_stdlib.first_bytes(['ab', 'cé', 'd'], 4)] == ['ab', 'c']
  assert [*python_stdlib.first_bytes(['ab', 'cé', 'd'], 5)] == ['ab', 'cé']


def test_a_module_that_does_not_exist_is_named():
  with pytest.raises(ValueError, match="'jsn'; did you mean 'json'"):
    PythonStdlibSource('jsn').texts()


MODULE = '''
"""Not a function's."""

def plain(x):
  """Doubles é.

    And says
      so.
  """
  # Why.
  return 2 * x

def undocumented():
  return """Not one."""

class C:
  @property
  def method(self):
    "One line."
    text = """
    kept as it is"""
    return text

  async def only(self):
    """Nothing else to see."""

def one_line(): "é."; return 1

def outer():
  """Outer."""
  def inner():
    """Inner."""
    return 0
  return inner
'''

EXPECTED = {
  'Doubles é.\n\nAnd says\n  so.': (
    'def plain(x):\n  # Why.\n  return 2 * x'
  ),
  'One line.': (
    '@property\ndef method(self):\n  text = """\n  kept as it is"""\n'
    '  return text'
  ),
  'é.': 'def one_line(): return 1',
  'Outer.': (
    'def outer():\n  def inner():\n    """Inner."""\n    return 0\n'
    '  return inner'
  ),
  'Inner.': 'def inner():\n  return 0',
}  # fmt: skip


@pytest.mark.parametrize('line_end', ['\n', '\r\n'])
def test_functions_and_docstrings_by_hand(line_end):
  parts = list(documented_functions(MODULE.replace('\n', line_end)))
  assert {docstring: source for _, source, docstring in parts} == EXPECTED
  lines = MODULE.split('\n')
  for line, source, _ in parts:
    assert source.partition('def ')[2].split('(')[0] in lines[line - 1]


def test_old_modules_and_what_does_not_parse():
  # Old modules separate sections by a form feed, which Python counts as no
  # line.
  text = 'x = 1\n\x0c\ndef f():\n  """D."""\n  return x\n'
  assert [f[1] for f in documented_functions(text)] == ['def f():\n  return x']
  assert list(documented_functions('def f(:')) == []
  assert list(documented_functions('x = "\0"')) == []
