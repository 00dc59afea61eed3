"""Lines of pairs and conversations, and which of their tokens count.

The rows are told by hand: a letter of each target that has a loss.
"""

import json

import pytest

from moe_jax import data
from moe_jax.data import DataOptions, JsonlSource, Seq2SeqTask
from moe_jax.data.sources.jsonl import pairs_of
from moe_jax.data.sources.python_stdlib import split_of

CHAT = [
  {'role': 'system', 'content': 'be brief'},
  {'role': 'user', 'content': 'hi'},
  {'role': 'assistant', 'content': 'yo'},
  {'role': 'user', 'content': 'bye'},
  {'role': 'assistant', 'content': 'ok'},
]
# Inputs that are in the validation split by their hash.
VALIDATION = next(c for c in 'abcdefghijklmnopqrstuvwxyzABCDEFGH'
                  if split_of(c) == 'validation')  # fmt: skip


def write(folder, *values):
  """Writes training lines and a validation line; returns their source."""
  assert {split_of(pairs_of(v, '')[0][0]) for v in values} == {'train'}
  lines = [*values, {'inputs': VALIDATION, 'targets': 'w'}]
  text = '\n\n'.join(map(json.dumps, lines)) + '\n'
  (folder / 'a.jsonl').write_text(text)
  return JsonlSource(str(folder / '*.jsonl'))


def test_a_conversation_has_a_pair_for_every_answer_of_weight_1():
  assert pairs_of({'messages': CHAT}, 'here') == [
    ('system: be brief\nuser: hi', 'yo'),
    ('system: be brief\nuser: hi\nassistant: yo\nuser: bye', 'ok'),
  ]
  # An answer of weight 0 is inputs alone.
  first, second = {**CHAT[2], 'weight': 0}, {**CHAT[4], 'weight': 1}
  assert pairs_of({'messages': [CHAT[1], first, CHAT[3], second]}, 'here') == [
    ('user: hi\nassistant: yo\nuser: bye', 'ok'),
  ]


def test_lines_of_both_kinds(tmp_path):
  source = write(tmp_path, {'inputs': 'a', 'targets': 'b'}, {'messages': CHAT})
  pairs = source.pairs()
  assert [target for _, target in pairs.pairs('train')] == ['b', 'yo', 'ok']
  assert list(pairs.pairs('validation')) == [(VALIDATION, 'w')]


def chat(*messages):
  return json.dumps({'messages': messages})


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{"inputs": "a"}', r" is no object with .* it has \['inputs'\]"),
    ('[1]', ' is no object .* it has list'),
    ('{"messages": [], "inputs": "a", "targets": "b"}', ' is no object'),
    ('{"inputs": "a", "targets": ""}', ": targets=''"),
    ('{"messages": 3}', ': messages are no list'),
    (chat(3), r': messages\[0\] is no object'),
    (chat({**CHAT[1], 'role': 'users'}), "unknown role 'users'; did you mean"),
    (chat(CHAT[1]), ": no message is of role 'assistant'"),
    (chat(CHAT[2]), r': messages\[0\] is an answer, and nothing precedes it'),
    (chat(CHAT[1], {**CHAT[2], 'weight': 0.5}), r'\[1\]\.weight=0\.5: .*0 or'),
    (chat(CHAT[1], {**CHAT[2], 'weight': True}), r'\[1\]\.weight=True'),
    (chat(CHAT[1], {**CHAT[3], 'weight': 1}), r'weight=1: only an answer'),
    (chat(CHAT[1], {**CHAT[2], 'weight': 0}), ' a weight other than 0'),
  ],
)  # fmt: skip
def test_bad_lines_are_named_by_file_and_line(tmp_path, line, message):
  good = json.dumps({'inputs': 'a', 'targets': 'b'})
  path = tmp_path / 'a.jsonl'
  path.write_text(f'{good}\n{line}\n')
  with pytest.raises(ValueError, match=f'{path}, line 2.*{message}'):
    JsonlSource(str(path)).pairs()


def test_what_is_asked_is_in_one_split(tmp_path):
  # Other answers and other keys do not move a line to the other split.
  lines = [
    json.dumps({'inputs': text, 'targets': f't{n}', 'id': n})
    for n in range(30)
    for text in (VALIDATION, 'abc')
  ]
  path = tmp_path / 'a.jsonl'
  path.write_text('\n'.join(lines))
  pairs = JsonlSource(str(path)).pairs()
  for split, text in (('validation', VALIDATION), ('train', 'abc')):
    assert [inputs for inputs, _ in pairs.pairs(split)] == [text] * 30
  path.write_text(lines[1])
  with pytest.raises(ValueError, match=r"'validation' has 0 .*one text in 20"):
    rows_of(tmp_path, JsonlSource(str(path)))


def rows_of(tmp_path, source, task=Seq2SeqTask(), **changes):
  cache = str(tmp_path / 'cache')
  options = DataOptions(source=source, task=task, cache_dir=cache, **changes)
  dataset = data.load(options)
  return dataset.splits['train'], dataset.tokenizer


def loss_marks(row, tokenizer):
  """Returns a row's targets, with '.' if one does not count, '$' for an end."""
  marks = [
    ('$' if t == tokenizer.eos_id else tokenizer.decode([t])) if weight else '.'
    for t, weight in zip(row['targets'].tolist(), row['loss_weights'].tolist())
  ]
  return ''.join(marks)


def test_only_answers_count(tmp_path):
  # Inputs a b c $ predict b c $ x: the first target that counts is x. After
  # 'xy$', whose end is no input, the second example is d e $ z.
  lines = [{'inputs': i, 'targets': t} for i, t in (('abc', 'xy'), ('de', 'z'))]
  source = write(tmp_path, *lines)
  for pack, expected in (
    (True, ['...xy$..z$....']),
    (False, ['...xy$........', '..z$..........']),
  ):
    rows, tokenizer = rows_of(tmp_path, source, seq_len=14, pack=pack)
    assert [loss_marks(row, tokenizer) for row in rows] == expected


@pytest.mark.parametrize(
  ('keep_end', 'inputs'), [(False, 'user: '), (True, 'r: bye')]
)
def test_truncation_keeps_the_answer(tmp_path, keep_end, inputs):
  source = write(tmp_path, {'messages': CHAT[1:]})
  task = Seq2SeqTask(keep_end=keep_end)
  rows, tokenizer = rows_of(tmp_path, source, task, seq_len=9)
  row = rows[1]
  # Six characters of inputs, an end, and 'ok$' of which the end is no input.
  # The first answer, in the inputs, does not count again.
  assert tokenizer.decode(row['tokens'][:6]) == inputs
  assert row['tokens'][6] == tokenizer.eos_id
  assert loss_marks(row, tokenizer) == '......ok$'
