"""Tasks with instructions: fixed examples, right answers, disjoint splits."""

import ast
import codecs
import itertools
import string

import pytest

from moe_jax.data import InstructionSource
from moe_jax.data.sources import instructions
from moe_jax.data.sources.instructions import TASKS, Drawn, InstructionTask
from moe_jax.data.sources.python_stdlib import split_of
from moe_jax.evaluation.scores import METRICS


def test_told_examples():
  # These examples are the same on every machine.
  for name, *told in (
    ('reverse', 'Reverse: tlvtm', 'mtvlt', ()),
    (
      'larger',
      'Which of these two numbers is larger?\n4285 8132\n- 4285\n- 8132',
      '8132',
      ('4285', '8132'),
    ),
    ('caesar', 'Encipher with a Caesar cipher: qkwnly by 5', 'vpbsqd', ()),
  ):
    assert [*TASKS[name]('validation', 0)][:3] == told


def test_examples_before_the_question_are_of_the_training_split():
  task = TASKS['add']
  question = task('validation', 3, num_shots=2)
  first_shot, second_shot, final_question = question.inputs.split('\n\n')
  for shot in (first_shot, second_shot):
    sum_text, answer = shot.rsplit('\n', 1)
    a, _, b = (word for word in sum_text.replace('?', '').split() if word[-1] in
               '0123456789+')  # fmt: skip
    assert int(a) + int(b) == int(answer)
  # The same instruction as without examples, and the same answer.
  assert final_question == task('validation', 3).inputs
  assert question.target == task('validation', 3).target
  assert first_shot != second_shot


MORSE = (
  '.- -... -.-. -.. . ..-. --. .... .. .--- -.- .-.. -- -. --- .--. --.- .-. '
  '... - ..- ...- .-- -..- -.-- --..'
)
# Each function finds the answer in another way than its task does.
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
  'to_morse': lambda q: ' '.join(MORSE.split()[ord(c) - 97] for c in q),
  'from_morse': lambda q: ''.join(
    chr(97 + MORSE.split().index(code)) for code in q.split()
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


@pytest.mark.parametrize('name', TASKS)
def test_every_task_keeps_the_contract(name):
  task = TASKS[name]
  assert task.name == name and task.metric in METRICS
  assert len(set(task.templates)) >= 3
  assert all(template.count('{}') == 1 for template in task.templates)
  unique_inputs = set()
  for split in ('train', 'validation'):
    for i in range(12):
      question = task(split, i)
      assert question.target and question.inputs
      assert question == task(split, i)  # whatever was asked before
      if question.choices:
        assert question.target in question.choices
        assert len(set(question.choices)) == len(question.choices) > 1
        assert all(f'\n- {c}' in question.inputs for c in question.choices)
      unique_inputs.add(question.inputs)
  assert len(unique_inputs) > 12
  # Splits have no question in common; without the rule, those of a task with
  # few questions would share some.
  draws = [task.drawn('train', i)[0] for i in range(150)]
  held_out = [task.drawn('validation', i)[0] for i in range(30)]
  keys, others = ({d.key or d.question for d in s} for s in (draws, held_out))
  assert not keys & others
  if name in SOLVERS:
    for drawn in draws[:40]:
      assert SOLVERS[name](drawn.question) == drawn.answer, drawn
  assert not task('train', 0).choices or len({d.answer for d in draws}) > 1


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


@pytest.mark.parametrize(
  ('source', 'returns'),
  [
    ('def a(x):\n  return x', True),
    ('def a(x):\n  if x:\n    return 1\n  raise ValueError', True),
    ('def a(x):\n  return None', False),
    ('def a(x):\n  return', False),
    ('def a(x):\n  def b():\n    return x\n  x(b)', False),
    ('def a(x):\n  call(lambda: (yield x))', False),
  ],
)
def test_a_return_of_its_own_with_a_value(source, returns):
  function = instructions.function_of(source, 'It works.')
  assert function and function.returns == returns
  # A generator is no function of the suite.
  assert instructions.function_of('def a(x):\n  yield x', 'It works.') is None


def test_a_task_with_too_few_examples():
  split = 'train' if split_of('q') == 'train' else 'validation'
  (empty,) = {'train', 'validation'} - {split}
  task = InstructionTask('x', 'y', ('{}',), lambda _: Drawn('q', 'a'))
  with pytest.raises(ValueError, match=f'no example of split {empty!r} in'):
    task(empty, 0)
  # The next task has only two training examples to show.
  keys = [key for key in string.ascii_letters if split_of(key) == 'train'][:2]
  task = InstructionTask('x', 'y', ('{}',), lambda d: Drawn(d.one(keys), 'a'))
  assert task('train', 0, num_shots=1).inputs.count('\n\n') == 1
  with pytest.raises(ValueError, match=r'besides 2 others in .* fewer shots'):
    task('train', 0, num_shots=2)


def test_no_example_is_about_what_is_asked():
  # A function that is cut at another line, or the same message in another
  # language, would give the answer away.
  def draw(dice):
    key = dice.one(keys)
    return Drawn(f'{key} in {dice.below(9)} words', key, key=key)

  keys = [key for key in string.ascii_letters if split_of(key) == 'train'][:4]
  task = InstructionTask('x', 'y', ('{}',), draw)
  for i in range(20):
    questions = task('train', i, num_shots=3).inputs.split('\n\n')
    assert len({question[0] for question in questions}) == 4


def test_a_source_has_the_examples_of_its_task():
  pairs = InstructionSource('rot13', num_train=5, num_validation=3).pairs()
  expected = [TASKS['rot13']('train', i)[:2] for i in range(5)]
  assert list(pairs.pairs('train')) == expected
  assert InstructionSource('rot13').cluster == 'ciphers'
  with pytest.raises(ValueError, match=r"'rot12'; did you mean 'rot13'"):
    InstructionSource('rot12')


def subjects(names, split, count):
  drawn = (TASKS[n].drawn(split, i)[0] for n in names for i in range(count))
  return {d.subject for d in drawn}


def test_what_is_read_is_of_one_split_in_all_tasks():
  # No task asks about a function that another one learns from.
  code_tasks = [n for n, t in TASKS.items() if t.cluster.startswith('code_')]
  assert len(code_tasks) == 8
  train = subjects(code_tasks, 'train', 150)
  assert not train & subjects(code_tasks, 'validation', 30)
  functions = instructions.functions()
  assert train <= {f.source for f in functions}
  assert len({f.source for f in functions}) == len(functions) > 500
