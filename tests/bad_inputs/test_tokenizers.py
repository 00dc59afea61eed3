"""Tokenizers, special tokens and chat templates that are wrong or hostile."""

import json

import pytest

from moe_jax.data import JsonOptions, tokenizers
from moe_jax.data.tokenizers import chat
from tests.bad_inputs import checkpoints
from tests.bad_inputs.cases import Case, check, frozen

CHAT = [{'role': 'user', 'content': 'hi'}]


def folder_with(name, values, phrases):
  """A case of a model's folder in which one file has these values."""

  def call(folder):
    (folder / 'tokenizer.json').write_text(checkpoints.tokenizer_text())
    content = values if isinstance(values, str) else json.dumps(values)
    (folder / name).write_text(content)
    tokenizers.Json.from_folder(frozen(folder))

  return Case(f'{name}:{values!r:.60}', call, phrases)


IDS = [
  folder_with(
    file, {f'{role}_token_id': value}, (f'{key}_token_id={value!r}', '[0, 11)')
  )
  for file in ('config.json', 'generation_config.json')
  for role, key in {
    'bos': 'bos', 'eos': 'eos', 'pad': 'pad',
    'decoder_start': 'start', 'forced_bos': 'forced_bos',
  }.items()
  for value in ('1', True, -1, 11, 4 * 10**9, 1.0, {'a': 1})
]  # fmt: skip
IDS += [
  folder_with('config.json', {'eos_token_id': [0, value]}, (repr(value), '11)'))
  for value in ('1', False, -3, 99, [1], None)
]
FOLDERS = [
  folder_with('config.json', {'vocab_size': v}, (f'vocab_size={v!r} is no',))
  for v in ('9', True, -1, 2.5, [], {}, None)
]
FOLDERS += [
  folder_with('tokenizer_config.json', {key: value}, (key, 'not a text'))
  for key in ('chat_template',)
  for value in (3, True, {'a': 'b'}, [{'name': 'default', 'template': 3}])
]
FOLDERS += [
  folder_with(name, '[' * 10**5, (name, 'nested too deeply'))
  for name in (
    'config.json', 'generation_config.json', 'tokenizer_config.json',
    'special_tokens_map.json',
  )
]  # fmt: skip


def tokenizer_file(content, phrases):
  def call(folder):
    path = folder / 'tokenizer.json'
    path.write_bytes(
      content if isinstance(content, bytes) else content.encode()
    )
    frozen(folder)
    JsonOptions(str(path)).fit([])

  return Case(
    f'tokenizer.json:{content[:30]!r}', call, ('tokenizer.json', *phrases)
  )


def tokenizer_with(**vocabulary):
  content = json.loads(checkpoints.tokenizer_text())
  content['model']['vocab'] = vocabulary
  return json.dumps(content)


FILES = [
  tokenizer_file(content, [phrase])
  for content, phrase in [
    ('', 'is no JSON'),
    ('{}', 'not a tokenizers JSON file'),
    ('[]', 'not a tokenizers JSON file'),
    ('[' * 10**5, 'is no JSON'),
    ('{"model":' * 10**5, 'is no JSON'),
    (b'\xff\xfe', 'is not UTF-8'),
    (tokenizer_with(), 'has no tokens'),
    (tokenizer_with(a=0, b=4 * 10**9), "token 'b' has the id 4000000000"),
    (tokenizer_with(a=2**31), 'above the largest int32'),
    (tokenizer_with(a=2**32), 'not a tokenizers JSON file'),
    (tokenizer_with(a=-1), 'not a tokenizers JSON file'),
    (tokenizer_with(a='x'), 'not a tokenizers JSON file'),
    (tokenizer_with(a=1.5), 'not a tokenizers JSON file'),
  ]
]


def saved_tokenizer(content, phrases):
  """A case of a run's folder whose tokenizer.json has this content."""

  def call(folder):
    path = folder / 'tokenizer.json'
    path.write_text(
      content if isinstance(content, str) else json.dumps(content)
    )
    frozen(folder)
    tokenizers.load(path)

  return Case(f'saved:{content!r:.70}', call, ('tokenizer.json', *phrases))


JSON = {'kind': 'json', 'model': json.loads(checkpoints.tokenizer_text())}
SPECIAL = {'bos': None, 'eos': [1], 'pad': None, 'vocab_size': 11}
SAVED = [
  saved_tokenizer(content, phrases)
  for content, phrases in [
    ('', ['is no JSON']),
    ('[' * 10**5, ['nested too deeply']),
    ([], ['no saved tokenizer']),
    (3, ['no saved tokenizer']),
    ({}, ["KeyError('kind')"]),
    ({'kind': 3}, ['unknown tokenizer kind']),
    ({'kind': ['bytes']}, ['unknown tokenizer kind']),
    ({'kind': 'os:system'}, ["unknown tokenizer kind 'os:system'"]),
    ({'kind': 'json'}, ['no saved tokenizer']),
    ({'kind': 'json', 'model': 3}, ['no saved tokenizer']),
    ({**JSON, 'special': 3}, ['no saved tokenizer']),
    ({**JSON, 'special': {**SPECIAL, 'eos': 1}}, ['no saved tokenizer']),
    ({**JSON, 'special': {**SPECIAL, 'eos': ['x']}}, ["eos_token_id='x'"]),
    ({**JSON, 'special': {**SPECIAL, 'pad': -1}}, ['pad_token_id=-1']),
    ({**JSON, 'special': {**SPECIAL, 'bos': 11}}, ['bos_token_id=11']),
    ({**JSON, 'special': {**SPECIAL, 'new': 1}}, ['no saved tokenizer']),
    ({'kind': 'chars'}, ['no saved tokenizer']),
    (
      {'kind': 'extended', 'base': {'kind': 'x'}},
      ["unknown tokenizer kind 'x'"],
    ),
    ({'kind': 'extended', 'base': {'kind': 'bytes'}}, ['no saved tokenizer']),
    (
      '{"kind": "extended", "names": [], "end_inputs": true, "base": ' * 700
      + '{"kind": "bytes"}'
      + '}' * 700,
      ['no saved tokenizer', 'recursion'],
    ),
  ]
]


def template(text, *phrases, limits=None):
  def call(folder):
    del folder
    render(text, limits=limits or chat.Limits())

  return Case(f'template:{text[:50]}', call, ('chat template: ', *phrases))


SMALL = chat.Limits(cpu_seconds=1, memory_bytes=2**28, text_length=10**5)
FOREVER = '{% for a in range(99999) %}' * 3 + '{% endfor %}' * 3
TEMPLATES = [
  template('{{ "x" * 10**10 }}', 'more than 512 MiB of memory'),
  template("{{ 'x'|center(5 * 10**8) }}", 'MiB', limits=SMALL),
  template("{{ '%999999999d'|format(1) }}", 'MiB', limits=SMALL),
  template("{{ '{:>999999999}'.format(1) }}", 'MiB'),
  template("{{ '%.999999999f' % 1.0 }}", 'MiB'),
  template('{{ [1] * 10**9 }}', 'MiB'),
  template("{{ ('x' * 10**5 + 'y') }}", 'a text of 100001', limits=SMALL),
  template('{{ range(10**9)|list }}', 'Range too big'),
  template(
    '{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}', 'nested too deeply'
  ),
  template('{{ ' + '(' * 5000 + '1' + ')' * 5000 + ' }}', 'nested too deeply'),
  template('{% if 1 %}' * 9 + '{% endif %}' * 8, 'Unexpected end'),
  template('{% for m in messages %}', 'Unexpected end'),
  template("{{ raise_exception('no\nrole\x1b[31m') }}", 'no role?[31m'),
  template("{{ raise_exception('x' * 10**6) }}", 'x' * 300),
  template('{{ 1 / 0 }}', 'division by zero'),
  template('{{ messages.append(1) }}', 'unsafe'),
  template('{{ messages[0].update(a=1) }}', 'unsafe'),
  template('{% include "/etc/passwd" %}', 'no loader'),
  template('{% import "os" as os %}', 'no loader'),
  template("{{ ''.__class__.__mro__[1].__subclasses__() }}", 'unsafe'),
  template("{{ cycler.__init__.__globals__.os.system('x') }}", 'unsafe'),
  template("{{ ''.format.__globals__ }}{{ x.y.z }}", 'undefined'),
  template("{{ '{0.__class__.__mro__}'.format(1) }}", 'unsafe'),
  template("{{ (messages|map(attribute='__class__')|list)[0].x }}", 'unsafe'),
  template('{{ self.__init__.__globals__ }}', 'unsafe'),
  template('{{ lipsum.__globals__.os }}', 'unsafe'),
  template('{{ raise_exception.__globals__ }}{{ u.v }}', 'undefined'),
  template('{{ 1|nosuch }}', "No filter named 'nosuch'"),
  template('{{ tojson }}{% nosuch %}', "unknown tag 'nosuch'"),
  template('{{ strftime_now(3) }}', 'must be str'),
]
SLOW_TEMPLATES = [
  template('{{ 9 ** (9 ** 9) }}', '1 s of processor time', limits=SMALL),
  template(
    FOREVER,
    'no answer in 0.2 s',
    limits=chat.Limits(cpu_seconds=9, wall_seconds=0.2),
  ),
]


@pytest.mark.parametrize(
  'case', [*IDS, *FOLDERS, *FILES, *SAVED, *TEMPLATES], ids=Case.id
)
def test_refused(case, tmp_path):
  check(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('case', SLOW_TEMPLATES, ids=Case.id)
def test_templates_without_end_are_refused(case, tmp_path):
  check(case, tmp_path)
  assert render('{{ messages[0].content }}') == 'hi'


def render(text, **variables):
  return chat.render(text, CHAT, names={'bos': '<s>'}, **variables)


def test_values_that_are_not_of_json_are_refused():
  for value in (object(), {1, 2}, b'x', len):
    with pytest.raises(ValueError, match='have to be JSON values'):
      render('x', tools=[value])


def test_an_unknown_word_is_a_value_error(tmp_path):
  content = json.loads(checkpoints.tokenizer_text())
  content['model']['unk_token'] = '[none]'
  model = tokenizers.Json(json.dumps(content))
  with pytest.raises(ValueError, match='cannot encode'):
    model.encode('zzz')
  with pytest.raises(ValueError, match='cannot encode'):
    model.encode_batch(['zzz'])
