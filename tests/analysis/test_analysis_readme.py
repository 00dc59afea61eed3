"""The examples in the room's README run."""

import re

import numpy as np
import pytest

from moe_jax.analysis import traces
from moe_jax.data import tokenizers
from tests import test_readme


def executed(name: str) -> dict:
  """The variables of the one example that has this name in it, after it ran."""
  blocks = test_readme.blocks('moe_jax/analysis/README.md')
  (code,) = (text for text in blocks if name in text)
  scope = {'__name__': 'readme'}
  exec(code, scope)
  return scope


@pytest.mark.parametrize(
  ('name', 'printed'),
  [
    ('specialisation', r'.* nats, adjusted 100%\n0\.\d\d\n'),
    ('traces.write', r'layer 1: load \[0 0 4 0\], 25% dropped\n'),
    ('flips.compare', r".*'same': 1, .*'rounding': 1, .*'other weights': 1}\n"),
  ],
)
def test_an_example_prints_what_it_says(name, printed, capsys):
  executed(name)
  assert re.fullmatch(printed, capsys.readouterr().out)


def test_the_example_colours_a_text(tmp_path, monkeypatch):
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
  scope = executed('coloured_text')
  assert '&lt;<sub>0</sub>' in scope['html']
