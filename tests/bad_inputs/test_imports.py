"""Checkpoints of others that are wrong, damaged, or too large to be true."""

import functools
import json
import os
import struct
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from moe_jax import interop
from moe_jax.interop import import_run, verifying
from moe_jax.interop.checkpoint_folder import ARCHITECTURES, open_checkpoint
from moe_jax.interop.config_keys import Number
from moe_jax.interop.tensor_files import TensorFiles
from moe_jax.run_config import RunConfig
from tests.bad_inputs import checkpoints
from tests.bad_inputs.cases import Case, check, frozen

NAN, INFINITY = float('nan'), float('inf')
# These values are in no kind of number, of whatever range.
NEVER = (True, 'x', [1], {'a': 1}, 10**400, -1.5)
BELOW_ZERO = (-1, -(10**30))
# These values have a meaning for the key.
MEANINGFUL = {'moe_eval_capacity_token_fraction': (*BELOW_ZERO, -1.5)}


def bad_values(number: Number):
  """Values that are refused for a key of this kind."""
  yield from NEVER
  yield from BELOW_ZERO
  if number.above or number.low > 0:
    yield 0
  if number.whole:
    yield from (0.5, 2**31)
  if not number.optional:
    yield None
  if number.below == 1:
    yield 1.0


def config_case(kind, name, value):
  def call(folder):
    config = {'model_type': kind, name: value}
    (folder / 'config.json').write_text(json.dumps(config))
    open_checkpoint(frozen(folder))

  return Case(
    f'{kind}:{name}={value!r:.20}', call, (f'{name}={value!r:.40}', 'is no ')
  )


NUMBERS = [
  config_case(kind, name, value)
  for kind, architecture in ARCHITECTURES.items()
  for name, (number, *_) in {
    **architecture.keys.honoured,
    **architecture.keys.training,
  }.items()
  if isinstance(number, Number)
  for value in bad_values(number)
  if value not in MEANINGFUL.get(name, ())
]

IDS = [
  config_case('mixtral', name, value)
  for name in (
    'bos_token_id', 'eos_token_id', 'pad_token_id', 'decoder_start_token_id',
    'forced_bos_token_id', 'forced_eos_token_id', 'sep_token_id',
  )
  for value in ('1', True, -1, 32000, 4 * 10**9, 1.0, [1, -1], [[1]], {})
  if (name, value) != ('decoder_start_token_id', None)
]  # fmt: skip


def file_case(name, content, phrases, **options):
  """A case of a file with this content beside good files."""

  def call(folder):
    checkpoints.write(folder)
    write = folder.joinpath(name).write_bytes
    write(content if isinstance(content, bytes) else content.encode())
    if name != checkpoints.WEIGHTS and 'weights' in options:
      (folder / checkpoints.WEIGHTS).unlink()
    interop.load(frozen(folder))

  return Case(f'{name}:{content[:16]!r}', call, (name, *phrases))


NO_JSON = {
  '': 'Expecting value',
  '[': 'is no JSON',
  '[]': 'a list, not an object',
  '3': 'a int, not an object',
  '"x"': 'a str, not an object',
  'null': 'a NoneType, not an object',
  '[' * 100_000: 'nested too deeply',
  '{"a":' * 100_000: 'nested too deeply',
  '{"vocab_size": NaN}': 'NaN',
  '{"rms_norm_eps": Infinity}': 'Infinity',
  '{"rms_norm_eps": -Infinity}': '-Infinity',
  '{"vocab_size": ' + '9' * 5000 + '}': 'is no JSON',
  b'\xff\xfe{}': 'is not UTF-8',
  b'{"a": "\xe9"}': 'is not UTF-8',
  '{}{}': 'is no JSON',
  '\ufeff{}': 'is no JSON',
}
FILES = [
  file_case('config.json', content, [phrase])
  for content, phrase in NO_JSON.items()
]
FILES += [
  file_case(
    checkpoints.WEIGHTS + '.index.json', content, [phrase], weights=False
  )
  for content, phrase in NO_JSON.items()
]
INDEX = checkpoints.WEIGHTS + '.index.json'
FILES += [
  file_case(INDEX, json.dumps(value), [phrase], weights=False)
  for value, phrase in [
    ({}, 'is damaged'),
    ({'weight_map': {}}, 'is damaged'),
    ({'weight_map': []}, 'is damaged'),
    ({'weight_map': None}, 'is damaged'),
    ({'weight_map': 'abc'}, 'is damaged'),
    *(
      ({'weight_map': {'a': name}}, 'is no file beside it')
      for name in (
        '', '.', '..', '../x.safetensors', '/etc/passwd', 'a/b.safetensors',
        '\\x.safetensors', 'C:x.safetensors', 'x\x00.safetensors', 3, None,
        [], {}, True, 'pytorch_model.bin', 'MODEL.SAFETENSORS', 'config.json',
        'x\n.safetensors', '/proc/self/environ', '~/x', 'model.safetensors/',
      )
    ),
  ]
]  # fmt: skip


def header(value, size=None, after=b''):
  raw = value if isinstance(value, bytes) else json.dumps(value).encode()
  return struct.pack('<Q', len(raw) if size is None else size) + raw + after


def tensor(dtype='F32', shape=(2,), offsets=(0, 8)):
  return {'a': {'dtype': dtype, 'shape': shape, 'data_offsets': offsets}}


WEIGHTS = [
  b'', b'\x00' * 7, b'no header' * 9, header({}, 2**63), header({}, 10**9),
  header(b'{'), header(b'[]'), header(b'[' * 5000), header(tensor()),
  header(tensor(offsets=(0, 2**62)), after=bytes(8)),
  header(tensor(shape=(2**40, 2**40)), after=bytes(8)),
  header(tensor(shape=(-1,)), after=bytes(8)),
  header(tensor(offsets=(8, 0)), after=bytes(8)),
  header(tensor(dtype='F31'), after=bytes(8)),
  header(tensor(), after=bytes(9)),
]  # fmt: skip
FILES += [
  file_case(checkpoints.WEIGHTS, content, ['no safetensors file'])
  for content in WEIGHTS
]


def weights_case(name, change, phrases):
  """A case of weights, some of which are changed."""

  def call(folder):
    checkpoints.write(folder)
    tensors = checkpoints.tensors()
    change(tensors)
    save_file(tensors, folder / checkpoints.WEIGHTS)
    interop.load(frozen(folder))

  return Case(name, call, phrases)


GATE = 'model.layers.0.block_sparse_moe.gate.weight'


def fill(value, *names, dtype=np.float32):
  def change(tensors):
    for name in names:
      tensors[name] = tensors[name].astype(dtype)
      tensors[name].flat[1:3] = value

  return change


TENSORS = [
  weights_case('nan', fill(NAN, GATE), ('not finite', f'{GATE}: 2 values')),
  weights_case('infinity', fill(-INFINITY, GATE), (f'{GATE}: 2 values',)),
  weights_case(
    'infinity of float16',
    fill(INFINITY, GATE, dtype=np.float16),
    (f'{GATE}: 2 values',),
  ),
  weights_case(
    'two tensors',
    fill(NAN, GATE, 'lm_head.weight'),
    (f'{GATE}: 2 values', 'lm_head.weight: 2 values', 'allow_nonfinite=True'),
  ),
  weights_case('missing', lambda h: h.pop(GATE), (f'missing: {GATE} [3, 8]',)),
  weights_case(
    'unknown',
    lambda h: h.update({'x\n\x1b[31m': np.zeros(2)}),
    ("has a tensor with the name 'x\\n\\x1b[31m'",),
  ),
  weights_case(
    'integers',
    lambda h: h.update({GATE: np.zeros((3, 8), np.int32)}),
    (f'type: {GATE} is I32',),
  ),
  weights_case(
    'complex',
    lambda h: h.update({GATE: np.zeros((3, 8), np.complex64)}),
    (GATE, 'none of'),
  ),
  weights_case(
    'scalar',
    lambda h: h.update({GATE: np.zeros((), np.float32)}),
    (f'shape: {GATE} is []',),
  ),
]


def size_case(**changes):
  """A case of sizes that the files do not have; they are not allocated."""

  def call(folder):
    interop.load(frozen(checkpoints.write(folder, **changes)))

  name, value = next(iter(changes.items()))
  return Case(f'sizes:{name}', call, (f'{name}={value}', 'values of all ten'))


SIZES = [
  size_case(**{name: value})
  for name in (
    'vocab_size', 'hidden_size', 'intermediate_size', 'head_dim',
    'num_local_experts', 'num_attention_heads', 'num_key_value_heads',
  )
  for value in (10**7, 2**31 - 4)
  if name not in ('num_attention_heads', 'num_key_value_heads')
]  # fmt: skip


def many_layers(folder):
  write = functools.partial(checkpoints.write, num_hidden_layers=60_000)
  interop.load(frozen(write(folder)))


def small_vocabulary(folder):
  checkpoints.write(folder / 'hf')
  (folder / 'hf' / 'tokenizer.json').write_text(checkpoints.tokenizer_text(13))
  frozen(folder)
  import_run.import_run(folder / 'hf', folder / 'run', RunConfig())


def architectures(value):
  def call(folder):
    checkpoints.write_config(folder, architectures=value)
    open_checkpoint(frozen(folder))

  return call


def objects(folder):
  path = folder / 'expected.npz'
  np.savez(path, logits=np.array([{}], object))
  verifying.verify(frozen(folder), path)


def deflated(folder):
  path = folder / 'expected.npz'
  with zipfile.ZipFile(path, 'w') as file:
    file.writestr('logits.npy', b'\x93NUMPY\x01\x00' + b'\xff' * 80)
  verifying.verify(frozen(folder), path)


OTHERS = [
  Case('layers', many_layers, ('describes a model of', 'parameters')),
  Case(
    'a tokenizer larger than the model',
    small_vocabulary,
    ("'w9' is the first of the last 2", 'vocab_size=11'),
  ),
  Case('architectures: text', architectures('x'), ("'x' is no list",)),
  Case('architectures: number', architectures(3), ('3 is no list',)),
  Case('architectures: list', architectures([[]]), ('unknown architecture',)),
  Case('model_type: module', architectures(['os:system']), ("'os:system'",)),
  Case('expected: objects', objects, ("'logits' holds objects", 'never')),
  Case('expected: damaged', deflated, ("'logits' is damaged",)),
]


def kind(value):
  def call(folder):
    checkpoints.write_config(folder, model_type=value)
    open_checkpoint(frozen(folder))

  return Case(f'model_type={value!r:.20}', call, ('unknown model_type',))


KINDS = [kind(v) for v in (..., 'llama', 3, [], {}, None, 'os:system', 'x\n')]


def rope(value):
  def call(folder):
    checkpoints.write_config(folder, rope_parameters=value)
    open_checkpoint(frozen(folder))

  return Case(f'rope_parameters={value!r:.40}', call, ('rope',))


ROPES = [
  rope(value)
  for value in (
    {'rope_theta': -1.0}, {'rope_theta': 0}, {'rope_theta': 'x'},
    {'rope_theta': [1]}, {'rope_theta': True}, {'rope_theta': 10**400},
    {'rope_type': 'yarn'}, {'rope_type': []}, {'type': {}},
    {'partial_rotary_factor': -1}, {'factor': 2.0}, [], 'x', 3,
  )
]  # fmt: skip


@pytest.mark.parametrize(
  'case',
  [*IDS, *FILES, *TENSORS, *SIZES, *OTHERS, *KINDS, *ROPES],
  ids=Case.id,
)
def test_refused(case, tmp_path):
  check(case, tmp_path)


# There are some hundred such cases; each takes a millisecond.
@pytest.mark.parametrize('kind', sorted(ARCHITECTURES))
def test_numbers_are_refused_by_name(kind, tmp_path):
  cases = [case for case in NUMBERS if case.name.startswith(kind)]
  assert len(cases) > 100
  for i, case in enumerate(cases):
    folder = tmp_path / str(i)
    folder.mkdir()
    check(case, folder)


def test_nonfinite_weights_are_read_when_asked_for(tmp_path):
  tensors = checkpoints.tensors()
  fill(NAN, GATE)(tensors)
  checkpoints.write(tmp_path)
  save_file(tensors, tmp_path / checkpoints.WEIGHTS)
  loaded = interop.load(tmp_path, allow_nonfinite=True)
  leaves = [np.asarray(x) for x in jax_leaves(loaded.variables)]
  assert sum(np.isnan(leaf).sum() for leaf in leaves) == 2


def jax_leaves(tree):
  import jax

  return jax.tree.leaves(tree)


def test_files_larger_than_memory_are_not_read(tmp_path):
  checkpoints.write(tmp_path)
  with open(tmp_path / 'config.json', 'wb') as file:
    os.truncate(file.fileno(), 2**40)  # it takes no room on the disk
  with pytest.raises(ValueError, match=r'has 1099511627776 bytes, at most'):
    open_checkpoint(tmp_path)


def test_messages_on_very_many_tensors_are_short(tmp_path):
  checkpoints.write(tmp_path)
  save_file(
    {f't{i}': np.zeros(1) for i in range(3000)}, tmp_path / checkpoints.WEIGHTS
  )
  with pytest.raises(ValueError, match=r'and \d+ more') as error:
    interop.load(tmp_path)
  assert len(str(error.value).splitlines()) < 120
  assert TensorFiles(tmp_path).num_values == 3000
