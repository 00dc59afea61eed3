"""Tasks with instructions that need no network, in clusters of similar tasks.

The examples are made from functions of the running Python's standard library,
or at random. An example follows from the task, the split and its index alone.
To add a task, write a function that draws a question and its answer, and
decorate the function with the task's cluster and at least three templates.

    python -m moe_jax.data.sources.instructions    # prints every task
"""

import ast
import codecs
import dataclasses
import functools
import hashlib
import pathlib
import platform
import random
import re
import string
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, NamedTuple, TypeVar

from moe_jax.config import option
from moe_jax.data.contracts import Pairs, Question, Selection, SourceOptions
from moe_jax.data.sources.python_stdlib import (
  content_digest,
  documented_functions,
  source_files,
  split_of,
)
from moe_jax.errors import InputError

T = TypeVar('T')
# Number of draws after which a task is taken to have no example of a split; one
# draw in 20 is for validation.
_MOST_DRAWS = 2000
_SMALL = 40  # examples of a run with ':runlocal'


class Dice:
  """Random draws that a text decides, the same on every machine."""

  def __init__(self, text: str):
    # Python promises that its method `random` gives the same numbers for a seed
    # in every version, and promises it of no other method.
    self._random = random.Random(text).random

  def below(self, n: int) -> int:
    """A random integer in [0, n)."""
    return int(self._random() * n)

  def between(self, low: int, high: int) -> int:
    """A random integer in [low, high]."""
    return low + self.below(high - low + 1)

  def one(self, items: Sequence[T]) -> T:
    """A random item."""
    return items[self.below(len(items))]

  def sample(self, items: Sequence[T], count: int) -> list[T]:
    """`count` of the items, each at most once, in random order."""
    rest = list(items)
    return [rest.pop(self.below(len(rest))) for _ in range(count)]

  def word(self, letters: str, low: int, high: int) -> str:
    """A random word of these letters, with a length in [low, high]."""
    return ''.join(self.one(letters) for _ in range(self.between(low, high)))


class Drawn(NamedTuple):
  """The content of one example of a task, without words around it.

  Attributes:
    question: Text that is asked about.
    answer: The right answer; not empty.
    choices: Answers to choose from, the right one among them; empty where any
      text can be the answer.
    key: Text whose hash decides the split of the example, so that examples of
      one key, of whatever tasks, are all in one split; '' takes the question.
  """

  question: str
  answer: str
  choices: tuple[str, ...] = ()
  key: str = ''

  @property
  def subject(self) -> str:
    """The text whose hash decides the split: the key, or else the question."""
    return self.key or self.question


@dataclasses.dataclass(frozen=True)
class InstructionTask:
  """A task with instructions.

  Attributes:
    name: Name of the task.
    cluster: Name of the cluster of similar tasks that it belongs to.
    templates: Instructions, three or more, each with `{}` for the question.
    draw: Function that draws a question and its answer.
    metric: Name of the score of an answer where there are no choices.
  """

  name: str
  cluster: str
  templates: tuple[str, ...]
  draw: Callable[[Dice], Drawn]
  metric: str = 'exact_match'

  def drawn(self, split: str, index: int) -> tuple[Drawn, Dice]:
    """The content of example `index`, and dice for its template and shots.

    Shots are other examples, which may stand before it.

    Raises:
      ValueError: The task has no example of the split.
    """
    for attempt in range(_MOST_DRAWS):
      dice = Dice(f'{self.name} {split} {index} {attempt}')
      drawn = self.draw(dice)
      if split_of(drawn.subject) == split:
        return drawn, dice
    raise InputError(
      f'task {self.name!r} has no example of split {split!r} in {_MOST_DRAWS} '
      'draws'
    )

  def __call__(self, split: str, index: int, num_shots: int = 0) -> Question:
    """Example `index` of a split.

    Args:
      split: 'train' or 'validation'; no key is in both.
      index: Index of the example, from 0; there is no last example.
      num_shots: Number of other examples, always of 'train', that stand before
        the example with their answers, in the words of the same template; all
        have different keys.

    Raises:
      ValueError: The task has no example of the split, or too few of 'train'.
    """
    drawn, dice = self.drawn(split, index)
    template = dice.one(self.templates)
    # No two examples have one subject, as it might give the answer.
    examples = {drawn.subject: drawn}
    for _ in range(_MOST_DRAWS):
      if len(examples) > num_shots:
        break
      shot, _ = self.drawn('train', dice.below(2**31))
      examples.setdefault(shot.subject, shot)
    else:
      raise InputError(
        f'task {self.name!r} has no training example besides {len(examples)} '
        f'others in {_MOST_DRAWS} draws; take fewer shots'
      )
    _, *shots = examples.values()
    texts = [f'{_question_text(template, s)}\n{s.answer}' for s in shots]
    inputs = '\n\n'.join([*texts, _question_text(template, drawn)])
    return Question(inputs, drawn.answer, drawn.choices, self.metric)


def _question_text(template: str, drawn: Drawn) -> str:
  text = template.format(drawn.question)
  return text + ''.join(f'\n- {choice}' for choice in drawn.choices)


TASKS: dict[str, InstructionTask] = {}
_LETTERS = string.ascii_lowercase


def _task(
  cluster: str, *templates: str, metric: str = 'exact_match'
) -> Callable[[Callable[[Dice], Drawn]], Callable[[Dice], Drawn]]:
  """A decorator that makes a function the `draw` of a new task in `TASKS`.

  The task has the function's name without '_'; the arguments are its fields.
  """

  def add(draw: Callable[[Dice], Drawn]) -> Callable[[Dice], Drawn]:
    name = draw.__name__.removeprefix('_')
    TASKS[name] = InstructionTask(name, cluster, templates, draw, metric)
    return draw

  return add


def identity(name: str) -> str:
  """A text that is equal only if the examples of the task `name` are equal."""
  code = hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()
  on_library = TASKS[name].cluster in ('code_reading', 'code_writing')
  return f'instructions {name} {code} {digest() if on_library else ""}'


# Pure-Python modules of CPython 3.11 to 3.13 with short, documented functions.
MODULES = tuple(
  """
  argparse ast asyncio bisect calendar codecs collections colorsys concurrent
  configparser contextlib copy csv datetime difflib email fnmatch fractions
  functools gettext glob heapq http imaplib importlib inspect ipaddress json
  locale logging mailbox netrc optparse os pathlib pickletools pprint queue
  random sched selectors shlex shutil smtplib socket statistics string
  subprocess symtable tarfile tempfile textwrap threading turtle types typing
  unittest urllib uuid wave weakref xml xmlrpc zipfile
  """.split()  # noqa: SIM905
)
# Characters of the longest function and summary; a row of 256 bytes has room
# for an instruction, a function and an answer.
_LONGEST, _LONGEST_SUMMARY = 140, 72
_SCOPES = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef


class Function(NamedTuple):
  """A function of Python's standard library, which questions are about.

  Attributes:
    source: Source of the function without docstring and decorators.
    name: Name of the function.
    num_arguments: Number of its arguments, without `self` and `cls`.
    returns: Whether the function, apart from inner functions, returns a value
      other than None.
    summary: The first line of its docstring, of two words or more.
  """

  source: str
  name: str
  num_arguments: int
  returns: bool
  summary: str


@functools.cache
def functions() -> tuple[Function, ...]:
  """The short, documented functions of the standard library, each once."""
  by_source = {}
  for _, text in source_files(MODULES):
    for _, source, docstring in documented_functions(text):
      summary = docstring.strip().split('\n')[0].strip()
      fits = len(source) <= _LONGEST and len(summary) <= _LONGEST_SUMMARY
      # A symbol or a lone word, as some docstrings are, describes nothing.
      if fits and ' ' in summary and (f := function_of(source, summary)):
        by_source.setdefault(f.source, f)
  # A hash orders the functions, which does not depend on the modules' names.
  order = sorted(by_source, key=lambda s: hashlib.sha256(s.encode()).digest())
  return tuple(by_source[source] for source in order)


@functools.cache
def shorter(**most: int) -> tuple[Function, ...]:
  """The `functions` with at most `most[name]` characters in a field `name`."""
  return tuple(
    f
    for f in functions()
    if all(len(getattr(f, part)) <= n for part, n in most.items())
  )


@functools.cache
def digest() -> str:
  """A text that is equal only where `functions` gives equal results."""
  sources = content_digest(source_files(MODULES))
  return f'Python {platform.python_version()} {sources}'


def function_of(source: str, summary: str) -> Function | None:
  """The function that `source` defines, with its `summary`, or None.

  It is None if the source does not parse by itself, or defines a generator or
  an asynchronous function, of which it is unclear what it returns.
  """
  start = re.search(r'^(async )?def ', source, re.MULTILINE)
  source = source[start.start() :].rstrip() if start else source
  try:
    node = ast.parse(source).body[0]
  except (SyntaxError, IndexError):
    return None
  if not isinstance(node, ast.FunctionDef):
    return None
  nodes = list(_own_nodes(node))
  if any(isinstance(below, ast.Yield | ast.YieldFrom) for below in nodes):
    return None
  arguments = [
    below.arg
    for below in ast.iter_child_nodes(node.args)
    if isinstance(below, ast.arg) and below.arg not in ('self', 'cls')
  ]
  returned = [below.value for below in nodes if isinstance(below, ast.Return)]
  returns = any(v and ast.unparse(v) != 'None' for v in returned)
  return Function(source, node.name, len(arguments), returns, summary)


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
  """All nodes below a node, without those in inner functions and classes."""
  for below in ast.iter_child_nodes(node):
    yield below
    if not isinstance(below, _SCOPES):
      yield from _own_nodes(below)


# The cluster code_reading: what a function of Python's library is like.
_code_reading = functools.partial(_task, 'code_reading')

# Texts that are cut from a function so that it no longer parses, each with
# the text that is put in instead.
_BREAKS = ((':\n', '\n'), ('(', ''), (')', ''), ('return ', 'return return '))


def _yes_no(question: str, is_true: bool, key: str = '') -> Drawn:
  return Drawn(question, 'yes' if is_true else 'no', ('yes', 'no'), key)


def answers(
  dice: Dice, right: str, texts: Sequence[str], count: int
) -> tuple[str, ...]:
  """`right` and other `texts`, `count` different answers in random order."""
  wrong = [text for text in dict.fromkeys(texts) if text != right]
  return tuple(dice.sample([right, *dice.sample(wrong, count - 1)], count))


@_code_reading(
  'Count the arguments, without self and cls.\n{}',
  '{}\nHow many arguments does it have, besides self and cls?',
  'def f(self, a, b) has 2 arguments besides self. How many has this '
  'function, besides self and cls?\n{}',
)
def _count_arguments(dice: Dice) -> Drawn:
  function = dice.one(functions())
  return Drawn(function.source, str(function.num_arguments))


@_code_reading(
  'Does this function return a value?\n{}',
  '{}\nDoes this function ever return anything?',
  'Say whether a return in this function has a value.\n{}',
)
def _returns_value(dice: Dice) -> Drawn:
  function = dice.one(functions())
  return _yes_no(function.source, function.returns)


@_code_reading(
  'Does this parse?\n{}',
  '{}\nIs this valid Python?',
  'Say whether Python can parse this.\n{}',
)
def _parses(dice: Dice) -> Drawn:
  function = dice.one(functions())
  text, (old, new) = function.source, dice.one(_BREAKS)
  if dice.below(2):
    text = text.replace(old, new, 1)
  try:
    parses = bool(ast.parse(text))
  except SyntaxError:
    parses = False
  # A function is in one split, whole and broken.
  return _yes_no(text, parses, key=function.source)


@_code_reading(
  'Name this function.\n{}',
  '{}\nWhat is a better name than f?',
  "In Python's library, f has another name. Which one?\n{}",
)
def _name_function(dice: Dice) -> Drawn:
  candidates = shorter(source=110, name=16)
  function = dice.one(candidates)
  choices = answers(dice, function.name, [f.name for f in candidates], 4)
  unnamed = re.sub(rf'\b{function.name}\b', 'f', function.source)
  return Drawn(unnamed, function.name, choices, key=function.source)


# The cluster code_writing: texts on and of Python's library.
_code_writing = functools.partial(_task, 'code_writing')


@_code_writing(
  'Write a docstring.\n{}',
  '{}\nWhat does this function do?',
  'Describe this function in one line.\n{}',
  metric='chrf',
)
def _write_docstring(dice: Dice) -> Drawn:
  function = dice.one(functions())
  return Drawn(function.source, function.summary)


@_code_writing(
  'Which docstring belongs to this function?\n{}',
  '{}\nWhich of these lines describes this function?',
  'Choose the description of this function.\n{}',
)
def _choose_docstring(dice: Dice) -> Drawn:
  candidates = shorter(source=100, summary=32)
  function = dice.one(candidates)
  choices = answers(dice, function.summary, [f.summary for f in candidates], 3)
  return Drawn(function.source, function.summary, choices)


@_code_writing(
  'Indent:\n{}',
  '{}\nThe same with its indentation:',
  'The indentation of these lines is lost. Restore it.\n{}',
)
def _repair_indentation(dice: Dice) -> Drawn:
  # A row has the function twice, so it has to be shorter than for other tasks.
  function = dice.one(shorter(source=90))
  lines = function.source.split('\n')
  broken = [line.strip() for line in lines]
  return Drawn('\n'.join(broken), function.source, key=function.source)


@_code_writing(
  'Finish the last line.\n{}',
  'How does the last line continue?\n{}',
  'Complete the last line of this code.\n{}',
  metric='chrf',
)
def _finish_line(dice: Dice) -> Drawn:
  function = dice.one(functions())
  lines = [line.rstrip() for line in function.source.split('\n')]
  long = [i for i, line in enumerate(lines) if len(line.strip()) > 12]
  index = dice.one(long or [0])
  line, words = lines[index], lines[index].lstrip()
  cut = len(line) - (len(words) + 1) // 2
  question = '\n'.join([*lines[:index], line[:cut]])
  return Drawn(question, line[cut:], key=function.source)


# The cluster sequences: words in another order.
_sequences = functools.partial(_task, 'sequences')


def _words(dice: Dice, low: int = 2, high: int = 4) -> list[str]:
  """`low` to `high` random words of two to four letters, all different."""
  count, drawn = dice.between(low, high), []
  while len(drawn) < count:
    word = dice.word(_LETTERS, 2, 4)
    if word not in drawn:
      drawn.append(word)
  return drawn


@_sequences('Copy: {}', 'Repeat this text.\n{}', '{}\nAgain:')
def _copy(dice: Dice) -> Drawn:
  text = ' '.join(_words(dice))
  return Drawn(text, text)


@_sequences(
  'Reverse: {}',
  'Write {} backwards.',
  'What is {} from its last letter to its first?',
)
def _reverse(dice: Dice) -> Drawn:
  word = dice.word(_LETTERS, 4, 8)
  return Drawn(word, word[::-1])


@_sequences(
  'Last word first: {}',
  'Reverse the order of the words.\n{}',
  '{}\nThe same words, from the last to the first:',
)
def _reverse_words(dice: Dice) -> Drawn:
  drawn = _words(dice)
  return Drawn(' '.join(drawn), ' '.join(drawn[::-1]))


@_sequences(
  'Sort: {}',
  'Put these words in alphabetical order.\n{}',
  '{}\nIn dictionary order:',
)
def _sort_words(dice: Dice) -> Drawn:
  drawn = _words(dice)
  return Drawn(' '.join(drawn), ' '.join(sorted(drawn)))


@_sequences(
  'Equal? {}',
  'Are both sides of the bar the same text?\n{}',
  '{}\nIs the left the same as the right?',
)
def _same(dice: Dice) -> Drawn:
  one = _words(dice, 2, 3)
  other = dice.one([one, one[::-1], [*one[:-1], dice.word(_LETTERS, 2, 4)]])
  return _yes_no(f'{" ".join(one)} | {" ".join(other)}', one == other)


# The cluster arithmetic: small sums, and which number is larger.
_arithmetic = functools.partial(_task, 'arithmetic')

_SUMS = '{} =', 'What is {}?', 'Calculate {} and give the number.'


@_arithmetic(*_SUMS)
def _add(dice: Dice) -> Drawn:
  a, b = dice.below(1000), dice.below(1000)
  return Drawn(f'{a} + {b}', str(a + b))


@_arithmetic(*_SUMS)
def _subtract(dice: Dice) -> Drawn:
  a, b = dice.below(1000), dice.below(1000)
  return Drawn(f'{a} - {b}', str(a - b))


@_arithmetic(*_SUMS)
def _multiply(dice: Dice) -> Drawn:
  a, b = dice.between(2, 99), dice.between(2, 12)
  return Drawn(f'{a} * {b}', str(a * b))


@_arithmetic(
  'Larger: {}',
  'Which of these two numbers is larger?\n{}',
  '{}\nThe larger one is',
)
def _larger(dice: Dice) -> Drawn:
  a, b = dice.below(10000), dice.below(10000)
  if a == b:
    b += 1
  return Drawn(f'{a} {b}', str(max(a, b)), (str(a), str(b)))


# The cluster number_series: what numbers in a row have in common.
_number_series = functools.partial(_task, 'number_series')


@_number_series(
  'Next number: {}',
  'These numbers go up by equal steps. Which comes next?\n{}',
  '{} and then',
)
def _next_number(dice: Dice) -> Drawn:
  start, step = dice.below(100), dice.between(1, 12)
  numbers = [start + step * i for i in range(5)]
  return Drawn(' '.join(map(str, numbers[:4])), str(numbers[4]))


@_number_series(
  'Next product: {}',
  'Each number is the one before it times the same factor. Which comes '
  'next?\n{}',
  '{}\nThe series continues with',
)
def _next_power(dice: Dice) -> Drawn:
  start, base = dice.between(1, 120), dice.between(2, 5)
  numbers = [start * base**i for i in range(4)]
  return Drawn(' '.join(map(str, numbers[:3])), str(numbers[3]))


@_number_series(
  'Maximum: {}',
  'Which is the largest of these numbers?\n{}',
  '{}\nNone of them is larger than',
)
def _largest(dice: Dice) -> Drawn:
  numbers = [dice.below(100) for _ in range(dice.between(3, 5))]
  return Drawn(' '.join(map(str, numbers)), str(max(numbers)))


@_number_series(
  'Direction: {}',
  'Do these numbers go up, down, or neither?\n{}',
  '{}\nThe series goes',
)
def _direction(dice: Dice) -> Drawn:
  numbers = sorted(dice.sample(range(1000), 4))
  mixed = [*numbers[1:], numbers[0]]
  choices = 'up', 'down', 'neither'
  answer = dice.one(choices)
  row = {'up': numbers, 'down': numbers[::-1], 'neither': mixed}[answer]
  return Drawn(' '.join(map(str, row)), answer, choices)


# The cluster ciphers: words in secret and in Morse code.
_ciphers = functools.partial(_task, 'ciphers')

# International Morse code, ITU-R M.1677-1.
_CODES = (
  '.- -... -.-. -.. . ..-. --. .... .. .--- -.- .-.. -- -. --- .--. --.- .-. '
  '... - ..- ...- .-- -..- -.-- --..'
)
MORSE = dict(zip(_LETTERS, _CODES.split()))


@_ciphers(
  'ROT13: {}',
  'Move every letter 13 places along the alphabet.\n{}',
  '{}\nIn ROT13 that is',
)
def _rot13(dice: Dice) -> Drawn:
  word = dice.word(_LETTERS, 4, 8)
  return Drawn(word, codecs.encode(word, 'rot13'))


@_ciphers(
  'Caesar: {}',
  'Shift the letters of {} along the alphabet.',
  'Encipher with a Caesar cipher: {}',
)
def _caesar(dice: Dice) -> Drawn:
  word, step = dice.word(_LETTERS, 4, 6), dice.between(1, 5)
  table = str.maketrans(_LETTERS, _LETTERS[step:] + _LETTERS[:step])
  return Drawn(f'{word} by {step}', word.translate(table))


@_ciphers(
  'Atbash: {}',
  'Write z for a, y for b, and so on.\n{}',
  '{}\nWith the alphabet reversed:',
)
def _atbash(dice: Dice) -> Drawn:
  word = dice.word(_LETTERS, 4, 8)
  return Drawn(word, word.translate(str.maketrans(_LETTERS, _LETTERS[::-1])))


@_ciphers('Morse: {}', 'Write {} in Morse code.', '{}\nIn dots and dashes:')
def _to_morse(dice: Dice) -> Drawn:
  word = dice.word(_LETTERS, 3, 4)
  return Drawn(word, ' '.join(MORSE[letter] for letter in word))


@_ciphers(
  'Letters: {}', 'Which word does this Morse code spell?\n{}', '{}\nIn letters:'
)
def _from_morse(dice: Dice) -> Drawn:
  word = dice.word(_LETTERS, 3, 4)
  # The word decides the split, as in the other direction.
  return Drawn(' '.join(MORSE[letter] for letter in word), word, key=word)


# The cluster recall: what stands in the question itself.
_recall = functools.partial(_task, 'recall')


@_recall(
  'Look up: {}',
  'Give the value of the last letter.\n{}',
  'Each letter has a number. {}',
)
def _lookup(dice: Dice) -> Drawn:
  keys = dice.sample(_LETTERS, dice.between(3, 5))
  values = [str(dice.between(10, 99)) for _ in keys]
  table = ' '.join(f'{key}={value}' for key, value in zip(keys, values))
  at = dice.below(len(keys))
  return Drawn(f'{table}; {keys[at]}?', values[at])


@_recall(
  'Word {}',
  'Which word is at this position, counting from 1?\n{}',
  'Write word {}.',
)
def _item(dice: Dice) -> Drawn:
  drawn = _words(dice, 3, 5)
  at = dice.below(len(drawn))
  return Drawn(f'{at + 1} of {" ".join(drawn)}', drawn[at])


@_recall(
  'Missing: {}',
  'Which word on the left is not on the right?\n{}',
  '{}\nThe right side lacks',
)
def _missing(dice: Dice) -> Drawn:
  drawn = _words(dice, 3, 4)
  answer = dice.one(drawn)
  rest = dice.sample([word for word in drawn if word != answer], len(drawn) - 1)
  return Drawn(f'{" ".join(drawn)} | {" ".join(rest)}', answer)


@_recall(
  'Is it there? {}',
  'Is the first word one of the words after "in"?\n{}',
  '{}\nIs the first word among the others?',
)
def _contains(dice: Dice) -> Drawn:
  drawn = _words(dice, 3, 5)
  other = dice.word(_LETTERS, 2, 4)
  word = dice.one([dice.one(drawn), other])
  return _yes_no(f'{word} in {" ".join(drawn)}', word in drawn)


# The cluster letters: what a word is made of.
_letters = functools.partial(_task, 'letters')


@_letters(
  'Count: {}', 'How many times is the letter {}?', '{}\nNumber of times:'
)
def _count_letters(dice: Dice) -> Drawn:
  word = dice.word('abcdef', 4, 9)
  letter = dice.one('abcdef')
  return Drawn(f'{letter} in {word}', str(word.count(letter)))


@_letters(
  'Length: {}', 'How many letters does {} have?', '{}\nNumber of letters:'
)
def _length(dice: Dice) -> Drawn:
  word = dice.word(_LETTERS, 3, 12)
  return Drawn(word, str(len(word)))


@_letters(
  'Initials: {}',
  'Join the first letters of these words.\n{}',
  '{}\nThe first letters are',
)
def _initials(dice: Dice) -> Drawn:
  drawn = _words(dice, 3, 5)
  return Drawn(' '.join(drawn), ''.join(word[0] for word in drawn))


@_letters(
  'Capitals: {}', 'Write {} in capital letters.', '{}\nThe same in capitals:'
)
def _upper(dice: Dice) -> Drawn:
  word = dice.word(_LETTERS, 4, 8)
  return Drawn(word, word.upper())


@_letters(
  'Palindrome? {}', 'Is {} the same backwards?', '{}\nIs it a palindrome?'
)
def _palindrome(dice: Dice) -> Drawn:
  half = dice.word(_LETTERS, 3, 4)
  same = half + half[::-1]
  at = dice.below(len(half))
  other = half[:at] + dice.one(_LETTERS) + half[at + 1 :]
  word = dice.one([same, other + half[::-1]])
  return _yes_no(word, word == word[::-1])


@dataclasses.dataclass(frozen=True)
class InstructionSource(SourceOptions):
  """Instructions of one task and their answers, made when they are read.

  With examples before an instruction, set `task.seq2seq.keep_end` for the task
  seq2seq, so that inputs that are too long for a row lose examples, not the
  question.
  """

  is_embedded: ClassVar[bool] = True

  task: str = option(
    'reverse',
    'Name of the task; the command '
    '`python -m moe_jax.data.sources.instructions` prints all with an example.',
    choices=TASKS,
  )
  num_train: int = option(
    1000,
    'Number of examples for training; a larger number adds examples to those '
    'of a smaller one.',
    minimum=1,
  )
  num_validation: int = option(
    100, 'Number of examples for validation.', minimum=1
  )
  num_shots: int = option(
    0,
    'Number of other examples with their answers that stand before each '
    'instruction, in the same words; 0 is zero-shot.',
    minimum=0,
  )

  @property
  def cluster(self) -> str:
    return TASKS[self.task].cluster

  def questions(self, selection: Selection = Selection()) -> list[Question]:
    """The validation examples, each as a question."""
    return list(self._examples(selection.name_of('validation')))

  def pairs(self, selection: Selection = Selection()) -> Pairs:
    """Instructions and answers; no question is in both splits.

    Raises:
      ValueError: A split is neither 'train' nor 'validation'.
    """
    selection.check_splits('instructions')
    sizes = self.num_train, self.num_validation
    shots = f', {self.num_shots} shots' * bool(self.num_shots)
    return Pairs(
      f'instructions:{self.task}{shots} (embedded)',
      f'{identity(self.task)} {sizes} {self.num_shots} {selection.splits}',
      lambda split: (q[:2] for q in self._examples(selection.name_of(split))),
    )

  def shrunk(self) -> 'InstructionSource':
    """The same task with few examples."""
    return dataclasses.replace(
      self,
      num_train=min(self.num_train, _SMALL),
      num_validation=min(self.num_validation, _SMALL),
    )

  def _examples(self, split: str) -> Iterator[Question]:
    task = TASKS[self.task]
    count = self.num_train if split == 'train' else self.num_validation
    return (task(split, i, self.num_shots) for i in range(count))


def lines() -> Iterator[str]:
  """Lines on every task: its cluster, name and score, and one example."""
  for name, task in TASKS.items():
    question = task('validation', 0)
    count = len(question.choices)
    score = f'choice of {count}' if count else task.metric
    yield f'{task.cluster}: {name} ({score})'
    yield from (f'    {line}' for line in question.inputs.split('\n'))
    yield from (f'  > {line}' for line in question.target.split('\n'))


if __name__ == '__main__':
  print('\n'.join(lines()))
