"""The page of all studies: its numbers, its figures, and that it is sound."""

import base64
import hashlib
import html.parser
import json
import re
import shutil

import pytest
from matplotlib.figure import Figure as Canvas

from experiments import report
from experiments.study import figures, report_page
from experiments.study.parts import Figure
from moe_jax.analysis import inline_svg

STUDY = 'stmoe_freezing'
CLAIM = {
  **{'text': 'a is better', 'column': 'loss', 'row': 'a', 'than': 'b'},
  **{'direction': 'lower', 'published': ['1.5 (Table 2)'], 'note': ''},
  **{'difference': -0.5, 'half_width': 0.25, 'verdict': 'direction reproduced'},
}
SUMMARY = {
  **{'name': 'tiny', 'title': 'A question?', 'source': 'A, Table 2 (here)'},
  **{'task': 'bytes', 'steps': 4, 'seeds': [0, 1], 'overrides': {}},
  **{'digests': ['0123'], 'device': 'a CPU', 'date': '2026', 'jax': '1'},
  **{'minutes': 1.0, 'times': {}, 'remarks': 'Mind `x` < 3.'},
  'columns': [{'name': 'loss', 'unit': 'nats', 'digits': 2}],
  'rows': [
    {'name': 'a', 'line': '', 'x': None, 'values': {'loss': [1.0, 1.5]}},
    {'name': 'b', 'line': '', 'x': None, 'values': {'loss': [1.5, 2.0]}},
  ],
  'claims': [CLAIM],
}
VOID = {'meta', 'br', 'img', 'input', 'link', 'hr'}


class Page(html.parser.HTMLParser):
  """Checks that each tag is closed; notes ids, links, text and scripts."""

  def __init__(self, text):
    super().__init__()
    self.open, self.ids, self.links, self.labels = [], [], [], []
    self.text = self.script = ''
    self.feed(text)
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.ids += [value for name, value in attrs if name == 'id']
    links = ('href', 'xlink:href', 'src')
    self.links += [value for name, value in attrs if name in links]
    if tag == 'svg':
      self.labels.append(dict(attrs)['role'])
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    if tag not in VOID:
      self.open.pop()

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] == 'script':
      self.script += data
    elif 'style' not in self.open:
      self.text += data


def page_of(*summaries, spec=Figure(['loss'])):
  return report_page.html(summaries, 'About.', lambda name: spec)


@pytest.fixture
def stored_result(tmp_path):
  """A folder with one stored result, and a function that writes its page."""
  folder = tmp_path / report.KEPT
  folder.mkdir()
  source = report.HERE / report.KEPT / f'{STUDY}.json'
  shutil.copyfile(source, folder / source.name)

  def write_page():
    report.main([f'--results={tmp_path / "none"}', f'--output={tmp_path}'])
    return (tmp_path / report.HTML).read_text()

  return folder / source.name, write_page


def test_a_changed_result_changes_the_page(stored_result):
  path, write_page = stored_result
  before = write_page()
  summary = json.loads(path.read_text())
  row = summary['rows'][0]
  row['values']['loss'] = [value + 7 for value in row['values']['loss']]
  path.write_text(json.dumps(summary))
  after = write_page()
  cells = [
    re.findall(r'<td>(\d\.\d{4} ± \d\.\d{4})</td>', page)
    for page in (before, after)
  ]
  assert cells[0][1:] == cells[1][1:]
  assert float(cells[1][0][:6]) == float(cells[0][0][:6]) + 7
  drawings = [re.findall('<svg.*?</svg>', page) for page in (before, after)]
  assert len(drawings[0]) == 1 and drawings[0] != drawings[1]


def test_the_page_is_sound_and_needs_nothing():
  text = page_of(SUMMARY, SUMMARY | {'name': 'other', 'claims': []})
  page = Page(text)
  assert len(page.ids) == len(set(page.ids))
  assert page.labels == ['img', 'img']
  assert {f'#{name}' for name in ('tiny', 'other', 'tiny-claims')} <= set(
    page.links
  )
  assert set(page.links) <= {f'#{name}' for name in page.ids}
  digest = hashlib.sha256(page.script.encode()).digest()
  assert f"'sha256-{base64.b64encode(digest).decode()}'" in text
  assert '<code>x</code> &lt; 3' in text


def test_an_answer_says_what_holds_and_what_does_not():
  claims = [
    CLAIM,
    CLAIM | {'verdict': 'opposite', 'text': 'b is'},
    CLAIM | {'verdict': 'not resolved', 'text': 'c is', 'published': []},
  ]
  assert report_page.answer(SUMMARY | {'claims': claims}) == (
    '1 of 3 claims holds here (1 of 2 published, 0 of 1 of our own), such as '
    '“a is better” (loss: 0.50 ± 0.25 nats lower). The opposite is true of '
    '“b is”; not resolved is “c is”.'
  )
  page = Page(page_of(SUMMARY | {'claims': claims}))
  assert 'Verdicts: direction reproduced 1, opposite 1, not resolved 1.' in (
    ' '.join(page.text.split())
  )


def test_a_paper_is_named_once():
  for source, paper in [
    ('Switch Transformers, Table 1 (there)', 'Switch Transformers'),
    ('Shazeer et al. 2017, Table 6; rows are weights', 'Shazeer et al. 2017'),
    ('Eigen, Ranzato and Sutskever (claims)', 'Eigen, Ranzato and Sutskever'),
    ('Flan-MoE, directions only', 'Flan-MoE'),
  ]:
    assert report_page.paper_of(source) == paper


@pytest.mark.parametrize('x', [None, 2.0])
def test_figures_show_the_side_of_a_checked_paper_alone(x):
  spec = Figure(['loss'], 'x' * (x is not None))
  rows = [row | {'x': x, 'line': row['name']} for row in SUMMARY['rows']]
  for published, is_shown in {
    ('1.5 (Table 2)',): True,
    ('1.5 (Table 2)', '1.6 (Table 2, secondary source)'): False,
    ('unverified, not shown',): False,
    (): False,
  }.items():
    claim = CLAIM | {'published': list(published)}
    summary = SUMMARY | {'rows': rows, 'claims': [claim]}
    (axes,) = figures.canvas(spec, summary, summary['columns']).axes
    marks = [line for line in axes.lines if line.get_label() == figures.PAPER]
    assert len(marks) == is_shown
    for mark in marks:  # at b, of which the paper has a below
      along = mark.get_ydata() if x else mark.get_xdata()
      assert (list(along), mark.get_marker()) == ([1.75], 'v' if x else '<')
    assert (figures.PAPER in page_of(summary, spec=spec)) == is_shown


def test_a_figure_takes_the_colours_of_the_page():
  def svg_text():
    figure = Canvas()
    axes = figure.subplots()
    axes.plot([1, 2], [3, 4], color='#0072B2', marker='o', label='a < 0.125')
    axes.legend()
    return inline_svg.inline_svg(figure, 'mine', 'rises & falls')

  text = svg_text()
  assert text == svg_text()
  assert 'var(--series-0)' in text and not re.search('#[0-9a-f]{6}', text, re.I)
  assert '<title>rises &amp; falls</title>' in text and 'a &lt; 0.125' in text
  ids = re.findall(r'\bid="([^"]*)"', text)
  assert ids and all(name.startswith('mine-') for name in ids)
  references = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', text)
  assert references and {a or b for a, b in references} <= set(ids)
