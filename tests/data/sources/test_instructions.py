"""Tasks with instructions: told examples, right answers, disjoint splits."""

import ast
import codecs
import collections
import itertools

import pytest

from moe_jax import data
from moe_jax.data import InstructionSource
from moe_jax.data.sources import instructions
from moe_jax.data.sources.instructions import (
  TASKS,
  ciphers,
  library,
  task_table,
)
from moe_jax.data.sources.instructions.contract import Dice, InstructionTask
from moe_jax.evaluation.scores import METRICS

USABLE = instructions.usable()
each_task = pytest.mark.parametrize('name', USABLE)


def test_the_suite_is_large_without_any_package():
  clusters = collections.defaultdict(list)
  for task in TASKS.values():
    if not task.needs:
      clusters[task.cluster].append(task.name)
  assert sum(map(len, clusters.values())) >= 24
  assert len(clusters) >= 8
  assert min(map(len, clusters.values())) >= 3
  assert {task.needs for task in TASKS.values()} == {'', 'django'}


@each_task
def test_every_task_keeps_the_contract(name):
  task = TASKS[name]
  assert task.name == name and task.metric in METRICS
  assert len(set(task.templates)) >= 3
  assert all(template.count('{question}') == 1 for template in task.templates)
  seen = set()
  for split in ('train', 'validation'):
    for i in range(12):
      question = task(split, i)
      assert question.target and question.inputs
      assert question == task(split, i)  # whatever was asked before
      if question.choices:
        assert question.target in question.choices
        assert len(set(question.choices)) == len(question.choices) > 1
        assert all(f'\n- {c}' in question.inputs for c in question.choices)
      seen.add(question.inputs)
  assert len(seen) > 12


@each_task
def test_splits_have_no_question_in_common(name):
  def keys(split, count):
    drawn = (TASKS[name].drawn(split, i)[0] for i in range(count))
    return {each.key or each.question for each in drawn}

  # As many as a small space of questions has would meet without the rule.
  assert not keys('train', 150) & keys('validation', 30)


def test_told_examples():
  # These are the same on every machine.
  assert TASKS['reverse']('validation', 0)[:2] == (
    'What is pkvabt from its last letter to its first?',
    'tbavkp',
  )
  assert TASKS['larger']('validation', 0)[:3] == (
    '1034 2693\nThe larger one is\n- 1034\n- 2693',
    '2693',
    ('1034', '2693'),
  )
  assert TASKS['caesar']('validation', 0)[:2] == (
    'Move the letters of rfht by 4 in the alphabet.',
    'vjlx',
  )


def test_examples_before_the_question_are_of_the_training_split():
  task = TASKS['add']
  question = task('validation', 3, num_shots=2)
  one, two, asked = question.inputs.split('\n\n')
  for shot in (one, two):
    told, answer = shot.rsplit('\n', 1)
    a, _, b = (word for word in told.replace('?', '').split() if word[-1] in
               '0123456789+')  # fmt: skip
    assert int(a) + int(b) == int(answer)
  # The same instruction as without examples, and the same answer.
  assert asked == task('validation', 3).inputs
  assert question.target == task('validation', 3).target
  assert one != two


# The answers by another way than that of the tasks.
SOLVERS = {
  'copy': lambda q: q,
  'reverse': lambda q: ''.join(reversed(q)),
  'reverse_words': lambda q: ' '.join(reversed(q.split())),
  'sort_words': lambda q: ' '.join(sorted(q.split())),
  'same': lambda q: 'yes' if len({*q.split(' | ')}) == 1 else 'no',
  'add': lambda q: str(eval(q)),
  'subtract': lambda q: str(eval(q)),
  'multiply': lambda q: str(eval(q)),
  'larger': lambda q: max(q.split(), key=int),
  'next_number': lambda q: str(2 * int(q.split()[3]) - int(q.split()[2])),
  'next_power': lambda q: str(int(q.split()[2]) ** 2 // int(q.split()[1])),
  'largest': lambda q: max(q.split(), key=int),
  'direction': lambda q: {1: 'up', -1: 'down', 0: 'neither'}[direction(q)],
  'rot13': lambda q: codecs.encode(q, 'rot13'),
  'caesar': lambda q: ''.join(
    chr((ord(c) - 97 + int(q.split()[2])) % 26 + 97) for c in q.split()[0]
  ),
  'atbash': lambda q: ''.join(chr(219 - ord(c)) for c in q),
  'to_morse': lambda q: ' '.join(ciphers.MORSE[c] for c in q),
  'from_morse': lambda q: ''.join(
    {v: k for k, v in ciphers.MORSE.items()}[code] for code in q.split()
  ),
  'lookup': lambda q: dict(part.split('=') for part in q.split(';')[0].split())[
    q[-2]
  ],
  'item': lambda q: q.split()[int(q.split()[0]) + 1],
  'missing': lambda q: next(
    w for w in q.split(' | ')[0].split() if w not in q.split(' | ')[1].split()
  ),
  'contains': lambda q: 'yes' if q.split()[0] in q.split()[2:] else 'no',
  'count_letters': lambda q: str(list(q.split()[2]).count(q[0])),
  'length': lambda q: str(sum(1 for _ in q)),
  'initials': lambda q: ''.join(word[:1] for word in q.split(' ')),
  'upper': lambda q: ''.join(chr(ord(c) - 32) for c in q),
  'palindrome': lambda q: (
    'yes' if all(q[i] == q[-1 - i] for i in range(len(q))) else 'no'
  ),
}


def direction(question):
  numbers = [*map(int, question.split())]
  steps = {a < b for a, b in itertools.pairwise(numbers)}
  return 0 if len(steps) == 2 else 1 if steps == {True} else -1


@pytest.mark.parametrize('name', SOLVERS)
def test_answers_are_right(name):
  answers = set()
  for i in range(40):
    drawn, _ = TASKS[name].drawn('train', i)
    assert SOLVERS[name](drawn.question) == drawn.answer, drawn
    answers.add(drawn.answer)
  assert not drawn.choices or len(answers) > 1


def test_morse_code_is_the_standards():
  told = {'e': '.', 't': '-', 's': '...', 'o': '---', 'q': '--.-', 'z': '--..'}
  assert {letter: ciphers.MORSE[letter] for letter in told} == told


def test_answers_on_code_are_right():
  for i in range(40):
    drawn, _ = TASKS['count_arguments'].drawn('train', i)
    arguments = ast.parse(drawn.question).body[0].args
    names = ast.unparse(arguments).replace('*, ', '').replace('/, ', '')
    count = len([a for a in ast.walk(arguments) if isinstance(a, ast.arg)])
    first = names.split(',')[0].strip()
    assert int(drawn.answer) == count - (first in ('self', 'cls'))
    drawn, _ = TASKS['repair_indentation'].drawn('train', i)
    ast.parse(drawn.answer)
    lines = [line.strip() for line in drawn.answer.split('\n')]
    assert drawn.question.split('\n') == lines
    drawn, _ = TASKS['name_function'].drawn('train', i)
    assert drawn.question.startswith('def f(')


def test_functions_of_the_library_are_short_and_different():
  functions = library.functions()
  assert len(functions) > 500
  assert len({f.source for f in functions}) == len(functions)


def test_dice_are_the_same_on_every_machine():
  dice = Dice('a')
  assert [dice.below(100) for _ in range(4)] == [27, 6, 59, 64]
  assert sorted(Dice('b').some(range(5), 5)) == list(range(5))


def test_a_task_without_an_example_of_a_split():
  task = InstructionTask('x', 'y', ('{question}',), lambda dice: ('q', 'a'))
  with pytest.raises(ValueError, match='example -1 of'):
    task('train', -1)
  with pytest.raises(ValueError, match="no example of split 'test'"):
    TASKS['add']('test', 0)


def test_a_source_has_the_examples_of_its_task():
  source = InstructionSource('rot13', num_train=5, num_validation=3)
  pairs = source.pairs()
  assert len(list(pairs.pairs('train'))) == 5
  questions = source.questions()
  assert [tuple(q[:2]) for q in questions] == list(pairs.pairs('validation'))
  assert source.cluster == 'ciphers'
  more = InstructionSource('rot13', num_train=7).pairs()
  assert list(more.pairs('train'))[:5] == list(pairs.pairs('train'))
  assert more.identity != pairs.identity
  with pytest.raises(ValueError, match=r"'rot12'; did you mean 'rot13'"):
    InstructionSource('rot12')


def test_a_task_whose_package_is_missing(monkeypatch):
  monkeypatch.setattr(instructions.importlib.util, 'find_spec', lambda n: None)
  assert 'into_german' not in instructions.usable()
  with pytest.raises(ValueError, match='needs the package django'):
    InstructionSource('into_german').pairs()
  assert 'into_german: needs django' in '\n'.join(task_table.lines())


def test_translations_are_of_one_split_in_all_directions():
  pytest.importorskip('django')
  drawn, _ = TASKS['language'].drawn('train', 0)
  assert drawn.answer in ('German', 'Spanish', 'French')
  english, _ = TASKS['into_english'].drawn('train', 0)
  assert english.key == english.answer


def test_the_table_has_every_task():
  text = '\n'.join(task_table.lines())
  assert all(f'\n{name} (' in text for name in USABLE)
  assert '  > tbavkp' in text and data.SOURCES.builtin['instructions']
