"""Questions with answers, from docstrings, files and TFDS datasets."""

import json

import pytest

from moe_jax.data import (
  SPLITS,
  ChoiceFilesSource,
  DocstringsSource,
  Item,
  Selection,
)
from moe_jax.data.choices import (
  ChoiceTfdsSource,
  DocstringChoiceSource,
  with_distractors,
)


def test_wrong_answers_are_those_of_pairs_far_away():
  # Wrong answers of one of eight pairs are those of the pairs two, four and six
  # further on, cyclically. The place of the right answer moves by one from item
  # to item.
  items = with_distractors([(f'p{i}', f'a{i}') for i in range(8)])
  assert items[0] == Item('p0', ('a0', 'a2', 'a4', 'a6'), 0)
  assert items[1] == Item('p1', ('a3', 'a1', 'a5', 'a7'), 1)
  assert items[7] == Item('p7', ('a1', 'a3', 'a5', 'a7'), 3)
  # An answer that is already among the item's is skipped for the next pair's.
  pairs = [(f'p{i}', f'a{i}') for i in range(8)]
  pairs[2] = ('p2', 'a0')
  assert with_distractors(pairs)[0].answers == ('a0', 'a3', 'a4', 'a6')
  with pytest.raises(ValueError, match='5 pairs have fewer than 4 answers'):
    with_distractors([('p', a) for a in 'abcaa'])


def test_which_docstring_is_a_functions():
  source = DocstringChoiceSource('asyncio,email,json')
  train, validation = source.items('train'), source.items('validation')
  pairs = DocstringsSource('asyncio,email,json').pairs().pairs('train')
  first_lines = {(f, text.split('\n')[0].strip()) for f, text in pairs}
  assert len(train) > 100 and len(validation) > 5
  for item in train:
    assert len(set(item.answers)) == 4
    assert (item.prompt, item.answers[item.label]) in first_lines
  assert {item.label for item in validation} == {0, 1, 2, 3}


def line(**changes):
  item = {'prompt': 'q', 'answers': ['x', 'y'], 'label': 1}
  return json.dumps({**item, **changes})


def test_lines_of_files(tmp_path):
  (tmp_path / 'b.jsonl').write_text(line(prompt='ü') + '\n')
  (tmp_path / 'a.jsonl').write_text(line(note='z') + '\n\n' + line(label=0))
  items = ChoiceFilesSource(f'{tmp_path}/*.jsonl').items('validation')
  assert items[0] == Item('q', ('x', 'y'), 1)
  assert [item.label for item in items] == [1, 0, 1]
  assert items[2].prompt == 'ü'


def test_files_without_an_item_are_refused(tmp_path):
  path = tmp_path / 'a.jsonl'
  # Lines that are no items are told in tests/bad_inputs.
  for text, message in (
    (f'{line()}\n[]', r"line 2 is no object with \['answers', 'label', 'pro"),
    (line(answers='xy'), "answers='xy' are no list of texts"),
    ('\n', r'1 files of .* are empty'),
  ):
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
      ChoiceFilesSource(str(path)).items('validation')


def test_features_of_a_tfds_dataset(tfds_data):
  splits = 'train[:6]', 'train[6:]+validation'

  def items(split, answers, label):
    source = ChoiceTfdsSource('examples', 'line', answers, label)
    return list(source.items(split, Selection(splits)))

  one_feature = [i for s in SPLITS for i in items(s, 'choices', 'key')]
  assert sorted(one_feature) == sorted(
    Item(f'poém {i}', (f'a{i}', f'b{i}', f'c{i}'), i % 3) for i in range(25)
  )
  several = items('train', 'sol1,sol2', 'truth')
  assert len(several) == 6
  for item in several:
    i = int(item.prompt.split()[1])
    assert item == Item(f'poém {i}', (f'no {i}', f'yes {i}'), i % 2)
  with pytest.raises(ValueError, match=r"answers_feature .*'sol3'; did"):
    items('train', 'sol1,sol3', 'truth')
