"""Mixtures of sources, from options or a line of text to batches."""

import json

import numpy as np
import pytest

from moe_jax import data, run_config
from moe_jax.config import OptionError, read_options, section_of
from moe_jax.data import (
  DataOptions,
  FilesSource,
  InstructionSource,
  MixtureOptions,
  PythonStdlibSource,
  train_batches,
)
from tests.data.own_kinds import Counting

CONFIG = section_of(run_config.RunConfig)


def suite(**tasks):
  return {
    name: InstructionSource(task=task, num_train=30, num_validation=5)
    for name, task in tasks.items()
  }


def options(tmp_path, mixture, **changes):
  changes = {'task': data.Seq2SeqTask(), 'seq_len': 64, **changes}
  return DataOptions(mixture=mixture, cache_dir=str(tmp_path), **changes)


@pytest.mark.parametrize(
  ('rule', 'shares'),
  [
    ({}, [900, 100]),
    ({'cap': 300}, [300, 100]),
    ({'rule': 'temperature'}, [30, 10]),
    ({'rule': 'temperature', 'temperature': 1.0, 'cap': 400}, [400, 100]),
    ({'rule': 'given', 'weights': {'b': 2.5}}, [1, 2.5]),
  ],
)
def test_the_rules_of_weights(rule, shares):
  mixture = MixtureOptions(sources=suite(a='copy', b='add'), **rule)
  weights = mixture.shares({'a': 900, 'b': 100})
  assert weights == pytest.approx(dict(zip('ab', shares)))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'rule': 'given', 'weights': {'aa': 1.0}}, "'aa'; did you mean 'a'"),
    ({'rule': 'given', 'weights': {'a': -1.0}}, 'weights.a=-1.0'),
    ({'weights': {'a': 1.0}}, 'weights=.*has no effect unless'),
    ({'rule': 'given', 'cap': 3}, "cap=3 has no effect with rule='given'"),
    ({'temperature': 3.0}, "temperature=3.0 has no effect unless rule is 'te"),
    ({'held_out': 'ciphers'}, "held_out: .*'ciphers'.*'arithmetic'"),
    ({'held_out': 'a, arithmetic'}, 'leaves none to learn from'),
    (
      {'rule': 'given', 'weights': {'b': 2.0}, 'held_out': 'arithmetic'},
      r"weights.b=2.0 has no effect, since held_out='arithmetic'",
    ),
    ({'sources': suite(mean='copy')}, 'names of means over sources'),
    ({'sources': {}, 'period': 3}, 'period=3 has no effect without sources'),
  ],
)
def test_what_would_be_in_vain_is_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    MixtureOptions(**{'sources': suite(a='copy', b='add'), **changes})


def test_what_is_learned_and_what_is_held_out(tmp_path):
  rule = dict(rule='given', weights={'a': 2.0}, held_out='c', period=3)
  mixture = MixtureOptions(
    sources=suite(a='copy', b='reverse', c='add'), **rule
  )
  dataset = data.load(options(tmp_path, mixture))
  assert dataset.per_period == {'a': 2, 'b': 1}
  assert '\n  c  held out: 30 pairs' in dataset.describe()
  row = {'a': 1.5, 'b': 2.0, 'c': 50.0, 'c.chance': 25.0, 'mean': 1.75}
  assert dataset.tell(row).splitlines() == [
    '',
    '  arithmetic (held out): c 50, c.chance 25',
    '  sequences: a 1.5, b 2',
    '  mean 1.75',
  ]
  assert dataset.tell({'bleu': 2.0, 'exact': 0.5}) == 'bleu 2, exact 0.5'
  assert dataset.counts['train']['pairs'] == 60
  pairs = list(data.read_pairs(options(tmp_path, mixture), 'validation'))
  assert pairs == [
    pair
    for name in 'ab'  # what is held out is not learned
    for pair in mixture.sources[name].pairs().pairs('validation')
  ]


@pytest.mark.parametrize('target_len', [0, 16])
def test_every_token_has_the_task_of_its_source(tmp_path, target_len):
  # Ids are numbers in the sorted names of all sources, held-out ones too.
  mixture = MixtureOptions(
    sources=suite(c='copy', a='reverse', b='add'), held_out='b', period=4
  )
  data_options = options(tmp_path, mixture, target_len=target_len)
  assert data_options.tasks == ('a', 'b', 'c')
  dataset = data.load(data_options)
  rows = dataset.splits['train']
  batch = next(train_batches(rows, batch_size=4, seed=0, start=0))
  assert batch['task_ids'][:, 0].tolist() == [0, 2, 0, 2]
  sides = ['', 'encoder_'] if target_len else ['']
  assert [n for n in batch if 'task' in n] == [f'{s}task_ids' for s in sides]
  for side in sides:
    ids = batch[f'{side}task_ids']
    assert ids.dtype == np.int32 and ids.shape == batch[f'{side}tokens'].shape
    assert (ids == batch['task_ids'][:, :1]).all()
  held_out = dataset.parts['b'].splits['validation'].take(np.array([0]))
  assert (held_out['task_ids'] == 1).all()
  eval_rows = dataset.splits['validation']
  tasks = eval_rows.take(np.arange(len(eval_rows)))['task_ids'][:, 0]
  lengths = [len(part) for part in eval_rows.parts.values()]
  assert tasks.tolist() == [0] * lengths[0] + [2] * lengths[1]


def test_texts_share_a_tokenizer_that_is_fitted_once(tmp_path, monkeypatch):
  sources = {}
  for name, text in (('one', 'abcab ' * 40), ('two', 'xyz. ' * 40)):
    (tmp_path / f'{name}.txt').write_text(text)
    sources[name] = FilesSource(str(tmp_path / f'{name}.txt'))
  rule = dict(rule='given', weights={'two': 3.0}, period=4)
  data_options = options(
    tmp_path / 'cache',
    MixtureOptions(sources=sources, **rule),
    task=data.LmTask(),
    tokenizer=data.CharsOptions(),
    seq_len=8,
  )
  for _ in range(2):  # first fresh, then from the cache
    dataset = data.load(data_options)
    assert dataset.vocab_size == len(set('abc xyz.'))
    rows = dataset.splits['train']
    batch = next(train_batches(rows, batch_size=4, seed=0, start=0))
    texts = [dataset.tokenizer.decode(row) for row in batch['tokens']]
    assert [set(text) <= set('abc ') for text in texts] == [
      False, True, False, False,
    ]  # fmt: skip
    monkeypatch.setattr(data.CharsOptions, 'fit', lambda *_: pytest.fail('2'))
  monkeypatch.undo()
  (tmp_path / 'two.txt').write_text('xyz! ' * 40)
  changed = data.load(data_options).tokenizer
  assert changed.identity != dataset.tokenizer.identity


class Defective(Counting):
  """A user's source with a mistake in its code."""

  def texts(self, selection=None):
    """Reads no number."""
    return int('three')


def test_a_bad_source_is_named_and_a_defect_is_no_bad_input(tmp_path):
  (tmp_path / 'a.jsonl').write_text(json.dumps({'inputs': 'x'}))
  sources = suite(b='copy') | {'a': data.JsonlSource(str(tmp_path / 'a.jsonl'))}
  with pytest.raises(ValueError, match=r'mixture.sources.a: .*a.jsonl, line 1'):
    data.load(options(tmp_path, MixtureOptions(sources=sources)))
  mixture = MixtureOptions(sources={'a': Defective(), 'b': Counting()})
  with pytest.raises(ValueError, match=r'^invalid literal'):
    data.load(options(tmp_path, mixture, task=data.LmTask()))


def test_shrunk_keeps_what_is_embedded():
  sources = {**suite(b='copy'), 'a': data.JsonlSource('x')}
  large = DataOptions(
    mixture=MixtureOptions(sources=sources, held_out='sequences'),
    task=data.Seq2SeqTask(),
  )
  small = large.shrunk().mixture
  assert small.sources['b'].task == 'copy' and small.learned() == ['a']
  assert small.sources['a'] == data.DocstringsSource()


# Sources in a line of text follow.


def read(*overrides, config=CONFIG):
  return run_config.options_of(config, overrides)[0].data.mixture


def test_entries_have_a_kind_options_and_a_weight():
  lines = (
    'books:files(books/*.jsonl, field=body) * 2, py : python_stdlib(json), '
    'all:python_stdlib, part:python_stdlib(email, train_bytes=3)*.5,'
    'own:tests.data.own_kinds:Counting(last=3)\n'
    '# ours\n\n  # more\nb:files("a, (b)/*.txt",field="x,y")\n'
  )
  options = read(f'--config.data.mixture.lines={lines}')
  assert options == MixtureOptions(
    sources={
      'books': FilesSource('books/*.jsonl', 'body'),
      'py': PythonStdlibSource('json'),
      'all': PythonStdlibSource(),
      'part': PythonStdlibSource('email', 3),
      'own': Counting(last=3),
      'b': FilesSource('a, (b)/*.txt', 'x,y'),
    },
    rule='given',
    weights={'books': 2.0, 'part': 0.5},
  )
  # In Python it is the same; the section of a run stores the sources alone.
  assert MixtureOptions(lines=lines) == options
  section = section_of(DataOptions(mixture=options)).mixture
  assert section.lines == '' and section.sources.py.kind == 'python_stdlib'
  assert read_options(MixtureOptions, section) == options


def test_lines_add_to_the_sources_and_options_of_a_file():
  config = section_of(run_config.RunConfig)
  config.data.mixture.sources.py = {'kind': 'python_stdlib'}
  config.data.mixture.rule = 'temperature'
  lines = '--config.data.mixture.lines=x:files(y)'
  options = read(lines, '--config.data.mixture.period=10', config=config)
  assert sorted(options.sources) == ['py', 'x']
  assert (options.rule, options.period) == ('temperature', 10)
  with pytest.raises(OptionError, match="'py:python_stdlib': there is a sou"):
    read('--config.data.mixture.lines=py:python_stdlib', config=config)


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
    ('a:files(x), a:files(y)', "entry 'a:files(y)': there is a source 'a'"),
    ('a:instructions(num_train=no)', "num_train='no' is a str"),
  ],
)
def test_wrong_entries_are_named(lines, phrase):
  with pytest.raises(OptionError) as error:
    read(f'--config.data.mixture.lines={lines}')
  assert phrase in str(error.value)
  assert 'data.mixture.' in str(error.value)
