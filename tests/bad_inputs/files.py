"""Told bad inputs in files: data, tokenizers, checkpoints, folders of runs."""

import functools
import json
import pathlib
import struct

import numpy as np
from safetensors.numpy import save_file

from moe_jax import interop
from moe_jax.config import section_of
from moe_jax.data import ChoiceFilesSource, tokenizers
from moe_jax.data.tokenizers import chat
from moe_jax.interop import import_run
from moe_jax.interop.checkpoint_folder import open_checkpoint
from moe_jax.run_config import RunConfig
from moe_jax.runs import workdir
from moe_jax.training import trained
from tests.bad_inputs import checkpoints
from tests.bad_inputs.cases import REPORTED, Case, frozen
from tests.data import stored
from tests.training import tiny

DEEP = '[' * 100_000


def raw(content) -> bytes:
  """Bytes, a text, or a JSON value, as bytes."""
  if not isinstance(content, str | bytes):
    content = json.dumps(content)
  return content if isinstance(content, bytes) else content.encode()


def a_file(name, content, phrases, read, errors=REPORTED, write=None):
  """A case of a folder with one bad file, which `read` gets.

  Args:
    name: Name of the file.
    content: Its content: bytes, a text, or a JSON value.
    phrases: Parts of the message, parted by ` | `.
    read: Reads the folder.
    errors: Types of the error.
    write: Writes good files into the folder before.
  """

  def call(folder):
    if write is not None:
      write(folder)
    (folder / name).write_bytes(raw(content))
    read(frozen(folder))

  words = (*phrases.split(' | '),)
  return Case(f'{name}: {raw(content)[:40]!r}', call, words, errors)


class Ids(tokenizers.Bytes, kind='ids of a test'):
  """A tokenizer whose ids are not of its vocabulary."""

  def __init__(self, *ids, dtype=np.int64):
    self.ids = np.array(ids, dtype)

  def encode(self, text):
    del text
    return self.ids


def stored_texts(name, texts, tokenizer, phrases):
  def call(folder):
    try:
      stored.write_tokens(
        folder, {'train': texts, 'validation': texts}, tokenizer
      )
    finally:
      for path in folder.iterdir():  # begun files are those of `prepared`
        path.unlink()

  return Case(f'stored: {name}', call, (*phrases.split(' | '),))


def question(**changes):
  values = {'prompt': 'p', 'answers': ['a', 'b'], 'label': 0, **changes}
  return {k: v for k, v in values.items() if v is not ...}


def questions(folder):
  ChoiceFilesSource(str(folder / 'q.jsonl')).items('validation')


BYTES = tokenizers.Bytes()
DATA = [
  stored_texts('ids that wrap', ['a'], Ids(2**16), 'to 65536 | vocab_size=257'),
  stored_texts('ids of floats', ['a'], Ids(1, dtype=float), 'float64'),
  stored_texts('a number', ['a', 3], BYTES, '=3 is no text'),
  stored_texts('half a pair', ['a\ud800'], BYTES, 'surrogates'),
  *(
    a_file('q.jsonl', content, f'q.jsonl | {words}', questions)
    for content, words in (
      ('{', 'line 1 is no JSON'),
      (DEEP, 'nested too deeply'),
      (question(label=True), 'label=True is no'),
      (question(label=2), 'label=2 is no'),
      (question(answers=['a', 'a']), 'answers='),
      (question(prompt='a\ud800'), 'a half of a character'),
    )
  ),
]


def with_tokenizer(folder):
  (folder / 'tokenizer.json').write_text(checkpoints.tokenizer_text())


def vocabulary(**ids):
  content = json.loads(checkpoints.tokenizer_text())
  content['model']['vocab'] = ids
  return content


JSON = {'kind': 'json', 'model': json.loads(checkpoints.tokenizer_text())}
SPECIAL = {'bos': None, 'eos': [1], 'pad': None, 'vocab_size': 11}
EXTENDED = '{"kind": "extended", "names": [], "end_inputs": true, "base": '
TOKENIZERS = [
  *(
    a_file(
      name, content, phrases, tokenizers.Json.from_folder, write=with_tokenizer
    )
    for name, content, phrases in (
      ('config.json', {'eos_token_id': 11}, 'eos_token_id=11 | [0, 11)'),
      ('config.json', {'pad_token_id': True}, 'pad_token_id=True'),
      ('config.json', {'vocab_size': '9'}, "vocab_size='9' is no"),
      ('generation_config.json', {'bos_token_id': -1}, 'bos_token_id=-1'),
      ('generation_config.json', DEEP, 'nested too deeply'),
      (
        'tokenizer_config.json',
        {'chat_template': [{'name': 'default', 'template': 3}]},
        'chat_template | not a text',
      ),
    )
  ),
  *(
    a_file('tokenizer.json', content, phrases, tokenizers.Json.from_folder)
    for content, phrases in (
      ({}, 'not a tokenizers JSON file'),
      (vocabulary(), 'has no tokens'),
      (vocabulary(a=0, b=4 * 10**9), "token 'b' has the id 4000000000"),
    )
  ),
  *(
    a_file(
      'saved.json',
      content,
      f'saved.json | {phrases}',
      lambda folder: tokenizers.load(folder / 'saved.json'),
    )
    for content, phrases in (
      ({'kind': 'json', 'model': 3}, 'no saved tokenizer'),
      ({**JSON, 'special': {**SPECIAL, 'bos': 11}}, 'bos_token_id=11'),
      (EXTENDED * 700 + '{"kind": "bytes"}' + '}' * 700, 'recursion'),
    )
  ),
]


def render(text, limits=None, **variables):
  messages = [{'role': 'user', 'content': 'hi'}]
  limits = limits or chat.Limits()
  return chat.render(
    text, messages, names={'bos': '<s>'}, limits=limits, **variables
  )


def template(text, phrase, **limits):
  limits = chat.Limits(**limits)
  return Case(
    f'template: {text[:50]}',
    lambda folder: render(text, limits),
    ('chat template: ', phrase),
  )


TEMPLATES = [
  template('{{ "x" * 10**10 }}', 'more than 512 MiB of memory'),
  template("{{ 'x' * 10**5 + 'y' }}", 'a text of 100001', text_length=10**5),
  template('{{ 9 ** (9 ** 9) }}', '1 s of processor time', cpu_seconds=1),
  template(
    '{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}', 'nested too deeply'
  ),
  template("{{ raise_exception('no\nrole\x1b[31m') }}", 'no role?[31m'),
  template('{% include "/etc/passwd" %}', 'no loader'),
  template("{{ ''.__class__.__mro__[1].__subclasses__() }}", 'unsafe'),
  template("{{ cycler.__init__.__globals__.os.system('x') }}", 'unsafe'),
  template("{{ '{0.__class__.__mro__}'.format(1) }}", 'unsafe'),
]

INDEX = checkpoints.WEIGHTS + '.index.json'
GATE = 'model.layers.0.block_sparse_moe.gate.weight'


def header(value, size=None, after=b''):
  text = raw(value)
  return struct.pack('<Q', len(text) if size is None else size) + text + after


def tensor(dtype='F32', shape=(2,), offsets=(0, 8)):
  return {'a': {'dtype': dtype, 'shape': shape, 'data_offsets': offsets}}


def without_weights(folder):
  (checkpoints.write(folder) / checkpoints.WEIGHTS).unlink()


def weights(name, phrases, change):
  """A case of weights, some of which are changed."""

  def call(folder):
    checkpoints.write(folder)
    tensors = checkpoints.tensors()
    change(tensors)
    save_file(tensors, folder / checkpoints.WEIGHTS)
    interop.load(frozen(folder))

  return Case(f'weights: {name}', call, (*phrases.split(' | '),))


def fill(value, *names):
  def change(tensors):
    for name in names:
      tensors[name].flat[1:3] = value

  return change


def described(phrases, read=open_checkpoint, **changes):
  """A case of a config.json whose weights are not read, or not there."""

  def call(folder):
    checkpoints.write_config(folder, **changes)
    read(frozen(folder))

  return Case(f'hf: {str(changes)[:60]}', call, (*phrases.split(' | '),))


def small_vocabulary(folder):
  checkpoints.write(folder / 'hf')
  (folder / 'hf' / 'tokenizer.json').write_text(checkpoints.tokenizer_text(13))
  frozen(folder)
  import_run.import_run(folder / 'hf', folder / 'run', RunConfig())


def sizes(folder):
  interop.load(frozen(checkpoints.write(folder, hidden_size=10**7)))


def many_layers(folder):
  interop.load(frozen(checkpoints.write(folder, num_hidden_layers=60_000)))


IMPORTS = [
  *(
    a_file(
      'config.json', content, phrase, interop.load, write=checkpoints.write
    )
    for content, phrase in (
      ('[]', 'a list, not an object'),
      (DEEP, 'nested too deeply'),
      ('{"vocab_size": NaN}', 'NaN'),
      ('{"vocab_size": ' + '9' * 5000 + '}', 'is no JSON'),
    )
  ),
  *(
    a_file(INDEX, content, phrase, interop.load, write=without_weights)
    for content, phrase in (
      ({'weight_map': {}}, 'is damaged'),
      *(
        ({'weight_map': {'a': name}}, 'is no file beside it')
        for name in ('..', '/etc/passwd', 'x\x00.safetensors', 3)
      ),
    )
  ),
  *(
    a_file(
      checkpoints.WEIGHTS,
      content,
      'no safetensors file',
      interop.load,
      write=checkpoints.write,
    )
    for content in (
      header({}, 2**63),
      header(tensor(offsets=(0, 2**62)), after=bytes(8)),
      header(tensor(shape=(-1,)), after=bytes(8)),
    )
  ),
  weights(
    'two with NaN',
    f'{GATE}: 2 values | lm_head.weight: 2 values | allow_nonfinite=True',
    fill(np.nan, GATE, 'lm_head.weight'),
  ),
  weights(
    'a name that writes to the terminal',
    "has a tensor with the name 'x\\n\\x1b[31m'",
    lambda h: h.update({'x\n\x1b[31m': np.zeros(2)}),
  ),
  Case('sizes that are not allocated', sizes, ('hidden_size=10000000',)),
  Case('layers', many_layers, ('describes a model of', 'parameters')),
  Case(
    'a tokenizer larger than the model',
    small_vocabulary,
    ("'w9' is the first of the last 2", 'vocab_size=11'),
  ),
  described('unknown model_type', model_type=...),
  described('unknown model_type', model_type='llama'),
  described('rope', rope_parameters={'rope_theta': 0}),
  described('rope', rope_parameters={'rope_type': 'yarn'}),
  described('eos_token_id=32000', vocab_size=32000, eos_token_id=32000),
]


@functools.cache
def config():
  return section_of(tiny.options())


def of_a_run(folder):
  (folder / workdir.TOKENIZER).write_text('{}')
  (folder / workdir.CHECKPOINTS).mkdir()


def start(folder):
  workdir.check(folder, config())


def edited(**changes) -> str:
  return json.dumps(config().to_dict() | changes)


def a_file_for_a_folder(folder: pathlib.Path):
  (folder / 'run').write_text('a file')
  trained.read(frozen(folder) / 'run')


WORKDIRS = [
  *(
    a_file(
      workdir.CONFIG, content, f'config.json | {phrases}', read, write=of_a_run
    )
    for content, phrases, read in (
      ('', 'no JSON', trained.read),
      (DEEP, 'nested too deeply', start),
      (edited(model=None), 'damaged | model', start),
      (edited(checkpoint={'directory': 3}), 'damaged | checkpoint', start),
      (edited(batch_size=1.5), 'batch_size=1.5', trained.read),
      (edited(data={'kind': 'text'}), 'commit d9e62315 of', trained.read),
    )
  ),
  Case('a file', a_file_for_a_folder, ('run is a file',)),
  *(
    Case(f'workdir {name!r}', lambda folder, name=name: start(name), (phrase,))
    for name, phrase in (
      ('', 'empty'),
      ('~nobody_has_this_name/run', 'home directory'),
    )
  ),
]
CASES = [*DATA, *TOKENIZERS, *TEMPLATES, *IMPORTS, *WORKDIRS]
