"""The command that analyses a trace, its tables and pictures."""

import re

import numpy as np
import pytest

from moe_jax.analysis import routes, routing_report, traces
from moe_jax.analysis.routing_report import ValueTable
from moe_jax.analysis.traces import Header, LayerChoices, LayerInfo, Record
from moe_jax.data import tokenizers
from tests.analysis.random_choices import random_choices
from tests.bad_inputs.cases import check_command

B, T, V = 2, 24, 13
LAYERS = {
  1: LayerInfo(4, 2, sequence='encoder'),
  3: LayerInfo(6, 2),
  5: LayerInfo(5, 1, by_expert=True),
}
HEADER = Header(LAYERS, B, T, V, sources=('a<b', 'c'), note='A note & more.')


def records(kind, step):
  """Random choices; the tokens of an evaluation are the same at all steps."""
  for batch in range(2):
    data_rng = np.random.default_rng((batch, step * (kind == 'train')))
    rng = np.random.default_rng((batch, step))
    documents = np.ones((B, T), np.int32)
    documents[:, 20:] = 0
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    sources = np.tile(data_rng.integers(0, 2, (B, 1), np.int32), T)
    for sequence in ('encoder', ''):
      layers = {
        number: random_choices(rng, info, documents > 0)
        for number, info in LAYERS.items()
        if info.sequence == sequence
      }
      tokens = data_rng.integers(0, V, (B, T)).astype(np.int32)
      batch_fields = tokens, positions, documents, layers, sources, sequence
      yield Record(kind, step, batch, *batch_fields)


def write(folder, kinds=('all_tokens', 'train', 'valid')):
  steps = [0, 10, 20]
  stream = (r for step in steps for kind in kinds for r in records(kind, step))
  traces.write(folder, HEADER, stream)
  return str(folder)


PICTURES = {'load', 'co_activation', 'transitions'}


def test_a_report_has_tables_and_pictures(tmp_path, capsys, monkeypatch):
  monkeypatch.delenv('COLUMNS', raising=False)
  trace, output = write(tmp_path / 'trace'), tmp_path / 'report'
  routes.main([trace, f'--output={output}'])
  text = capsys.readouterr().out
  # The kind in which training drops comes first.
  assert f"{trace}: 'train' at 3 steps, 0 to 20. Other kinds" in text
  assert 'Note: A note & more.' in text
  assert {path.stem for path in output.glob('*.png')} == PICTURES
  cells = [line.split() for line in text.splitlines()]
  # Layers 1, 3 and 5 have 4, 6 and 5 experts; the trace has 3 steps.
  assert [row[1] for row in cells if row[:1] in (['1'], ['3'], ['5'])][:3] == [
    '4', '6', '5'
  ]  # fmt: skip
  # The encoder's layer is not followed by the decoder's.
  before = [row[2] for row in cells if row[:2] == ['expert', 'before']]
  assert before == ['5']
  assert 'Choices that changed' not in text and 'nan' not in text


def test_an_evaluation_has_churn(tmp_path, capsys, monkeypatch):
  monkeypatch.delenv('COLUMNS', raising=False)  # long paths are not wrapped
  trace, output = write(tmp_path / 'one'), tmp_path / 'report'
  routes.main([trace, f'--output={output}', '--kind=valid', '--steps=5:'])
  text = re.sub(r' +', ' ', capsys.readouterr().out)
  # Two choices of one of four experts at random differ in 3 of 4 cases.
  (share,) = re.findall(r'10 to 20 1 (\S+)', text)
  assert 0.55 < float(share) < 0.95
  assert '0 to 10' not in text


def test_nothing_but_padding(tmp_path, capsys):
  layers = {0: LayerInfo(3, 1), 1: LayerInfo(1, 1)}
  zeros = np.zeros((1, 4), np.int32)
  expert = np.full((1, 4, 1), -1, np.int32)
  empty = LayerChoices(expert, np.zeros(expert.shape, 'f4'), expert >= 0)
  record = Record('train', 0, 0, zeros, zeros, zeros, {0: empty, 1: empty})
  traces.write(tmp_path / 'trace', Header(layers, 1, 4, 7), [record])
  output = tmp_path / 'report'
  routes.main([str(tmp_path / 'trace'), f'--output={output}'])
  names = {path.stem for path in output.glob('*.png')}
  assert names == PICTURES - {'co_activation', 'transitions'}
  assert 'nan' not in capsys.readouterr().out


def test_a_text_has_the_colours_and_numbers_of_its_experts():
  tokenizer = tokenizers.Bytes()
  ids = np.zeros((2, 6), np.int32)
  ids[1, 1:] = tokenizer.encode('a<\u00e9\n')
  documents = (ids > 0).astype(np.int32)
  expert = np.array([[-1] * 6, [-1, 0, 9, 2, -1, 0]], np.int32)[..., None]
  choices = LayerChoices(expert, 0.5 * np.ones(expert.shape), expert >= 0)
  record = Record('valid', 0, 0, ids, ids, documents, {1: choices})
  html = routes.coloured_text(record, 1, tokenizer, 1)
  colours = re.findall(r'background:(#\w+)', html)
  one, two, three, *_ = routes.COLOURS
  assert colours == [one, two, three, '#FFFFFF', one]
  texts = re.findall(r'black">(.*?)</span>', html, re.DOTALL)
  # The first byte of a character has no text yet, and is not expert 2's alone.
  assert texts == [
    'a<sub>0</sub>', '&lt;<sub>9</sub>', '\u00b7<sub>2</sub>', '\u00e9',
    '\u21b5\n<sub>0</sub>',
  ]  # fmt: skip
  assert f'>{ids[1, 1]} <sub>0' in routes.coloured_text(record, 1, row=1)


@pytest.mark.parametrize(
  ('flags', 'messages'),
  [
    (['--steps=7:7'], ("'7:7'", 'LAST')),
    (['--kind=test'], ("unknown kind 'test'", "'valid'")),
    (['--steps=100:'], ('no records', 'of this kind and steps')),
  ],
)
def test_what_would_report_on_nothing_is_refused(
  flags, messages, tmp_path, capsys
):
  argv = [write(tmp_path / 'trace'), f'--output={tmp_path / "report"}', *flags]
  check_command(routes.main, argv, messages, capsys)
  assert not (tmp_path / 'report').exists()


def test_a_table_is_whole_in_a_pipe_and_in_markdown(capsys, monkeypatch):
  monkeypatch.delenv('COLUMNS', raising=False)
  row = {f'a heading that is long, {i}': 10**20 for i in range(9)}
  table = ValueTable('X', 'Note.', [row | {'|': '|', 'x': None}], {'x': '.1%'})
  routing_report.wide_console().print(table.terminal())
  lines = capsys.readouterr().out.splitlines()
  (headings,) = (line for line in lines if 'a heading' in line)
  assert all(heading in headings for heading in row)
  # A bar ends no cell, and a missing value is a dash.
  assert table.markdown().splitlines()[-1].endswith(r' | \| | - |')
