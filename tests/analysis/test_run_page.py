"""The page of a run, from folders as runs leave them."""

import contextlib
import html.parser
import json
import re
import runpy
import shlex

import jax
import pytest

from moe_jax import generate, run_config, sections
from moe_jax.analysis import (
  page_hook,
  record_evaluation,
  routes,
  run_commands,
  run_facts,
  run_page,
  run_sections,
)
from moe_jax.analysis.page_hook import Page
from moe_jax.analysis.run_facts import RunFacts
from moe_jax.compression import __main__ as compression
from moe_jax.config_file import load_config
from moe_jax.interop import __main__ as interop
from moe_jax.runs import metrics
from moe_jax.runs import workdir as workdir_lib
from moe_jax.training import setup
from tests.training import tiny

HOSTILE = '</pre><script>alert(1)</script><img src=x onerror="x">&amp;'
ROW = {
  'train/loss': 2.5,
  'train/drop_rate': 0.125,
  'train/tokens_per_second': 1234.0,
  'train/layer_1/load': [0.5, 0.25, 0.25, 0.0],
}
FACTS = RunFacts(
  model='decoder',
  experts='4 experts, 1 selected, in layer 1',
  parameters=1234567,
  active=234567,
  generates=True,
  is_sparse=True,
  has_blocks=True,
  versions={'jax': '0.10.2'},
  state=run_facts.FINISHED,
)


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


def folder_of(path, rows=(), facts=FACTS, **overrides):
  """A run's folder with these rows of metrics, each (step, values)."""
  config = tiny.config(**overrides)
  workdir_lib.claim(path, config)
  if rows:
    with metrics.MetricsWriter(path, resume_step=None) as writer:
      for step, values in rows:
        writer.write(step, values)
  if facts:
    facts.write(path)
  return path


def page_of(folder):
  run_page.write(folder)
  return Reader((folder / 'index.html').read_text(encoding='utf-8'))


def test_a_page_has_everything_and_needs_nothing(tmp_path):
  rows = [(2, ROW), (3, {'eval/train_capacity/loss': 2.75}), (6, ROW)]
  rows += [(6, {'eval/train_capacity/loss': 2.625})]
  folder = folder_of(tmp_path / 'run', rows, total_steps=6)
  (folder / 'sample.txt').write_text('def f(x):\n')
  (folder / 'routes').mkdir()
  (folder / 'routes' / 'routes.html').touch()
  page = page_of(folder)
  for words in (
    'Finished at step 6 of 6.',
    '1,234,567',
    '234,567',
    '2.5000 nats/token',
    '1,234 tokens/s',
    '12.5%',
    '2.6250 (6)',  # the last evaluation, which is the lowest, too
    '2.7500 (3)',
    'def f(x):',
    'model.moe.num_experts',
    'Number of optimizer steps',
    '0.10.2',
    'python -m moe_jax.main --config=run/this_config.py --workdir=run',
  ):
    assert words in page.text, f'{words!r} not in {page.text}'
  linked_files = [x for x in page.links if not x.startswith(('data:', '#'))]
  assert all((folder / name).exists() for name in linked_files), linked_files
  assert './routes/routes.html' in linked_files
  assert 'script' not in page.tags
  assert page.tags.count('img') == 4  # loss, drops, speed; load
  assert (folder / 'curves.png').exists()
  assert (folder / 'load.png').exists()


def test_hostile_text_stays_text(tmp_path):
  facts = RunFacts(
    model=HOSTILE,
    config_name=HOSTILE,
    devices=HOSTILE,
    versions={HOSTILE: HOSTILE},
    state=run_facts.FAILED,
    said=HOSTILE,
    generates=True,
  )
  folder = folder_of(
    tmp_path / '<b>run<b>',
    [(2, ROW | {f'eval/{HOSTILE.replace("/", "")}/loss': 2.0})],
    facts,
    sample={'prompt': HOSTILE},
  )
  (folder / 'sample.txt').write_text(HOSTILE)
  report = [{'layer': HOSTILE, 'warning': HOSTILE}]
  (folder / 'routing_report.json').write_text(json.dumps(report))
  page = page_of(folder)
  assert not {'script', 'b'} & set(page.tags)
  assert page.text.count(HOSTILE) >= 5
  charts = len(run_sections.curves(run_sections.read(folder)))
  assert page.tags.count('img') == charts + 1
  # The frame of a notebook holds it as one attribute.
  shown_page = run_page.page(folder)
  frame = Reader(shown_page._repr_html_())
  assert frame.tags == ['iframe']


@pytest.mark.parametrize(
  ('facts', 'rows', 'status'),
  [
    (FACTS, [(6, ROW)], 'Finished at step 6 of 6.'),
    (FACTS, [(4, ROW)], 'Ended early at step 4 of 6.'),
    (RunFacts(), [], 'Not trained here yet.'),
    (None, [(6, ROW)], 'Finished: step 6 of 6.'),
    (None, [(2, ROW)], 'Not finished: step 2 of 6.'),
    (
      RunFacts(state=run_facts.STOPPED),
      [(2, ROW)],
      'Stopped; logged until step 2 of 6.',
    ),
    (RunFacts(state=run_facts.RUNNING), [(2, ROW)], 'In training: step 2 of 6'),
  ],
)
def test_the_state_of_a_run(facts, rows, status, tmp_path):
  run = run_sections.read(folder_of(tmp_path, rows, facts))
  assert run_sections.state(run).startswith(status)


def test_a_run_that_failed_says_why(tmp_path):
  facts = RunFacts(state=run_facts.FAILED, said='step 4: loss=nan')
  folder = folder_of(tmp_path, [(2, ROW | {'train/loss': float('nan')})], facts)
  (folder / 'nonfinite').mkdir()
  (folder / 'nonfinite' / '4.npz').touch()
  page = page_of(folder)
  assert 'Failed; logged until step 2 of 6.' in page.text
  assert 'state of 1 step was not finite: 4.' in page.text
  assert 'step 4: loss=nan' in page.text
  assert 'Go on with this run' in page.text


def test_a_folder_with_nothing_but_a_config(tmp_path):
  page = page_of(folder_of(tmp_path, facts=None))
  assert 'Nothing has been logged yet.' in page.text
  assert 'img' not in page.tags
  assert not (tmp_path / 'curves.png').exists()


def test_folders_that_are_no_run_are_refused(tmp_path):
  with pytest.raises(ValueError, match='holds no run: it has no config'):
    run_page.write(tmp_path)
  (tmp_path / 'config.json').write_text('{')
  with pytest.raises(ValueError, match='damaged'):
    run_page.page(tmp_path)


def test_a_config_of_another_version_is_shown_as_it_is(tmp_path):
  folder = folder_of(tmp_path)
  config = json.loads((folder / 'config.json').read_text())
  config['model']['kind'] = 'somewhere.else:Model'
  (folder / 'config.json').write_text(json.dumps(config))
  page = page_of(folder)
  assert '--allow_module=somewhere.else' in page.text
  assert '"kind": "somewhere.else:Model"' in page.text


def test_damaged_facts_are_left_out(tmp_path):
  folder = folder_of(tmp_path, [(2, ROW)])
  (folder / 'run_facts.json').write_text('{"parameters": "many"}')
  assert run_facts.read(folder) == RunFacts()


def test_commands_are_those_that_fit(tmp_path, monkeypatch):
  def titles(facts, ended=True, config=None):
    commands = run_commands.commands(tmp_path, facts, config or {}, ended=ended)
    return {command.title.split(':')[0] for command in commands}

  all_titles = titles(FACTS, ended=False)
  assert all_titles == {
    'Go on with this run',
    'Train longer',
    'Train a variant',
    'Fine-tune',
    'Generate text',
    'See what the routers did',
    'Export for Hugging Face transformers',
    'Quantise to 4 bits',
    'Make this page anew',
  }
  classifier = titles(RunFacts(model='adaptive'))
  assert classifier == {
    'Train longer',
    'Train a variant',
    'Fine-tune',
    'Make this page anew',
  }
  lstm = titles(RunFacts(model='lstm_lm', generates=True, is_sparse=True))
  assert all_titles - lstm == {'Go on with this run', 'Quantise to 4 bits'}
  distilled = titles(FACTS, config={'distill': {'teacher': 'runs/large'}})
  assert 'Fine-tune' not in distilled
  (tmp_path / 'weights').mkdir()  # codes of few bits do not train
  assert 'Train longer' not in titles(FACTS)


def test_every_command_is_read_by_its_program(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  name = "it's <b>"
  sample = {'prompt': "it's $HOME", 'temperature': 0.5}
  folder = folder_of(tmp_path / name, sample=sample)
  run_commands.write_config(folder)
  config = workdir_lib.kept_config(folder)
  commands = run_commands.commands(folder, FACTS, config, ended=False)
  modules = set()
  for line in (line for command in commands for line in command.lines):
    python, option, module, *words = shlex.split(line.replace('\\\n', ' '))
    assert (python, option) == ('python', '-m')
    modules.add(module)
    match module:
      case 'moe_jax.main':
        check_flags(words, name)
      case 'moe_jax.generate':
        flags = generate.parse(words)
        assert (flags.prompt, flags.temperature) == ("it's $HOME", 0.5)
      case 'moe_jax.analysis.record_evaluation':
        assert record_evaluation.parse(words).workdir == name
      case 'moe_jax.analysis.routes':
        assert routes.parse(words).traces == [f'{name}/choices']
      case 'moe_jax.interop':
        assert interop.parse(words)[0].workdir == name
      case 'moe_jax.compression':
        assert compression.parse(words)[0].format == 'int4'
      case 'moe_jax.analysis.run_page':
        assert words == [name]
  assert len(modules) == 7


def test_a_run_is_begun_with_as_it_is_however_it_began(tmp_path):
  init_from = dict(workdir='old', step=7, experts='0,0', keep_tokenizer=False)
  commands = run_commands.commands(
    tmp_path / 'run', FACTS, {'init_from': init_from}, ended=True
  )
  (line,) = (c.lines[0] for c in commands if c.title.startswith('Fine-tune'))
  words = shlex.split(line.replace('\\\n', ' '))
  assert [word for word in words if word.startswith('--config.')] == [
    '--config.init_from.workdir=run',
    '--config.init_from.experts=',
    '--config.init_from.keep_tokenizer=True',
    '--config.init_from.step=-1',
  ]


def check_flags(words, name):
  """Checks that flags of `moe_jax.main` give a config that can be read."""
  assert words[0] == f'--config={name}/this_config.py'
  config = load_config(words[0].removeprefix('--config='))
  assert not sections.difference(
    workdir_lib.kept_config(workdir_lib.folder_of(name)), config
  )
  for word in words[1:]:
    key, _, value = word.removeprefix('--').partition('=')
    if key.startswith('config.'):
      *path, last = key.removeprefix('config.').split('.')
      section = config
      for part in path:
        section = section[part]
      section[last] = type(section[last])(value)
    else:
      assert key in ('workdir', 'resume')
  run_config.read(config)


def test_the_config_file_of_a_run_gives_its_config(tmp_path):
  folder = folder_of(tmp_path / 'run')
  run_commands.write_config(folder)
  config = runpy.run_path(str(folder / 'this_config.py'))['get_config']()
  assert not sections.difference(config, tiny.config())


def test_folders_are_named_without_the_rest_of_the_machine(
  tmp_path, monkeypatch
):
  folder = tmp_path / 'runs' / 'tiny'
  folder.mkdir(parents=True)
  assert run_commands.name_of(folder) == 'tiny'
  monkeypatch.chdir(tmp_path)
  assert run_commands.name_of(folder) == 'runs/tiny'


@pytest.fixture
def run(tmp_path):
  """A run that is set up, with a folder and a list of its messages."""
  run = setup.set_up(tiny.options(), tmp_path, devices=jax.devices()[:1])
  workdir_lib.claim(tmp_path, sections.section(run.given_options))
  run.messages = []
  run.message = run.messages.append
  return run


def finish(page, run):
  """Waits for the thread, and reads the page and the state."""
  page.end(run, None)
  page.close()  # as a run does
  facts = json.loads((run.workdir / 'run_facts.json').read_text())
  return (run.workdir / 'index.html').read_text(), facts


def test_a_run_keeps_its_page(run):
  page = Page()
  page.start(run)
  page.evaluated()
  page.saving()
  text, facts = finish(page, run)
  assert 'Nothing has been logged yet.' in text
  assert run.messages == [f'page: {run.workdir / "index.html"}']
  parameters = sum(
    leaf.size for leaf in jax.tree.leaves(run.programs.abstract_state.params)
  )
  assert facts['parameters'] == parameters > facts['active'] > 0
  assert facts['experts'] == '4 experts, 1 selected, in layer 1'
  assert facts['state'] == run_facts.FINISHED
  assert facts['versions']['jax'] == jax.__version__
  assert str(run.workdir.parent) not in re.sub(
    '<details>.*?</details>', '', text, flags=re.DOTALL
  )


def test_one_hook_serves_two_runs(run, monkeypatch):
  monkeypatch.setattr(page_hook, '_PAUSE', 0)
  page = Page()
  for _ in range(2):
    page.start(run)
    page.saving()
    _, facts = finish(page, run)
    assert facts['state'] == run_facts.FINISHED
  assert len(run.messages) == 2


@pytest.mark.parametrize(
  ('error', 'state', 'message'),
  [
    (None, run_facts.STOPPED, ''),
    (KeyboardInterrupt(), run_facts.STOPPED, 'interrupted'),
    (ValueError('loss=nan in {}'), run_facts.FAILED, 'loss=nan in {}'),
  ],
)
def test_a_run_that_does_not_end_says_so(error, state, message, run):
  if error and error.args:
    error.args = (error.args[0].format(run.workdir),)
    message = message.format(run.workdir.name)
  page = Page()
  with contextlib.suppress(BaseException), contextlib.ExitStack() as stack:
    stack.callback(page.close)
    page.start(run)
    if error:
      raise error
  facts = json.loads((run.workdir / 'run_facts.json').read_text())
  assert (facts['state'], facts['said']) == (state, message)


def test_a_page_that_cannot_be_written_ends_nothing(run):
  (run.workdir / 'index.html').mkdir()
  page = Page()
  page.start(run)
  page.end(run, None)
  page.close()
  (message,) = run.messages
  assert message.startswith('index.html was not written: IsADirectoryError')
