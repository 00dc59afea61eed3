"""Questions with answers, from docstrings, files and TFDS datasets."""

import json
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from moe_jax.data import (
  ChoiceFilesSource,
  Item,
  Selection,
)
from moe_jax.data.choices import (
  ChoiceTfdsSource,
  DocstringChoiceSource,
  with_distractors,
)

PART = DocstringChoiceSource('asyncio,email,json')


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
  train, validation = PART.items('train'), PART.items('validation')
  assert len(train) > 100 and len(validation) > 5
  assert PART.items('train') == train
  (loads,) = (
    item for item in train + validation if item.prompt.startswith('def loads(')
  )
  assert loads.answers[loads.label].startswith('Deserialize ``s``')
  assert all(len(set(item.answers)) == 4 for item in train)
  assert '\n' not in ''.join(a for item in train for a in item.answers)
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


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('{', r'a\.jsonl, line 2 is no JSON'),
    ('[]', r"line 2 is no object with \['answers', 'label', 'prompt'\]"),
    (line(label=2), 'label=2 is no index of 2 answers'),
    (line(label='1'), "label='1' is no index"),
    (line(answers=['x']), r"answers=\['x'\] are to be two or more"),
    (line(answers=['x', 'x']), 'and different'),
    (line(answers='xy'), "answers='xy' are no list of texts"),
    (line(prompt=''), "prompt='' is to be a text"),
  ],
)
def test_a_line_that_is_no_item(tmp_path, text, message):
  (tmp_path / 'a.jsonl').write_text(line() + '\n' + text)
  with pytest.raises(ValueError, match=message):
    ChoiceFilesSource(f'{tmp_path}/a.jsonl').items('validation')


def test_sources_that_do_not_exist(tmp_path):
  with pytest.raises(ValueError, match=r'no file matches .*no\.jsonl'):
    ChoiceFilesSource(f'{tmp_path}/no.jsonl').items('validation')
  (tmp_path / 'a.jsonl').write_text('\n')
  with pytest.raises(ValueError, match=r'1 files of .* are empty'):
    ChoiceFilesSource(f'{tmp_path}/a.jsonl').items('validation')


class Quiz(tfds.core.GeneratorBasedBuilder):
  """A dataset of nine questions, in the formats of ARC and PIQA."""

  VERSION = tfds.core.Version('1.3.0')

  def _info(self):
    text = tfds.features.Text()
    features = {
      'goal': text,
      'choices': tfds.features.Sequence(text),
      'sol1': text,
      'sol2': text,
      'key': tfds.features.ClassLabel(num_classes=3),
      'truth': np.bool_,
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for i in range(9):
      yield (
        i,
        {
          'goal': f'goal {i} ü',
          'choices': [f'{c}{i}' for c in 'abc'],
          'sol1': f'no {i}',
          'sol2': f'yes {i}',
          'key': i % 3,
          'truth': i % 2,
        },
      )


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tfds')
  Quiz(data_dir=folder, file_format='array_record').download_and_prepare()
  return folder


def test_features_of_a_tfds_dataset(folder, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(folder))
  splits = 'train[:6]', 'train[6:]'

  def items(split, answers, label):
    source = ChoiceTfdsSource('quiz', 'goal', answers, label)
    return list(source.items(split, Selection(splits)))

  items_of_choices = items('train', 'choices', 'key') + items(
    'validation', 'choices', 'key'
  )
  assert sorted(items_of_choices) == [
    Item(f'goal {i} ü', (f'a{i}', f'b{i}', f'c{i}'), i % 3) for i in range(9)
  ]
  items_of_features = items('validation', 'sol1,sol2', 'truth')
  assert len(items_of_features) == 3
  for item in items_of_features:
    i = int(item.prompt.split()[1])
    assert item == Item(f'goal {i} ü', (f'no {i}', f'yes {i}'), i % 2)
  with pytest.raises(
    ValueError, match=r"answers_feature .*'sol3'; did you mean"
  ):
    items('train', 'sol1,sol3', 'truth')
  assert 'tensorflow' not in sys.modules
