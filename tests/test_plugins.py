"""A user's own classes in every choice of a config, and their import."""

import json
import re
import sys

import jax
import pytest

from moe_jax import run_config
from moe_jax.config import OptionError, section_of
from moe_jax.configs import base
from moe_jax.errors import InputError
from moe_jax.runs import metrics, workdir
from moe_jax.runs.workdir import classes_in
from moe_jax.training import loop, setup, trained
from tests import own_kinds
from tests.data import own_kinds as data_kinds
from tests.training import tiny

NAME, DATA = 'tests.own_kinds', 'tests.data.own_kinds'
ROUTER = 'my_router'  # a module with a router
CODE = (
  'import dataclasses\n'
  'from tests.own_kinds import {parent}\n'
  '@dataclasses.dataclass(frozen=True)\n'
  'class Mine({parent}):\n  pass\n'
)
ONE = jax.devices()[:1]


def kind(name, module=NAME, **custom):
  return {'kind': f'{module}:{name}', 'custom': custom}


def config(router=kind('InTurn', first=3), **overrides):
  config = tiny.config(
    total_steps=2,
    model={
      'num_layers': 1,
      'moe': {
        'layers': 'all',
        'router': router,
        'expert': kind('Linear', std=0.2),
      },
    },
    data={
      'source': kind('Counting', count=100),
      'tokenizer': kind('WordsOptions', DATA),
      'task': kind('Backwards', DATA, twice=True),
    },
    sample={'num_tokens': 0},
    optimizer={
      'kind': f'{NAME}:SignSgd',
      'schedule': kind('Steps', every=1),
      'learning_rate': 0.1,
    },
    **overrides,
  )
  config.evals = {'mine': base.entry(own_kinds.Norm, every_steps=1, power=3)}
  config.checkpoint.keep_best = False
  return config


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A run of a user's kinds, whose router is in a file of its own."""
  folder, code = tmp_path_factory.mktemp('run'), tmp_path_factory.mktemp('code')
  (code / f'{ROUTER}.py').write_text(CODE.format(parent='InTurn'))
  router = {'kind': f'{ROUTER}:Mine', 'custom': {'first': 1, 'step': 0}}
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(code)
    options = run_config.read(config(router))
    loop.train_and_evaluate(options, folder, devices=ONE)
    yield folder
  del sys.modules[ROUTER]


def test_a_config_names_a_users_class_wherever_it_names_ours():
  options = run_config.read(config())
  assert options.model.moe.router == own_kinds.InTurn(first=3)
  assert options.model.moe.expert == own_kinds.Linear(std=0.2)
  assert options.data.source == own_kinds.Counting(count=100)
  assert options.data.tokenizer == data_kinds.WordsOptions()
  assert options.data.task == data_kinds.Backwards(twice=True)
  assert options.optimizer.schedule == own_kinds.Steps(1, every=1)
  assert isinstance(options.optimizer, own_kinds.SignSgd)
  assert options.evals['mine'] == own_kinds.Norm(1, power=3)
  # The config names them again, with their options.
  assert run_config.read(section_of(options)) == options


def test_they_train(run):
  rows = metrics.read_metrics(run / metrics.FILE_NAME)
  assert [r['eval/mine/norm'] for r in rows if 'eval/mine/norm' in r]
  (row,) = [r for r in rows if 'train/learning_rate' in r]
  assert row['train/learning_rate'] == pytest.approx(0.1)
  assert row['train/layer_0/load'] == [0, 1, 0, 0]


def test_a_loss_of_a_users_router_is_weighted_logged_and_scheduled(tmp_path):
  # A dense layer, which has no such loss, stands before the sparse one.
  user_config = config(
    kind('Deep'), aux_losses={'kind': 'linear', 'line_steps': 1}
  )
  user_config.model.num_layers = 2
  user_config.model.moe.layers = 'last 1'
  user_config.log_every_steps = 1
  options = run_config.read(user_config)
  state = loop.train_and_evaluate(options, tmp_path, devices=ONE)
  rows = metrics.read_metrics(tmp_path / metrics.FILE_NAME)
  first, second = (row for row in rows if 'train/loss' in row)
  # Each step that has the loss moves the depth by the rate, 0.1.
  assert first['train/layer_1/depth_loss'] == pytest.approx(3.0)
  assert second['train/layer_1/depth_loss'] == pytest.approx(2.9)
  parts = [
    row['train/total_loss'] - row['train/loss'] for row in (first, second)
  ]
  assert parts == pytest.approx([0.25 * 3.0, 0.0], abs=1e-5)
  (depth,) = (
    leaf
    for path, leaf in jax.tree.leaves_with_path(state.params)
    if 'depth' in jax.tree_util.keystr(path)
  )
  assert float(depth.sum()) == pytest.approx(2.9)


def test_a_weight_without_its_loss_is_refused_by_name(tmp_path):
  options = run_config.read(config(kind('Promised')))
  with pytest.raises(InputError, match=r"losses \[\]; .*\['depth_loss'\]"):
    setup.set_up(options, tmp_path, devices=ONE)


def test_their_file_is_recorded(run):
  digests = json.loads((run / workdir.PLUGINS).read_text())
  user_kinds = set(classes_in(config()))
  user_kinds ^= {f'{NAME}:InTurn', f'{ROUTER}:Mine'}
  assert digests.keys() == user_kinds
  assert len(digests) == 8


@pytest.mark.slow
def test_a_change_of_their_file_is_reported(tmp_path, monkeypatch):
  (tmp_path / 'changing.py').write_text(CODE.format(parent='Norm'))
  monkeypatch.syspath_prepend(tmp_path)
  user_config = tiny.config(total_steps=2)
  user_config.evals.mine = {'kind': 'changing:Mine', 'every_steps': 1}
  options = run_config.read(user_config)
  loop.train_and_evaluate(options, tmp_path / 'run', devices=ONE)
  assert not setup.set_up(options, tmp_path / 'run', devices=ONE).notes
  with (tmp_path / 'changing.py').open('a') as file:
    file.write('# changed\n')
  (note,) = setup.set_up(options, tmp_path / 'run', devices=ONE).notes
  assert note.startswith("WARNING: the file of 'changing:Mine' has changed")


def test_a_name_in_a_folder_is_imported_only_by_leave(run):
  for allow, missing in (([], ROUTER), ([ROUTER], r'tests\.data\.own_kinds')):
    with pytest.raises(ValueError, match=f'--allow_module={missing}'):
      trained.read(run, allow)
  for allow in ([NAME, DATA, ROUTER], ['tests', ROUTER]):
    loaded_run = trained.read(run, allow)
    assert loaded_run.model.moe.router.first == 1
    assert isinstance(loaded_run.tokenizer, data_kinds.Words)


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    (f'{NAME}:None_', f"{NAME} has no 'None_'"),
    (f'{NAME}:Norm', r'does not extend moe_jax\..*RouterOptions'),
    (f'{NAME}:Unfinished', 'does not define module, which'),
    (f'{NAME}:Undecorated', 'is no dataclass'),
  ],
)
def test_a_class_is_checked_before_it_is_called(name, message):
  router = {'kind': name, 'custom': {}}
  with pytest.raises(
    OptionError, match=rf'model\.moe\.router\.kind.*{message}'
  ):
    tiny.options(model={'moe': {'router': router}})


def test_a_module_that_raises_is_named_with_its_line(tmp_path, monkeypatch):
  (tmp_path / 'raises_own.py').write_text('import math\nX = math.sqrt(-1)\n')
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(OptionError) as error:
    router = {'kind': 'raises_own:X', 'custom': {}}
    tiny.options(model={'moe': {'router': router}})
  (problem,) = error.value.problems
  path = re.escape(str(tmp_path / 'raises_own.py'))
  assert re.search(
    rf"'raises_own:X' cannot be imported: {path}, line 2: "
    r'X = math.sqrt\(-1\): ValueError: ',
    problem,
  )


def test_a_config_of_a_users_kinds_shrinks():
  small = run_config.read(base.finish(config(), 'runlocal'))
  assert small.total_steps == 2
  assert small.evals['mine'] == own_kinds.Norm(2, power=3)
  assert small.model.moe.router == own_kinds.InTurn(first=3)
