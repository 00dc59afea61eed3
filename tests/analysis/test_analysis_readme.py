"""The examples in the room's README run, and it names every file."""

import pathlib
import re

import numpy as np

from moe_jax import analysis
from moe_jax.analysis import traces
from moe_jax.data import tokenizers

README = pathlib.Path(analysis.__file__).parent / 'README.md'
TEXT = README.read_text(encoding='utf-8')
EXAMPLES = re.findall(r'```python\n(.*?)```', TEXT, re.DOTALL)


def example(name: str) -> str:
  """The one example that has this name in it."""
  (code,) = (text for text in EXAMPLES if name in text)
  return code


def test_the_example_says_what_ids_tell(capsys):
  exec(
    compile(example('specialisation'), str(README), 'exec'),
    {'__name__': 'readme'},
  )
  information_line, repeat_rate = capsys.readouterr().out.splitlines()
  assert information_line.endswith('nats, adjusted 100%')
  assert 0.15 < float(repeat_rate) < 0.35  # ids are random, so about 1 / 4


def test_the_example_reads_a_trace(capsys):
  exec(compile(example('traces.write'), str(README), 'exec'), {})
  printed = capsys.readouterr().out
  assert printed == 'layer 1: load [0 0 4 0], 25% dropped\n'


def test_the_example_colours_a_text(tmp_path, monkeypatch, capsys):
  run = tmp_path / 'runs/tiny'
  run.mkdir(parents=True)
  tokenizer = tokenizers.Bytes()
  tokenizer.save(run / 'tokenizer.json')
  ids = tokenizer.encode('a<b')[None]
  expert = np.array([[[3], [0], [3]]])
  layers = {1: traces.LayerChoices(expert, np.ones(expert.shape), expert >= 0)}
  positions = np.arange(3)[None]
  record = traces.Record(
    'train_capacity', 0, 0, ids, positions, np.ones_like(ids), layers
  )
  header = traces.Header({1: traces.LayerInfo(4, 1)}, 1, 3, vocab_size=300)
  traces.write(run / 'trace', header, [record])
  monkeypatch.chdir(tmp_path)
  scope = {}
  exec(compile(example('coloured_text'), str(README), 'exec'), scope)
  assert '&lt;<sub>0</sub>' in scope['html']


def test_every_file_is_named():
  files = {path.name for path in README.parent.glob('*.py')}
  assert [name for name in files - {'__init__.py'} if name not in TEXT] == []
