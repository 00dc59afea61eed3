"""The page of a run, as the hook writes it."""

import contextlib
import html.parser
import shlex

import jax
import pytest

from moe_jax import generate, run_config
from moe_jax.analysis import record_evaluation, routes, run_page
from moe_jax.analysis.run_page import Page
from moe_jax.cli import config_of
from moe_jax.compression import __main__ as compression
from moe_jax.interop import __main__ as interop
from moe_jax.runs import metrics, workdir
from moe_jax.training import setup
from tests.training import tiny

HOSTILE = '</pre><script>alert(1)</script><img src=x onerror="x">&amp;'
ROW = {
  'train/loss': 2.5,
  'train/drop_rate': 0.125,
  'train/tokens_per_second': 1234.0,
  'train/layer_1/load': [0.5, 0.25, 0.25, 0.0],
  'eval/main/loss': 2.25,
}


class Reader(html.parser.HTMLParser):
  """Notes tags and what they refer to; text is joined."""

  def __init__(self, page):
    super().__init__()
    self.tags, self.links, self.text = [], [], ''
    self.feed(page)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    assert not any(name.startswith('on') for name, _ in attrs)
    self.links += [value for name, value in attrs if name in ('src', 'href')]

  def handle_data(self, data):
    self.text += data


def run_in(folder, **overrides):
  """A run that is set up, with a folder."""
  options = tiny.options(**overrides)
  run = setup.set_up(options, folder, devices=jax.devices()[:1])
  workdir.claim(folder, run.config)
  return run


@pytest.fixture
def run(tmp_path):
  return run_in(tmp_path)


def finished(run):
  """The page of a run that has come to its end."""
  page = Page()
  page.start(run)
  page.paused()
  page.end(run, None)
  page.close()  # as a run does
  return Reader((run.workdir / 'index.html').read_text())


def write_row(run, row):
  with metrics.MetricsWriter(run.workdir, resume_step=None) as writer:
    writer.write(2, row)


def test_a_page_has_everything_and_needs_nothing(run, capsys):
  write_row(run, ROW)
  (run.workdir / 'sample.txt').write_text('once upon')
  page = finished(run)
  leaves = jax.tree.leaves(run.programs.abstract_state.params)
  parameters = sum(leaf.size for leaf in leaves)
  for text in (
    'Finished: step 2 of 6.',
    *(f'{parameters:,}', '2.5000', '12.5%', '1,234 tokens/s', 'once upon'),
  ):
    assert text in page.text, text
  assert page.tags.count('img') == 2  # curves and loads
  assert all(link.startswith('data:image/png') for link in page.links)
  for name in ('curves.png', 'load.png'):
    assert (run.workdir / name).read_bytes().startswith(b'\x89PNG')
  page_path = run.workdir / 'index.html'
  assert capsys.readouterr().out.endswith(f'page: {page_path}\n')


def test_hostile_text_stays_text(tmp_path):
  run = run_in(tmp_path / '<b>run<b>', sample={'prompt': HOSTILE})
  write_row(run, ROW | {f'eval/{HOSTILE.replace("/", "")}/loss': 2.0})
  (run.workdir / 'sample.txt').write_text(HOSTILE)
  page = finished(run)
  assert not {'script', 'b'} & set(page.tags)
  assert page.text.count(HOSTILE) >= 2
  assert page.tags.count('img') == 2


def test_every_command_is_read_by_its_program(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  name = "it's <b>"
  run = run_in(
    tmp_path / name,
    sample={'prompt': "it's $HOME"},
    init_from={'workdir': 'old', 'step': 7},
  )
  finished(run)
  commands = run_page.commands(run, run_page.name_of(run.workdir))
  text = '\n'.join(commands.values())
  lines = [shlex.split(line) for line in text.splitlines()]
  assert all(words[:2] == ['python', '-m'] for words in lines)
  for _, _, module, config, *flags in lines:
    if module == 'moe_jax.main':
      overrides = [w for w in flags if w.startswith('--config.')]
      config = config_of(config.removeprefix('--config='), overrides)
      init_from = run_config.read(config).init_from
      fine_tuned = any('_finetuned' in flag for flag in flags)
      expected = (name, -1) if fine_tuned else ('old', 7)
      assert (init_from.workdir, init_from.step) == expected
  words = {module: words for _, _, module, *words in lines}
  assert generate.parse(words['moe_jax.generate']).prompt == "it's $HOME"
  recorded = words['moe_jax.analysis.record_evaluation']
  assert record_evaluation.parse(recorded).workdir == name
  options = routes.parse(words['moe_jax.analysis.routes'])
  assert options.trace == f'{name}/choices'
  options, *_ = interop.parse(words['moe_jax.interop'])
  assert options.workdir == name
  options, *_ = compression.parse(words['moe_jax.compression'])
  assert options.format == 'int4'
  assert len(words) == 6


@pytest.mark.parametrize(
  ('error', 'words'),
  [
    (KeyboardInterrupt(), ('Stopped: step 0 of 6.', 'interrupted')),
    # The page names the folder, not where it is.
    (ValueError('loss=nan in {}'), ('Failed: step 0 of 6.', 'loss=nan in {}')),
  ],
)
def test_a_run_that_does_not_end_says_so(error, words, run):
  error.args = tuple(arg.format(run.workdir) for arg in error.args)
  page = Page()
  with contextlib.suppress(BaseException), contextlib.ExitStack() as stack:
    stack.callback(page.close)
    page.start(run)
    raise error
  text = Reader((run.workdir / 'index.html').read_text()).text
  assert all(word.format(run.workdir.name) in text for word in words)


def test_a_page_that_cannot_be_written_ends_nothing(run, capsys):
  (run.workdir / 'index.html').mkdir()
  page = Page()
  page.start(run)
  page.end(run, None)
  page.close()
  *_, line = capsys.readouterr().out.splitlines()
  assert line.startswith('index.html was not written: IsADirectoryError')
