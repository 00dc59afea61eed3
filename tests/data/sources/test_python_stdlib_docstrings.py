"""Functions of the standard library, separated from their docstrings."""

import ast

import pytest

from moe_jax.data import DocstringsSource
from moe_jax.data.sources import python_stdlib
from moe_jax.data.sources.python_stdlib import documented_functions

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
def test_by_hand(line_end):
  documented_parts = list(documented_functions(MODULE.replace('\n', line_end)))
  assert {
    docstring: source for _, source, docstring in documented_parts
  } == EXPECTED
  lines = MODULE.split('\n')
  for line, source, _ in documented_parts:
    assert source.partition('def ')[2].split('(')[0] in lines[line - 1]


def test_a_form_feed_is_no_line():
  # Old modules separate sections by a form feed, which Python counts as no
  # line.
  text = 'x = 1\n\x0c\ndef f():\n  """D."""\n  return x\n'
  assert [f[1] for f in documented_functions(text)] == ['def f():\n  return x']


def test_what_does_not_parse_is_left_out():
  assert list(documented_functions('def f(:')) == []
  assert list(documented_functions('x = "\0"')) == []


@pytest.fixture(scope='module')
def functions():
  """Documented functions of every third file of the standard library."""
  files = list(python_stdlib.source_files(python_stdlib.ALL_MODULES))[::3]
  return [
    (name, *function)
    for name, text in files
    for function in documented_functions(text)
  ]


def test_the_standard_library_gives_thousands(functions):
  # Python 3.11 has 6,772 of them in all, 4,889 in the part that every
  # distribution installs.
  assert 1_300 < len(functions) < 4_000
  held_out = [f for f in functions if python_stdlib.split_of(f[0]) != 'train']
  assert 0.01 < len(held_out) / len(functions) < 0.12


def test_what_is_left_is_python_without_the_docstring(functions):
  for name, line, source, docstring in functions[::4]:
    (node,) = ast.parse(source).body
    assert ast.get_docstring(node) != docstring, (name, line)
    assert docstring == docstring.strip('\n')


def test_the_functions_of_a_file_are_in_its_split():
  source = DocstringsSource('email,json').pairs()
  for split in ('train', 'validation'):
    expected = [
      (function, docstring)
      for name, text in python_stdlib.source_files(['email', 'json'])
      for _, function, docstring in documented_functions(text)
      if python_stdlib.split_of(name) == split
    ]
    assert expected
    assert sorted(source.pairs(split)) == sorted(expected)
