"""Lines of pairs and conversations, and which of their tokens count."""

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


def line_of(value, split):
  """Returns the line of a value whose inputs must be in this split."""
  assert split_of(pairs_of(value, '')[0][0]) == split
  return json.dumps(value)


# Inputs that are in the validation split by their hash.
VALIDATION = next(c for c in 'abcdefghijklmnopqrstuvwxyzABCDEFGH'
                  if split_of(c) == 'validation')  # fmt: skip


def write(folder, *values):
  """Writes training lines and a validation line; returns their source."""
  lines = [line_of(value, 'train') for value in values]
  lines.append(line_of({'inputs': VALIDATION, 'targets': 'w'}, 'validation'))
  (folder / 'a.jsonl').write_text('\n\n'.join(lines) + '\n')
  return JsonlSource(str(folder / '*.jsonl'))


def test_a_conversation_has_a_pair_for_every_answer():
  assert pairs_of({'messages': CHAT}, 'here') == [
    ('system: be brief\nuser: hi', 'yo'),
    ('system: be brief\nuser: hi\nassistant: yo\nuser: bye', 'ok'),
  ]


def test_an_answer_of_weight_0_is_inputs_alone():
  first, second = {**CHAT[2], 'weight': 0}, {**CHAT[4], 'weight': 1}
  chat = [*CHAT[1:2], first, CHAT[3], second]
  assert pairs_of({'messages': chat}, 'here') == [
    ('user: hi\nassistant: yo\nuser: bye', 'ok'),
  ]


def test_lines_of_both_kinds(tmp_path):
  source = write(tmp_path, {'inputs': 'a', 'targets': 'b'}, {'messages': CHAT})
  pairs = source.pairs()
  assert [target for _, target in pairs.pairs('train')] == ['b', 'yo', 'ok']
  assert list(pairs.pairs('validation')) == [(VALIDATION, 'w')]
  assert '1 files, 3 lines' in pairs.name
  old_identity = pairs.identity
  write(tmp_path, {'inputs': 'a', 'targets': 'c'})
  assert source.pairs().identity != old_identity


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    ('{"inputs": "a"}', r"line 2 is no object with .* it has \['inputs'\]"),
    ('[1]', 'line 2 is no object .* it has list'),
    ('{"inputs": "a", "targets": ""}', "line 2: targets=''"),
    ('{"inputs": 3, "targets": "b"}', 'line 2: inputs=3'),
    ('{"inputs": "a"', 'line 2 is no JSON'),
    ('{"messages": 3}', 'line 2: messages are no list'),
    ('{"messages": [3]}', r'line 2: messages\[0\] is no object'),
    (
      '{"messages": [{"role": "users", "content": "a"}]}',
      r"line 2: messages\[0\]: unknown role 'users'; did you mean 'user'",
    ),
    (
      '{"messages": [{"role": "user", "content": "a"}]}',
      "line 2: no message is of role 'assistant'",
    ),
    (
      '{"messages": [{"role": "assistant", "content": "a"}]}',
      r'line 2: messages\[0\] is an answer, and nothing precedes it',
    ),
    *(
      (json.dumps({'messages': [CHAT[1], message]}), text)
      for message, text in (
        (
          {**CHAT[2], 'weight': 0.5},
          r'line 2: .*\[1\]\.weight=0\.5: .* 0 or 1',
        ),
        ({**CHAT[2], 'weight': True}, r'line 2: .*\[1\]\.weight=True'),
        (
          {**CHAT[3], 'weight': 1},
          r'line 2: .*\[1\]\.weight=1: only an answer',
        ),
        ({**CHAT[2], 'weight': 0}, 'line 2: .* a weight other than 0'),
      )
    ),
    (
      '{"messages": [], "inputs": "a", "targets": "b"}',
      'line 2 is no object',
    ),
  ],
)
def test_bad_lines_are_named_by_file_and_line(tmp_path, line, message):
  good = json.dumps({'inputs': 'a', 'targets': 'b'})
  path = tmp_path / 'a.jsonl'
  path.write_text(f'{good}\n{line}\n')
  with pytest.raises(ValueError, match=f'{path}, {message}'):
    JsonlSource(str(path)).pairs()


def test_what_is_asked_is_in_one_split(tmp_path):
  # Other answers and other keys do not move a line to the other split.
  questions = [VALIDATION, 'abc']
  lines = [
    json.dumps({'inputs': text, 'targets': f't{n}', 'id': n})
    for n in range(30)
    for text in questions
  ]
  (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
  pairs = JsonlSource(str(tmp_path / '*.jsonl')).pairs()
  for split, text in (('validation', VALIDATION), ('train', 'abc')):
    assert [inputs for inputs, _ in pairs.pairs(split)] == [text] * 30


def test_a_line_that_is_no_text_is_named(tmp_path):
  (tmp_path / 'a.jsonl').write_bytes(b'\n"\xff"\n')
  with pytest.raises(ValueError, match=r'a\.jsonl, line 2 is not UTF-8'):
    JsonlSource(str(tmp_path / 'a.jsonl')).pairs()


def test_a_split_without_a_line(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text(line_of({'inputs': 'a', 'targets': 'b'}, 'train'))
  with pytest.raises(ValueError, match=r'the 1 lines .* give none for valid'):
    JsonlSource(str(path)).pairs()


def rows_of(tmp_path, source, **changes):
  options = dict(source=source, cache_dir=str(tmp_path / 'cache')) | changes
  dataset = data.load(DataOptions(**options))
  return dataset.splits['train'], dataset.tokenizer


def loss_marks(row, tokenizer):
  """Returns a row's targets, with '.' if one does not count, '$' for an end."""
  marks = [
    ('$' if t == tokenizer.eos_id else tokenizer.decode([t])) if weight else '.'
    for t, weight in zip(row['targets'].tolist(), row['loss_weights'].tolist())
  ]
  return ''.join(marks)


def test_only_answers_count_with_packing(tmp_path):
  source = write(
    tmp_path,
    {'inputs': 'abc', 'targets': 'xy'},
    {'inputs': 'de', 'targets': 'z'},
  )
  rows, tokenizer = rows_of(tmp_path, source, task=Seq2SeqTask(), seq_len=14)
  assert len(rows) == 1
  # Inputs a b c $ predict b c $ x: the first target that counts is x. After
  # 'xy$', whose end is no input, the second example is d e $ z.
  assert loss_marks(rows[0], tokenizer) == '...xy$..z$....'
  assert rows[0]['segment_ids'].tolist() == [1] * 6 + [2] * 4 + [0] * 4
  rows, _ = rows_of(
    tmp_path, source, task=Seq2SeqTask(), seq_len=14, pack=False
  )
  assert [loss_marks(row, tokenizer) for row in (rows[0], rows[1])] == [
    '...xy$........', '..z$..........',
  ]  # fmt: skip


def test_only_answers_count_in_a_conversation(tmp_path):
  source = write(tmp_path, {'messages': CHAT[1:]})
  rows, tokenizer = rows_of(tmp_path, source, task=Seq2SeqTask(), seq_len=40)
  # 'user: hi$' is 9 tokens, and the second has the first answer in its inputs,
  # 'user: hi\nassistant: yo\nuser: bye$', where it does not count again.
  assert [loss_marks(row, tokenizer).strip('.') for row in rows] == [
    'yo$', 'ok$',
  ]  # fmt: skip
  assert loss_marks(rows[0], tokenizer).index('y') == 8


@pytest.mark.parametrize(
  ('keep_end', 'inputs'), [(False, 'user: '), (True, 'r: bye')]
)
def test_truncation_keeps_the_answer(tmp_path, keep_end, inputs):
  source = write(tmp_path, {'messages': CHAT[1:]})
  rows, tokenizer = rows_of(
    tmp_path, source, task=Seq2SeqTask(keep_end=keep_end), seq_len=9
  )
  row = rows[1]
  # Six characters of inputs, an end, and 'ok$' of which the end is no input.
  assert tokenizer.decode(row['tokens'][:6]) == inputs
  assert row['tokens'][6] == tokenizer.eos_id
  assert loss_marks(row, tokenizer) == '......ok$'


def test_a_long_answer_loses_its_end(tmp_path):
  source = write(tmp_path, {'inputs': 'abcdefgh', 'targets': 'stuvwxyz'})
  rows, tokenizer = rows_of(tmp_path, source, task=Seq2SeqTask(), seq_len=9)
  # Half of the row is for inputs, and no false end is learned.
  assert loss_marks(rows[0], tokenizer) == '....stuvw'


def test_an_encoder_has_the_inputs(tmp_path):
  source = write(tmp_path, {'messages': CHAT})
  rows, tokenizer = rows_of(
    tmp_path, source, task=Seq2SeqTask(), seq_len=96, target_len=7
  )
  row = rows[0]
  # The answers of two pairs share a row of the decoder.
  assert loss_marks(row, tokenizer) == 'yo$ok$.'
  encoder_ids = row['encoder_tokens'][row['encoder_segment_ids'] == 1]
  assert tokenizer.decode(encoder_ids) == 'system: be brief\nuser: hi'


def test_of_a_template_with_examples_only_the_last_answer_counts(tmp_path):
  source = data.InstructionSource('add', num_train=3, num_shots=1)
  rows, tokenizer = rows_of(
    tmp_path, source, task=Seq2SeqTask(), seq_len=128, pack=False
  )
  for i, (inputs, answer) in enumerate(source.pairs().pairs('train')):
    # The example has an answer of its own before the question's.
    assert inputs.split('\n\n')[0].split('\n')[-1].isdigit()
    assert loss_marks(rows[i], tokenizer).strip('.') == f'{answer}$'
    assert loss_marks(rows[i], tokenizer).index(answer) == len(inputs)
