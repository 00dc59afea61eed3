"""Files cut, flipped and rewritten at random raise only errors of this project.

A Rust panic, a crash of the process and a hang would all end these tests; a
read outside the folder would find the secret beside it.
"""

import io
import json
import pathlib
import shutil
import tempfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_jax import interop
from moe_jax.data import ChoiceFilesSource, cache_folders, tokenizers
from moe_jax.interop.checkpoint_folder import open_checkpoint
from moe_jax.interop.tensor_files import TensorFiles
from moe_jax.interop.verifying import read_npz
from tests.bad_inputs import checkpoints
from tests.bad_inputs.cases import REPORTED, assert_message
from tests.data import stored

pytestmark = pytest.mark.slow
FUZZ = settings(
  derandomize=True,
  deadline=None,
  max_examples=75,
  suppress_health_check=list(HealthCheck),
)
SECRET = b'a secret of this machine'
JSON = st.recursive(
  st.none()
  | st.booleans()
  | st.integers(-(2**70), 2**70)
  | st.floats()
  | st.text(max_size=8)
  | st.sampled_from(('../secret', '/etc/passwd', 'os:system', '__class__')),
  lambda inner: (
    st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=8), inner, max_size=4)
  ),
  max_leaves=8,
)


@st.composite
def damaged(draw, good: bytes) -> bytes:
  """Bytes that were cut, flipped, repeated or overwritten somewhere."""
  data = bytearray(good)
  for _ in range(draw(st.integers(1, 4))):
    position = draw(st.integers(0, max(len(data) - 1, 0)))
    change = draw(st.sampled_from(('cut', 'flip', 'insert', 'write', 'repeat')))
    if change == 'cut':
      del data[position : position + draw(st.integers(1, 4000))]
    elif change == 'flip' and data:
      data[position] ^= 1 << draw(st.integers(0, 7))
    elif change == 'insert':
      data[position:position] = draw(st.binary(max_size=9))
    elif change == 'write':
      text = draw(st.sampled_from((b'"', b'{', b'[', b'-', b'9' * 20, b'null')))
      data[position : position + len(text)] = text
    else:
      data[position:position] = data[max(position - 9, 0) : position] * 20
  return bytes(data)


@st.composite
def rewritten(draw, good) -> bytes:
  """A JSON object in which some values, also nested ones, are changed."""
  value = json.loads(json.dumps(good))
  for _ in range(draw(st.integers(1, 3))):
    inner = value
    while isinstance(inner, dict) and inner:
      key = draw(st.sampled_from(sorted(inner)))
      if not isinstance(inner[key], dict) or draw(st.booleans()):
        inner[key] = draw(JSON)
        break
      inner = inner[key]
  return json.dumps(value).encode('utf-8', 'surrogatepass')


def fuzzed(*strategies):
  """A test of what these strategies draw."""
  return lambda test: FUZZ(given(*strategies)(test))


def survives(files: dict[str, bytes], read) -> None:
  """Checks that a folder with these files is read, or refused in our way."""
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary) / 'folder'
    folder.mkdir()
    (folder.parent / 'secret').write_bytes(SECRET)
    for name, content in files.items():
      (folder / name).write_bytes(content)
    try:
      read(folder)
    except REPORTED as error:
      assert_message(str(error), (), 130)
      assert SECRET.decode() not in str(error)
    assert (folder.parent / 'secret').read_bytes() == SECRET
    assert len(list(folder.parent.iterdir())) == 2


def content_of(write) -> dict[str, bytes]:
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    write(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


CHECKPOINT = content_of(checkpoints.write)
WEIGHTS = CHECKPOINT[checkpoints.WEIGHTS]
INDEX = checkpoints.WEIGHTS + '.index.json'
HEADER = json.loads(WEIGHTS[8 : 8 + int.from_bytes(WEIGHTS[:8], 'little')])
MAP = {'weight_map': dict.fromkeys(checkpoints.tensors(), 'x.safetensors')}
TOKENIZER = checkpoints.tokenizer_text().encode()


def read_tensors(folder: pathlib.Path) -> None:
  files = TensorFiles(folder)
  for name in files.specs:
    files.read(name)


@fuzzed(damaged(WEIGHTS))
def test_weights(content):
  survives({checkpoints.WEIGHTS: content}, read_tensors)


@fuzzed(rewritten(HEADER))
def test_headers_of_weights(header):
  content = len(header).to_bytes(8, 'little') + header + bytes(4096)
  survives({checkpoints.WEIGHTS: content}, read_tensors)


@fuzzed(damaged(json.dumps(MAP).encode()) | rewritten(MAP))
def test_indices(index):
  survives({INDEX: index, 'x.safetensors': WEIGHTS}, read_tensors)


@fuzzed(
  damaged(CHECKPOINT['config.json']) | rewritten(checkpoints.CONFIG),
  st.sampled_from(('mixtral', 'nllb-moe', 'switch_transformers')),
)
def test_configs(config, kind):
  config = config.replace(b'"mixtral"', json.dumps(kind).encode())
  survives({'config.json': config}, open_checkpoint)


@settings(FUZZ, max_examples=60)
@given(rewritten(checkpoints.CONFIG))
def test_configs_with_weights(config):
  survives({'config.json': config, checkpoints.WEIGHTS: WEIGHTS}, interop.load)


def read_tokenizer(folder: pathlib.Path) -> None:
  tokenizer = tokenizers.Json.from_folder(folder)
  ids = tokenizer.encode('w1 a </s> ü')
  tokenizer.encode_inputs('w1 a </s> ü')
  tokenizer.decode(ids)
  tokenizer.save(folder / 'saved')
  tokenizers.load(folder / 'saved')


@fuzzed(damaged(TOKENIZER) | rewritten(json.loads(TOKENIZER)))
def test_tokenizers(content):
  survives({'tokenizer.json': content}, read_tokenizer)


SPECIAL = {
  'bos_token_id': 1, 'eos_token_id': [1, 2], 'pad_token_id': None,
  'vocab_size': 11, 'bos_token': 'a', 'eos_token': {'content': '</s>'},
  'chat_template': [{'name': 'default', 'template': 'x'}],
}  # fmt: skip


@fuzzed(
  rewritten(SPECIAL) | damaged(json.dumps(SPECIAL).encode()),
  st.sampled_from(
    ('config.json', 'generation_config.json', 'tokenizer_config.json')
  ),
)
def test_special_tokens(content, name):
  survives({'tokenizer.json': TOKENIZER, name: content}, read_tokenizer)


SAVED = tokenizers.Json(TOKENIZER.decode()).to_json()


@fuzzed(
  rewritten(SAVED)
  | rewritten({'kind': 'chars', 'characters': 'abc'})
  | damaged(json.dumps(SAVED).encode())
)
def test_saved_tokenizers(content):
  survives({'saved': content}, lambda folder: tokenizers.load(folder / 'saved'))


def arrays() -> bytes:
  file = io.BytesIO()
  np.savez_compressed(
    file,
    train_features=np.zeros((3, 2)),
    train_labels=np.array([0, 1, 1]),
    validation_features=np.zeros((2, 2)),
    validation_labels=np.array([0, 1]),
  )
  return file.getvalue()


@fuzzed(damaged(arrays()))
def test_arrays(content):
  survives({'a.npz': content}, lambda folder: read_npz(folder / 'a.npz'))


ITEM = {'prompt': 'p', 'answers': ['a', 'b'], 'label': 1}


@fuzzed(rewritten(ITEM) | damaged(json.dumps(ITEM).encode() * 2))
def test_questions(content):
  survives(
    {'q': content},
    lambda folder: ChoiceFilesSource(f'{folder}/q').items('validation'),
  )


def test_the_cache(tmp_path):
  texts = {'train': ['abc', 'de'], 'validation': ['fg']}

  def write(folder):
    stored.write_tokens(folder, texts, tokenizers.Bytes())

  folder = cache_folders.prepared(tmp_path / 'good', write)
  good = {path.name: path.read_bytes() for path in folder.iterdir()}
  shutil.rmtree(folder)

  def read(folder):
    cache_folders.prepared(folder, lambda _: pytest.fail('made anew'))
    read_again = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert read_again == good  # what is not refused is what was written

  def check_with(name):
    return lambda content: survives({**good, name: content}, read)

  for name in ('files.json', 'about.json', 'train.documents.tokens'):
    fuzzed(damaged(good[name]))(check_with(name))()


def test_pickles():
  torch = pytest.importorskip('torch')
  for zipped in (True, False):
    file = io.BytesIO()
    weights = {'a': torch.zeros(2, 3), 'b': torch.ones(4).bfloat16()}
    torch.save(weights, file, _use_new_zipfile_serialization=zipped)

    @fuzzed(damaged(file.getvalue()))
    def check(content):
      survives({'pytorch_model.bin': content}, read_tensors)

    check()
