"""Sources of a mixture as a line of text."""

import pytest

from moe_jax import run_config
from moe_jax.config import OptionError, read_options, section_of
from moe_jax.data import (
  DataOptions,
  FilesSource,
  MixtureOptions,
  PythonStdlibSource,
)
from tests.data.own_kinds import Counting

CONFIG = section_of(run_config.RunConfig)


def mixture(*overrides, config=CONFIG):
  return run_config.options_of(config, overrides)[0].data.mixture


def test_entries_have_a_kind_options_and_a_weight():
  lines = (
    'books:files(books/*.jsonl, field=body) * 2, py : python_stdlib(json), '
    'all:python_stdlib, part:python_stdlib(email, train_bytes=3)*.5,'
  )
  options = mixture(f'--config.data.mixture.lines={lines}')
  assert options == MixtureOptions(
    sources={
      'books': FilesSource('books/*.jsonl', 'body'),
      'py': PythonStdlibSource('json'),
      'all': PythonStdlibSource(),
      'part': PythonStdlibSource('email', 3),
    },
    rule='given',
    weights={'books': 2.0, 'part': 0.5},
  )
  # In Python it is the same; the section of a run stores the sources alone.
  assert MixtureOptions(lines=lines) == options
  section = section_of(DataOptions(mixture=options)).mixture
  assert section.lines == '' and section.sources.py.kind == 'python_stdlib'
  assert read_options(MixtureOptions, section) == options


def test_lines_of_a_file_with_comments_and_quotes():
  lines = (
    '# ours\na:files("a, (b)/*.txt")\n\n  # more\nb:files(b,field="x,y")\n'
  )
  assert MixtureOptions(lines=lines) == MixtureOptions(
    sources={'a': FilesSource('a, (b)/*.txt'), 'b': FilesSource('b', 'x,y')}
  )


def test_lines_add_to_the_sources_of_a_file():
  config = section_of(run_config.RunConfig)
  config.data.mixture.sources.py = {'kind': 'python_stdlib'}
  lines = '--config.data.mixture.lines=x:files(y)*3'
  options = mixture(lines, config=config)
  assert sorted(options.sources) == ['py', 'x'] and options.weights == {
    'x': 3.0
  }
  with pytest.raises(
    OptionError, match=r"'py:python_stdlib': there is a source 'py'"
  ):
    mixture('--config.data.mixture.lines=py:python_stdlib', config=config)


def test_options_of_a_mixture_have_an_effect_with_lines():
  options = mixture(
    '--config.data.mixture.lines=a:files(x),b:python_stdlib',
    '--config.data.mixture.rule=temperature',
    '--config.data.mixture.temperature=3.0',
    '--config.data.mixture.period=10',
  )
  assert (options.rule, options.temperature, options.period) == (
    'temperature',
    3.0,
    10,
  )


def test_a_class_of_ones_own():
  lines = 'own:tests.data.own_kinds:Counting(last=3)*2'
  assert MixtureOptions(lines=lines).sources == {'own': Counting(last=3)}


@pytest.mark.parametrize(
  ('lines', 'phrase'),
  [
    ('a:fils(x)', "entry 'a:fils(x)': unknown source 'fils'; did you mean"),
    ('a:files(x), b', "entry 'b': it is not of the form name:kind"),
    ('a:files(x', "'a:files(x' has an open bracket"),
    ('a:files("x)', 'open bracket or quote'),
    ('a:files', "'pattern' of files is missing"),
    ('a:files(x, y)', "option 'y' has no name"),
    ('a:files(x, colum=y)', "unknown option of files 'colum'"),
    ('a:files(x)*b', "weight 'b' is no number"),
    ('a:files(x)*-1', 'weights.a=-1.0'),
    ('a:files(x), a:files(y)', "entry 'a:files(y)': there is a source 'a'"),
    ('a:instructions(num_train=no)', "num_train='no' is a str"),
    ('1:files(x)', 'not of the form'),
  ],
)
def test_wrong_entries_are_named(lines, phrase):
  with pytest.raises(OptionError) as error:
    mixture(f'--config.data.mixture.lines={lines}')
  assert phrase in str(error.value)
  assert 'data.mixture.' in str(error.value)
