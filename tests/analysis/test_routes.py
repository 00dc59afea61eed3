"""The command that analyses traces, and the page that it writes."""

import csv
import dataclasses
import re

import numpy as np
import pytest

from moe_jax.analysis import (
  route_comparisons,
  route_findings,
  route_page,
  route_sections,
  route_sums,
  route_tables,
  routes,
  text_tables,
  traces,
)
from moe_jax.analysis.route_page import PAGE, TEXT, Part
from moe_jax.analysis.route_sections import Section
from moe_jax.analysis.text_tables import ValueTable
from moe_jax.analysis.traces import (
  Header,
  LayerChoices,
  LayerInfo,
  Record,
)
from tests.bad_inputs.cases import check_command

B, T, V = 2, 24, 13
LAYERS = {
  1: LayerInfo(4, 2, sequence='encoder'),
  3: LayerInfo(6, 2),
  5: LayerInfo(5, 1, by_expert=True),
}
HEADER = Header(
  LAYERS, B, T, V, seed=3, sources=('a<b', 'c'), note='A note & more.'
)


def records(kind, step, seed=0, batches=2):
  """Random choices; the tokens of an evaluation are the same at all steps."""
  for batch in range(batches):
    data_rng = np.random.default_rng((seed, batch, step * (kind == 'train')))
    rng = np.random.default_rng((seed, batch, step))
    documents = np.ones((B, T), np.int32)
    documents[:, 20:] = 0
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    sources = np.tile(data_rng.integers(0, 2, (B, 1), np.int32), T)
    for sequence in ('encoder', ''):
      layers = {}
      for number, info in LAYERS.items():
        if info.sequence != sequence:
          continue
        expert = np.argsort(rng.random((B, T, info.num_experts)), -1)[..., :2]
        expert = np.where(documents[..., None] > 0, expert, -1)
        if info.by_expert:
          expert = np.where(rng.random(expert.shape) < 0.3, -1, expert)
        kept = expert >= 0
        if not info.by_expert:
          kept &= rng.random(expert.shape) < 0.8
        gate = np.where(kept, rng.random(expert.shape), 0).astype(np.float32)
        layers[number] = LayerChoices(expert.astype(np.int32), gate, kept)
      tokens = data_rng.integers(0, V, (B, T)).astype(np.int32)
      batch_fields = tokens, positions, documents, layers, sources, sequence
      yield Record(kind, step, batch, *batch_fields)


def write(folder, header=HEADER, seed=0, kinds=('train', 'valid')):
  steps = [0, 10, 20]
  stream = (r for step in steps for k in kinds for r in records(k, step, seed))
  traces.write(folder, header, stream)
  return str(folder)


LABEL = '--label=language=a<b:one|two,c:three'


@pytest.fixture(scope='module')
def report(tmp_path_factory):
  """The folder of a report on a trace."""
  folder = tmp_path_factory.mktemp('routes')
  trace, output = write(folder / 'trace'), folder / 'report'
  routes.main([trace, f'--output={output}', LABEL])
  return output


def test_the_page_has_every_table_and_nothing_from_elsewhere(report):
  page = (report / PAGE).read_text(encoding='utf-8')
  tables = sorted(path.name for path in report.glob('*.csv'))
  assert len(tables) == 13
  assert page.count('<table>') == len(tables)
  for path in report.glob('*.csv'):
    with path.open(encoding='utf-8', newline='') as file:
      headings, *rows = csv.reader(file)
    assert rows, path.name
    assert all(f'>{heading}</th>' in page for heading in headings), path.name
  pictures = [*report.glob('*.png')]
  assert page.count('src="data:image/png;base64,') == len(pictures) == 11
  assert not re.search(r'https?:|<script|<link|@import|url\(', page)
  assert set(re.findall(r'(?:href|src)="(.)', page)) == {'#', 'd'}
  # Every place that is linked to exists.
  anchor_ids = set(re.findall(r'id="([^"]+)"', page))
  assert set(re.findall(r'href="#([^"]+)"', page)) <= anchor_ids
  assert 'A note &amp; more.' in page
  layers = re.findall(r'<summary>Layer (\d)</summary>\s*<pre', page)
  assert layers == ['1', '3', '5']
  assert 'Tokens are shown by their ids' in page
  assert 'None' not in page
  assert 'nan' not in re.sub(r'base64,[^"]*', '', page)


def test_the_markdown_has_the_sentences(report):
  text = (report / TEXT).read_text(encoding='utf-8')
  assert '6 records' not in text
  assert "12 records of 'train' at 3 steps from 0 to 20 hold 480 tokens" in text
  assert re.search(r'^\| language \| +3 \|', text, re.MULTILINE)
  assert 'has other records, too; --kind takes one of valid.' in text
  assert 'It is in routes.html.' in text and '<span' not in text
  for line in text.splitlines():
    if line.startswith('!['):
      name = re.search(r'\((.*)\)', line)[1]
      assert (report / name).exists()


def test_values_of_the_tables(report):
  def rows(name):
    with (report / name).open(encoding='utf-8', newline='') as file:
      return [*csv.DictReader(file)]

  (experts, load) = rows('experts.csv'), rows('load.csv')
  assert len(experts) == sum(info.num_experts for info in LAYERS.values())
  assert sum(int(r['choices']) for r in experts if r['layer'] == '3') == 480
  assert [row['layer'] for row in load] == ['1', '3', '5']
  # The encoder's layer is not followed by the decoder's.
  chains = [(r['from layer'], r['to layer']) for r in rows('transitions.csv')]
  assert chains == [('3', '5')]
  churn = rows('churn_valid.csv')
  pairs = [(row['step'], row['against step']) for row in churn]
  assert pairs == [('10', '0')] * 3 + [('20', '10')] * 3
  # Two choices of one of four experts at random differ in 3 of 4 cases.
  share = np.mean(
    [float(r['first choice changed']) for r in churn if r['layer'] == '1']
  )
  assert 0.6 < share < 0.9


@pytest.mark.slow
def test_two_traces(tmp_path, capsys):
  folders = [write(tmp_path / name) for name in ('one', 'other')]
  output = tmp_path / 'report'
  routes.main([*folders, f'--output={output}', '--kind=valid'])
  text = (output / TEXT).read_text(encoding='utf-8')
  assert '0.0 % of tokens have another first choice' in text
  assert (output / 'comparison_2.csv').exists()
  load, other_load = ((output / f'{i}_load.csv').read_bytes() for i in (1, 2))
  assert load == other_load
  assert (output / PAGE).read_text().count('<table>') == 2 * 13 + 1


def test_a_change_between_traces_that_differ(tmp_path):
  trace = traces.read(write(tmp_path / 'one'))
  other_trace = traces.read(write(tmp_path / 'other', seed=1))
  with pytest.raises(ValueError, match='hold different tokens'):
    route_comparisons.compare(trace, other_trace, 'valid')
  part = route_comparisons.comparison_part([trace, other_trace], 'ab', 'valid')
  assert part.sections == []
  assert part.facts[0].startswith('a and b are not compared: batch 0')


def test_a_trace_without_sparse_layers(tmp_path):
  traces.write(tmp_path / 'trace', Header({}), [])
  trace = traces.read(tmp_path / 'trace')
  with pytest.raises(ValueError, match='without sparse layers'):
    routes.part_of(trace, 'it')


def test_nothing_but_padding():
  """Sums, sections and pictures of a trace in which no token is real."""
  layers = {0: LayerInfo(3, 1), 1: LayerInfo(1, 1)}
  zeros = np.zeros((1, 4), np.int32)
  empty = LayerChoices(
    np.full((1, 4, 1), -1, np.int32),
    np.zeros((1, 4, 1), np.float32),
    np.zeros((1, 4, 1), bool),
  )
  record = Record('train', 0, 0, zeros, zeros, zeros, {0: empty, 1: empty})

  class Empty(traces.Trace):
    def __init__(self):
      pass

    header = Header(layers, 1, 4, 7)
    kinds, incomplete = ('train',), 2
    steps_of = staticmethod(lambda kind: (0,))
    records = staticmethod(lambda *args: iter([record]))

  part = routes.part_of(Empty(), 'padding')
  names = [section.name for section in part.sections]
  assert names == ['load', 'labels', 'drops', 'gates']
  assert any(
    fact.startswith('2 records of the trace are') for fact in part.facts
  )


def test_choices_that_were_not_sent_are_not_called_dropped(tmp_path):
  layers = {3: LayerInfo(6, 2, second_policy='sampled')}
  header = dataclasses.replace(HEADER, layers=layers)
  decoder_records = [r for r in records('train', 0) if not r.sequence]
  sums = route_sums.collect(
    header, [r._replace(layers={3: r.layers[3]}) for r in decoder_records]
  )
  table = route_tables.drop_table(sums)
  assert 'not served' in table.columns and 'dropped' not in table.columns
  assert 'a second policy did not send' in table.note


def test_nothing_is_drawn_where_nothing_is_dropped():
  served_records = [
    r._replace(layers={3: r.layers[3]._replace(kept=r.layers[3].expert >= 0)})
    for r in records('all_tokens', 0)
    if not r.sequence
  ]
  header = dataclasses.replace(HEADER, layers={3: LAYERS[3]})
  findings = route_findings.find(route_sums.collect(header, served_records))
  (drops,) = (s for s in route_sections.sections(findings) if s.name == 'drops')
  assert not drops.figures and not drops.tables
  assert drops.sentences[0].startswith('No choice is dropped')


def test_records_in_which_training_drops_come_first(tmp_path):
  kinds = 'all_tokens', 'train_capacity'
  trace = traces.read(write(tmp_path, kinds=kinds))
  part = routes.part_of(trace, 'it', steps=range(1))
  assert part.title == 'it, train_capacity'
  assert any('--kind takes one of all_tokens.' in fact for fact in part.facts)


def test_tables_are_whole_in_a_pipe(capsys, monkeypatch):
  monkeypatch.delenv('COLUMNS', raising=False)
  columns = {f'a heading that is long, {i}': 'd' for i in range(9)}
  table = ValueTable('x', 'X', '', columns, [[10**20] * 9])
  part = Part('', 'A part', ['A fact.' * 20], [])
  section = Section('s', 'S', ['A sentence. ' * 9], {}, [table])
  parts = [part._replace(sections=[section])]
  route_page.show(text_tables.wide_console(), parts)
  lines = capsys.readouterr().out.splitlines()
  (headings,) = (line for line in lines if 'a heading' in line)
  assert all(heading in headings for heading in columns)
  assert max(len(line) for line in lines[:6]) <= 80
  monkeypatch.setenv('COLUMNS', '70')
  text_tables.wide_console().print(table.terminal())
  assert max(map(len, capsys.readouterr().out.splitlines())) <= 70


def test_churn_is_of_the_steps_that_are_asked_for(tmp_path):
  trace = traces.read(write(tmp_path, kinds=('valid',)))
  (section,), _ = route_comparisons.churn_sections(trace, range(5, 99))
  assert [row[:2] for row in section.tables[0].rows] == [[20, 10]] * 3
  sections, (note,) = route_comparisons.churn_sections(trace, range(5))
  assert not sections and 'needs an evaluation' in note


BAD = {
  'no trace': ([], ('TRACE',)),
  'no output': (['x'], ('--output',)),
  'no such folder': (['no/such', '--output=y'], ('no/such has no trace',)),
  'steps in reverse': (['x', '--output=y', '--steps=7:7'], ("'7:7'", 'LAST')),
  'no steps': (['x', '--output=y', '--steps=7'], ("'7'", 'FIRST:LAST')),
  'a negative seed': (['x', '--output=y', '--seed=-1'], ('at least 0',)),
  'a bad label': (['x', '--output=y', '--label=a'], ('NAME=SOURCE:LABEL',)),
  'an unknown flag': (['x', '--output=y', '--outptu=z'], ('--outptu=z',)),
}


@pytest.mark.parametrize(('argv', 'messages'), BAD.values(), ids=BAD)
def test_bad_arguments(argv, messages, capsys):
  check_command(routes.main, argv, messages, capsys)


def test_arguments_that_do_not_fit_the_trace(tmp_path, capsys):
  trace = write(tmp_path / 'trace')
  usual_argv = [trace, f'--output={tmp_path / "report"}']
  for flag, messages in {
    '--kind=test': ("unknown kind 'test'", "'valid'"),
    '--steps=100:': ('no records', 'kind and steps'),
    '--label=language=c:x': ("'c'", "'a<b'"),
  }.items():
    check_command(routes.main, [*usual_argv, flag], messages, capsys)
  assert not (tmp_path / 'report').exists()


def test_a_table_wants_a_value_for_each_column():
  with pytest.raises(ValueError, match="table 'x': 1 values for the columns"):
    ValueTable('x', 'X', '', {'a': '', 'b': 'd'}, [['one']])
  table = ValueTable('x', 'X', 'Note.', {'a': '', 'b': '.1%'}, [['|', None]])
  assert table.markdown().splitlines()[-1] == r'| \| | - |'
  assert table.csv() == 'a,b\n|,\n'
