"""Studies: arms as described, finished runs kept, sound verdicts."""

import dataclasses
import fnmatch
import functools
import importlib
import itertools
import json
import math
import os
import pathlib
import shutil
import signal
import types

import jax
import numpy as np
import pytest
from scipy import stats

from experiments import (
  eval_capacity,
  fastermoe_tables,
  glam_capacity,
  kudugunta_table,
  megablocks_tables,
  report,
  shazeer_table6,
  specialisation,
  switch_scaling,
  switch_table1,
  switch_table6,
  switch_table7,
)
from experiments.benchmarks import roofline
from experiments.faster_moe import clusters, simulate
from experiments.launch import read_items
from experiments.study import (
  byte_models,
  command,
  domains,
  figures,
  jobs,
  runner,
  shared_steps,
  submit,
  verdicts,
)
from experiments.study import results as study_results
from experiments.study.jobs import in_order, layered
from experiments.study.parts import (
  Arm,
  Claim,
  Column,
  Preset,
  Row,
  Start,
  stated,
)
from experiments.study.tables import markdown_table
from experiments.study.times import Burst, StepTime
from moe_jax import cli, devices, run_config
from moe_jax.analysis import cost
from moe_jax.analysis.intervals import Interval
from moe_jax.config import difference, lock, merge, section_of
from moe_jax.devices import forget_programs, keep_freed_memory
from moe_jax.items import check
from moe_jax.run_config import RunConfig
from moe_jax.training import loop, setup
from tests import tiny_study
from tests.training import tiny

ROOT = pathlib.Path(__file__).parents[1]
# Studies without a byte-level model, which have tests of their own.
OTHER_MODELS = ('eigen_2013', 'jacobs_table1')
# Studies whose arms differ in FLOPs, by which they set the lengths of runs.
UNEQUAL = ('upcycling_figures',)
STUDIES = {
  path.stem: importlib.import_module(f'experiments.{path.stem}').STUDY
  for path in sorted((ROOT / 'experiments').glob('*.py'))
  if path.stem not in OTHER_MODELS and '\nSTUDY = Study(' in path.read_text()
}


def test_interval_is_students():
  values = [1.30, 1.34, 1.29, 1.33]
  interval = Interval.of(values)
  low, high = stats.t.interval(
    0.95, 3, loc=np.mean(values), scale=stats.sem(values)
  )
  np.testing.assert_allclose(interval.mean - interval.half_width, low)
  np.testing.assert_allclose(interval.mean + interval.half_width, high)
  assert f'{interval:.3f}' == '1.315 ± 0.038'


def test_one_seed_has_no_width():
  assert f'{Interval.of([0.5]):.2f}' == '0.50 ± unknown'
  assert Interval.of([0.5]).sign() == 0


def test_markdown_table():
  rows = [{'model': 'dense', 'loss': '1.3'}, {'model': 'sparse', 'loss': '1.2'}]
  assert markdown_table(rows).splitlines() == [
    '| model | loss |',
    '| --- | --- |',
    '| dense | 1.3 |',
    '| sparse | 1.2 |',
  ]


PUBLISHED = ['shazeer2017/table6/(0.1, 0.1)/test_ppl']


def loss_claim(row, than, direction, published=PUBLISHED) -> Claim:
  sign = '<' if direction == 'lower' else '>'
  return Claim(f'loss: {row} {sign} {than}', published)


@pytest.mark.parametrize(
  ('mine', 'direction', 'word'),
  [
    # Seeds differ by more than rows do, but rows always differ by the same
    # amount.
    ([1.18, 1.37, 1.265], 'lower', verdicts.REPRODUCED),
    ([1.18, 1.37, 1.265], 'higher', verdicts.OPPOSITE),
    ([1.22, 1.43, 1.325], 'higher', verdicts.REPRODUCED),
    ([1.18, 1.43, 1.29], 'lower', verdicts.UNRESOLVED),
  ],
)
def test_a_verdict_is_of_paired_differences(mine, direction, word):
  rows = [Row('a', {'loss': mine}), Row('b', {'loss': [1.2, 1.4, 1.3]})]
  verdict = verdicts.verdict(loss_claim('a', 'b', direction), rows)
  assert verdict.word == word
  differences = [a - b for a, b in zip(mine, [1.2, 1.4, 1.3], strict=True)]
  assert verdict.difference == Interval.of(differences)


def test_a_verdict_on_a_number():
  rows = [Row('a', {'loss': [0.57, 0.55, 0.56]})]
  verdict = verdicts.verdict(loss_claim('a', 0.6, 'lower'), rows)
  assert verdict.word == verdicts.REPRODUCED
  verdict = verdicts.verdict(loss_claim('a', 0.56, 'lower'), rows)
  assert verdict.word == verdicts.UNRESOLVED


def test_what_no_paper_printed_is_not_reproduced():
  rows = [Row('a', {'loss': [0.57, 0.55, 0.56]})]
  unverified = ['hash2021/reddit/Hash/ppl']
  for direction, word in (('lower', 'shown'), ('higher', 'refuted')):
    for published in ([], unverified, PUBLISHED + unverified):
      claim = loss_claim('a', 0.6, direction, published)
      assert verdicts.verdict(claim, rows).word == word


@pytest.mark.parametrize(
  ('mine', 'word'),
  [
    # All within 0.01, with its interval, above or below.
    ([1.21, 1.40, 1.31], verdicts.SHOWN),
    ([1.19, 1.40, 1.29], verdicts.SHOWN),
    ([1.24, 1.40, 1.34], verdicts.UNRESOLVED),
    # The mean is beyond the bound, and its interval is not.
    ([1.22, 1.50, 1.39], verdicts.UNRESOLVED),
    # The interval has the bound in it, but not zero.
    ([1.245, 1.455, 1.35], verdicts.UNRESOLVED),
    ([1.40, 1.61, 1.50], verdicts.REFUTED),
    ([1.00, 1.19, 1.10], verdicts.REFUTED),
  ],
)
def test_that_two_rows_do_not_differ_needs_a_bound(mine, word):
  rows = [Row('a', {'loss': mine}), Row('b', {'loss': [1.2, 1.4, 1.3]})]
  claim = Claim('loss: a = b within 0.05')
  assert verdicts.verdict(claim, rows).word == word


def test_starts_are_run_before_those_that_begin_with_them():
  starts = [
    Start('tuned', None, 'plain'), Start('plain', None), Start('idle', None),
    Start('taught', None, teacher='tuned'),
  ]  # fmt: skip
  arms = [
    Arm('a', {}),
    Arm('b', {}, start='tuned'),
    Arm('c', {}, start='plain'),
  ]
  names = [[s.name for s in level] for level in in_order(starts, arms)]
  assert names == [['plain'], ['tuned']]
  last = [Start('last', None, 'tuned'), *starts]
  arms = [arms[2], Arm('d', {}, start='last')]
  names = [[s.name for s in level] for level in in_order(last, arms)]
  assert names == [['plain'], ['tuned'], ['last']]
  arms = [Arm('e', {}, start='plain', teacher='tuned')]
  names = [[s.name for s in level] for level in in_order(starts, arms)]
  assert names == [['plain'], ['tuned']]
  taught = [Arm('f', {}, start='taught')]
  names = [[s.name for s in level] for level in in_order(starts, taught)]
  assert names == [['plain'], ['tuned'], ['taught']]
  assert in_order(starts, [Arm('a', {})]) == []
  with pytest.raises(ValueError, match=r"unknown start 'x'.*'plain'"):
    in_order(starts, [Arm('a', {}, start='x')])
  circle = [Start('a', None, 'b'), Start('b', None, 'a')]
  with pytest.raises(ValueError, match=r"each other: \['a', 'b', 'a'\]"):
    in_order(circle, [Arm('c', {}, start='a')])


def test_one_seed_resolves_nothing():
  rows = [Row('a', {'loss': [1.0]}), Row('b', {'loss': [2.0]})]
  verdict = verdicts.verdict(loss_claim('a', 'b', 'lower'), rows)
  assert (
    verdict.word == verdicts.WITHHELD and '1 of at least 3' in verdict.reason
  )
  assert math.isinf(verdict.difference.half_width)


def test_a_claim_names_what_exists():
  rows = [Row('dense', {'loss': [1.0, 2.0]})]
  with pytest.raises(ValueError, match=r"unknown row 'dens'.*'dense'"):
    verdicts.verdict(loss_claim('dens', 0.0, 'lower'), rows)
  for wrong in ('loss: a = b', 'a < b', 'loss a < b', 'loss: a <b'):
    with pytest.raises(ValueError, match=f'{wrong!r} is not .column: row < '):
      Claim(wrong)
  with pytest.raises(ValueError, match="'table66'"):
    Claim('loss: a < b', ['shazeer2017/table66/x/y'])


def test_a_column_is_a_mean_over_what_matches():
  result = {'eval/main/layer_0/cv': 1.0, 'eval/main/layer_1/cv': 2.0, 'cv': 9.0}
  assert Column('CV', 'eval/main/layer_*/cv').of(result) == 1.5
  assert math.isnan(Column('CV', 'eval/other/layer_*/cv').of(result))
  assert Column('CV', 'cv', each=lambda cv: cv + 1).of(result) == 10


def test_dotted_names_are_nested():
  flat = {'a.b': 1, 'a.c.d': 2}
  assert jobs.nested(flat) == {'a': {'b': 1, 'c': {'d': 2}}}
  with pytest.raises(ValueError, match=r'a\.b is within a'):
    jobs.nested({'a': 1, 'a.b': 2})
  with pytest.raises(ValueError, match='a has a value and keys'):
    jobs.nested({'a.b': 2, 'a': 1})


def jobs_of(shared, arms, output, seeds=range(2)):
  """The runs of these arms, which are trained."""
  return jobs.jobs_of(RunConfig, shared, arms, seeds, output)


def test_runs_are_kept_by_their_config():
  shared = tiny.config()
  arms = [Arm('a b/c', {}), Arm('d', {'model.width': 8})]
  all_jobs = jobs_of(shared, arms, pathlib.Path('out'))
  assert [(job.arm.name, job.seed) for job in all_jobs] == [
    ('a b/c', 0),
    ('d', 0),
    ('a b/c', 1),
    ('d', 1),
  ]
  assert len({job.workdir for job in all_jobs}) == 4
  assert all_jobs[0].workdir.parent == pathlib.Path('out/runs/a_b_c')
  assert all_jobs[1].config.model.width == 8 and all_jobs[3].config.seed == 1
  reordered = dict(reversed(list(shared.to_dict().items())))
  other = type(shared)(reordered).lock()
  assert jobs.config_hash(other) == jobs.config_hash(shared)
  with pytest.raises(ValueError, match="two arms are named 'd'"):
    jobs_of(shared, [arms[1], arms[1]], pathlib.Path('out'))


def test_an_arm_is_a_later_layer_and_may_choose_other_kinds():
  moe = {'router': {'token_choice': {'gates': 'sigmoid'}}}
  shared = tiny.config(model={'moe': moe})
  key = 'model.moe.router.token_choice.gates'
  arms = [
    Arm('dense', {'model.moe.num_experts': 0}),
    Arm('hash', {'model.moe.router.kind': 'hash'}),
    Arm('raw', {key: 'raw'}),
  ]
  dense, hashed, raw = (
    run_config.read(job.config).model.moe
    for job in jobs_of(shared, arms, pathlib.Path('out'), [0])
  )
  assert dense.num_experts == 0
  assert type(hashed.router).__name__ == 'Hash'
  assert raw.router.gates == 'raw'
  # An option of an arm that has no effect is refused by name.
  vain = Arm('vain', {'model.moe.router.kind': 'hash', key: 'raw'})
  vain = dataclasses.replace(vain, overrides={**vain.overrides, key: 'even'})
  with pytest.raises(ValueError, match=key):
    jobs_of(shared, [vain], pathlib.Path('out'))


def copied(source, new, note=''):
  """A change of a run that changes nothing."""
  del note
  shutil.copytree(source, new)
  return {'copies': 1.0}


@pytest.mark.slow
def test_a_run_is_made_of_a_trained_one_and_evaluated(tmp_path):
  noted = functools.partial(copied, note='other')
  study = dataclasses.replace(
    tiny_study.STUDY,
    starts=lambda preset: [
      Start('trained', lambda shared: shared),
      Start('copy', lambda shared: shared, 'trained', copied),
    ],
  )
  arms = [
    Arm('copied', {}, start='trained', change=copied),
    Arm('noted', {}, start='trained', change=noted),
    Arm('copied twice', {}, start='copy', change=copied),
    Arm('goes on', {'optimizer.learning_rate': 1e-9}, start='copy'),
  ]
  shared = study.shared(study.presets['quick'])
  *first, later = study.runs(
    study.presets['quick'], shared, arms, [0], tmp_path
  )
  for job in itertools.chain(*first, later):
    runner.train(job, None, jax.devices()[:1])
  results = {job.arm.name: job.result() for job in [*first[0], *later]}
  key = f'eval/{tiny_study.EVAL}/loss'
  losses = [result[key] for result in results.values()]
  np.testing.assert_allclose(losses, losses[0], rtol=1e-6)
  assert results['copied twice']['copies'] == 1.0
  assert len({result['data_digest'] for result in results.values()}) == 1
  # Only the start keeps parameters.
  assert not later[0].folder.exists() and first[1][0].folder.exists()


def test_a_change_is_part_of_a_runs_name_and_needs_a_start(tmp_path):
  names = set()
  study = tiny_study.STUDY
  shared = study.shared(study.presets['quick'])
  start_jobs = {('a', 0): jobs.Job(Arm('a', {}), 0, shared, tmp_path / 'a')}
  changes = [copied, *(functools.partial(copied, note=n) for n in ('b', 'c'))]
  for change in [None, *changes]:
    arm = Arm('same', {}, start='a', change=change)
    (job,) = jobs.jobs_of(RunConfig, shared, [arm], [0], tmp_path, start_jobs)
    names.add(job.workdir)
    assert job.begins_with == tmp_path / 'a'
  assert len(names) == 4
  with pytest.raises(ValueError, match="'b' changes a run, but names no start"):
    Arm('b', {}, change=copied)


@pytest.mark.slow
def test_a_study_is_written_and_reported(tmp_path, monkeypatch, capsys):
  claim = loss_claim('fast', 'slow', 'lower', ['hash2021/reddit/Hash/ppl'])
  claims = {**tiny_study.DENSE.claims, 'of a tiny study': claim}
  study = dataclasses.replace(tiny_study.DENSE, claims=claims)
  argv = ['--workers=1', '--seeds=1', f'--output={tmp_path}']
  folder = command.main(study, argv)
  assert folder == tmp_path / study.name / 'quick-seeds=1'
  text = (folder / study_results.TABLE).read_text()
  assert '± unknown' in text and '**withheld**: 1 of at least 3 seeds' in text
  assert (folder / study_results.PICTURE).stat().st_size > 5000
  config = json.loads((folder / 'configs' / '00.json').read_text())
  assert config['arm'] == 'slow'
  assert config['config']['model']['moe']['num_experts'] == 0

  def refuse(*args, **kwargs):
    raise AssertionError('a finished run was trained again')

  monkeypatch.setattr(runner, 'train_and_evaluate', refuse)
  command.main(study, argv)
  assert (folder / study_results.TABLE).read_text().splitlines()[3:] == (
    text.splitlines()[3:]
  )
  folder.rename(folder.with_name('full'))
  report.main([f'--results={tmp_path}', f'--output={tmp_path / "page"}'])
  page = (tmp_path / 'page' / report.PAGE).read_text()
  assert '| [dense_study](#a-question) | 0 | 0 | 0 | 0 | 0 | 2 |' in page
  assert '(results/dense_study.png)' in page
  assert 'unverified, not shown' in page and '23.16' not in page


def test_the_report_refuses_to_mix_data(tmp_path):
  for name, digest in (('a', 'one'), ('b', 'two')):
    summary = {'name': name, 'task': 'text', 'digests': [digest]}
    (tmp_path / f'{name}.json').write_text(json.dumps(summary))
  with pytest.raises(ValueError, match="'one': \\['a'\\], 'two': \\['b'\\]"):
    report.read(tmp_path)
  with pytest.raises(ValueError, match=r'no results of a study.*empty'):
    report.read(tmp_path / 'empty')


class Losses(setup.Hook):
  """Records the loss of every step, and the step that the run was given."""

  def start(self, run):
    self.losses, self.step = [], run.train_step
    step = run.train_step

    def recording_step(state, batch):
      state, metrics = step(state, batch)
      self.losses.append(float(metrics.loss))
      return state, metrics

    return dataclasses.replace(run, train_step=recording_step)


@pytest.mark.slow
def test_a_shared_step_is_the_runs_own(tmp_path):
  router = {'kind': 'noisy_top_k', 'noisy_top_k': {'importance_weight': 0.3}}
  moe = {'router': router, 'layers': 'all'}
  first = tiny.config(
    total_steps=3, max_nonfinite_steps=1, model={'num_layers': 1, 'moe': moe}
  )
  key = 'model.moe.router.noisy_top_k.z_weight'
  second = layered(RunConfig, first, {'seed': 1, key: 0.2})
  compiled = []
  for i, config in enumerate([first, second]):
    losses = {}
    for shared in ([], [shared_steps.SharedStep()]):
      hooks = [*shared, recorder := Losses()]
      loop.train_and_evaluate(
        run_config.read(config),
        tmp_path / f'{i}-{len(shared)}',
        hooks=hooks,
        devices=jax.devices()[:1],
      )
      losses[len(shared)] = recorder.losses
    compiled.append(recorder.step.func)
    assert len(losses[0]) == config.total_steps
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
  assert compiled[0] is compiled[1]


@pytest.mark.parametrize(
  ('flag', 'instead'),
  [('--config.total_steps=2', '--steps'), ('--config.seed=7', '--seeds')],
)
def test_keys_that_runs_do_not_share_are_refused(flag, instead, capsys):
  with pytest.raises(SystemExit):
    command.parse(tiny_study.DENSE, [flag])
  assert f'{flag}: runs do not share' in (error := capsys.readouterr().err)
  assert error.endswith(f'give {instead}\n')


@pytest.mark.slow
def test_a_stopped_run_is_no_result(tmp_path, monkeypatch):
  class Stop(setup.Hook):
    def start(self, run):
      step = run.train_step

      def step_and_signal(state, batch):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(state, batch)

      return dataclasses.replace(run, train_step=step_and_signal)

  shared = tiny_study.DENSE.shared(Preset(2, 1))
  (job,) = jobs_of(shared, [Arm('one', {})], tmp_path, [0])
  with monkeypatch.context() as patch:
    patch.setattr(runner, 'SharedStep', Stop)
    with pytest.raises(SystemExit, match=str(cli.STOPPED)):
      runner.train(job)
  assert not job.is_finished
  result = runner.train(job)
  assert result['eval/train_capacity/loss'] > 0
  assert not (job.workdir / 'checkpoints').exists()


def test_ratio_to_a_loss_is_told():
  # Half of the loss between lengths 0.25 and 1 is half of the way in
  # logarithms.
  lengths = (0.25, 1.0)
  np.testing.assert_allclose(
    switch_scaling.ratio_to(1.5, lengths, [2.0, 1.0]), 0.5
  )
  np.testing.assert_allclose(
    switch_scaling.ratio_to(1.5, (0.1, *lengths), [2.5, 2.0, 1.0]), 0.5
  )
  # Beyond the ends the nearest two lengths are used.
  np.testing.assert_allclose(
    switch_scaling.ratio_to(0.5, lengths, [2.0, 1.0]), 2.0
  )
  np.testing.assert_allclose(
    switch_scaling.ratio_to(2.5, lengths, [2.0, 1.0]), 0.125
  )
  # A loss that rises never reaches the target.
  assert math.isnan(switch_scaling.ratio_to(0.5, lengths, [1.0, 2.0]))


def simulated_keys():
  """The names of all numbers of a run with a trace."""
  for name in clusters.CLUSTERS:
    for source in (fastermoe_tables.TRACE, fastermoe_tables.SKEWED):
      for arm in simulate.ARMS:
        prefix = fastermoe_tables.prefix_of(name, source, arm)
        for column in fastermoe_tables.columns(prefix):
          yield column.key


AUX_LOSSES = ('importance_loss', 'z_loss')


def stand_in(config, number: float) -> dict[str, float]:
  """A result with every key that a run of this config has."""
  provenance = {
    'device': 'a machine',
    'cores': '2',
    'date': '2026-01-02',
    'jax': '1',
  }
  result = {'max_violation_batch': number, 'data_digest': 'x'}
  result['made'] = {**provenance, 'minutes': 1.5}
  result |= {f'leak/{k}': number for k in ('changed', 'at_once', 'generated')}
  measured_keys = (
    'agreement',
    'removed/loss',
    'unlearned',
    'experts',
    'none',
    'lost',
    'foreseen',
    'rise',
    'spikes',
    'stable',
  )
  counted_keys = ('cost/params', 'cost/flops', 'cost/memory', 'data/epochs')
  counted_keys += ('cost/activations', 'data/distinct')
  result |= dict.fromkeys(counted_keys, number)
  balance = ('cv_importance', 'cv_load')
  balance += ('max_over_mean', 'counted_max_over_mean')
  result |= dict.fromkeys(balance, number)
  result |= dict.fromkeys(measured_keys, number)
  result |= dict.fromkeys(('scores/chrf', 'scores/bleu'), number)
  sizes = ('disk', 'memory', 'flops', 'tokens_per_second', 'speed')
  small = ('bytes', 'unused', 'zeros', 'code bits', 'metadata bits')
  result |= dict.fromkeys((*sizes, *small), number)
  result |= dict.fromkeys(simulated_keys(), number)
  result |= {f'gate/{k}': number for k in ('leaving', 'kept_at_home')}
  for slots in glam_capacity.ROOM.values():
    result |= {f'steps/{slots}/{k}': number for k in ('loss', 'dropped')}
  result['whole/bytes'] = result['learning_rate'] = number
  step_keys = ('flops', 'expert_flops', 'optimizer_bytes')
  result |= {f'step/{k}': 1e9 for k in step_keys}
  for key in ('loss', 'bytes', 'speed'):
    result[f'extracted/{key}'] = number
  result['parameters'] = 1 + config.model.moe.num_experts
  layers = config.model.num_layers + config.model.encoder.num_layers
  for name in config.evals:
    result[f'eval/{name}/loss'] = number
    result[f'eval/{name}/drop_rate'] = result['train/drop_rate'] = number
    for mean in ('mean', 'held_out_cluster_mean'):
      result[f'eval/{name}/{mean}'] = number
    for source in config.data.mixture.sources:
      for key in ('', '.chance', '.nats'):
        result[f'eval/{name}/{source}{key}'] = number
    for i in range(layers):
      for key in ('load_cv', 'load_max_over_mean', *AUX_LOSSES):
        result[f'eval/{name}/layer_{i}/{key}'] = number
        result[f'train/layer_{i}/{key}'] = number
  return result


def measured_routing(study, number: float) -> dict[str, float]:
  """Numbers for a study's columns of routing, at all layers of a model."""
  layers = [f'{half}_{i}' for half in ('encoder', 'decoder') for i in (1, 2, 3)]
  layers += [
    f'at_{share}/{p}' for share in specialisation.EARLY for p in layers
  ]
  for i in range(5):
    suffixes = ('', '/all', *(f'/{domain}' for domain in domains.DOMAINS))
    layers += [f'layer_{i}{suffix}' for suffix in suffixes]
    layers += [f'layer_{i}/{way}' for way in megablocks_tables.WAYS]
  return {
    column.key.replace('*', layer): number
    for column in study.columns
    if column.key.startswith('routing/*')
    for layer in layers
  }


def step_time(arm: str, first: str) -> StepTime:
  """The step time of an arm in one burst."""
  seconds = {first: [0.5, 0.4], arm: [0.6, 0.6]}
  peaks = roofline.Peaks(2e11, 2e10, 'float32', 1024, 1 << 28)
  return StepTime.of(
    arm, first, [Burst(seconds, peaks, 0.0, '2026-02-01 10:00 UTC')]
  )


# A study with and one without runs that others begin with, and one of served
# models.
FAST = ('eval_capacity', 'switch_table6', 'serving_table')
each_study = pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
    for name in STUDIES
  ],
)


@each_study
def test_a_studys_claims_are_about_its_rows(name, tmp_path):
  study = STUDIES[name]
  assert set(study.presets) == {'quick', 'full'}
  for preset in study.presets.values():
    arms = study.arms_of(preset)
    shared, seeds = study.shared(preset), range(2)
    levels = study.runs(preset, shared, arms, seeds, tmp_path)
    results = {}
    for i, job in enumerate(itertools.chain(*levels)):
      number = 2.0 - 0.01 * i + 0.1 * job.seed
      result = stand_in(job.config, number) | measured_routing(study, number)
      results.setdefault(job.arm.name, []).append(result)
    for pattern in preset.without:
      assert fnmatch.filter([arm.name for arm in study.arms(preset)], pattern)
      assert not fnmatch.filter([arm.name for arm in arms], pattern)
    times = {
      arm: step_time(arm, group[0])
      for group in study.timed_groups(arms)
      for arm in group
      if arm in results or not preset.without
    }
    assert times.keys() <= results.keys()
    rows = study.make_rows(arms, results, times)
    summary = study_results.summary_of(
      study, preset, study.tasks[study.task], rows, results, times
    )
    assert len(summary['claims']) >= 4
    text = study_results.text_of(summary)
    assert 'nan' not in text and study.title in text
    # A column of a metric that no run has would be empty.
    for column in study.columns:
      shown = [row.values.get(column.name, []) for row in rows]
      numbers = np.array([number for values in shown for number in values])
      assert not column.key or np.isfinite(numbers).any(), column.name
  # The figures of the last preset are drawn.
  assert set(study.figure.columns) <= {c.name for c in study.columns}
  figures.draw(study.figure, summary, tmp_path / 'figure.png')
  if study.pictures is not None:
    study.pictures(results, tmp_path)


@pytest.mark.parametrize(
  ('taught', 'is_kept'),
  [
    ([1.8, 1.9, 1.7], True),
    ([1.99, 2.1, 1.8], False),  # the mean is above zero, its interval has it
    ([2.1, 2.3, 2.2], False),
  ],
)
def test_a_share_of_no_clear_gain_is_left_out(taught, is_kept):
  key = f'eval/{byte_models.EVAL}/loss'
  losses = {
    switch_table6.DENSE: [2.0, 2.1, 1.9],
    switch_table6.TEACHER: taught,
    switch_table6.PLAIN: [1.95, 2.05, 1.84],
  }
  results = {n: [{key: x} for x in by_seed] for n, by_seed in losses.items()}
  rows = switch_table6.rows(results)
  share = rows[-1].values[switch_table6.SHARE.name]
  assert np.isfinite(share).all() == is_kept
  claim = Claim(f'share kept: {switch_table6.PLAIN} > 0')
  word = verdicts.SHOWN if is_kept else verdicts.UNRESOLVED
  assert verdicts.verdict(claim, rows).word == word
  assert switch_table6.UNCLEAR in switch_table6.remarks(results)


def test_students_are_compared_with_as_many_steps_without_a_teacher():
  for study in (switch_table6.STUDY, switch_table7.STUDY):
    for preset in study.presets.values():
      arms = {arm.name: arm for arm in study.arms_of(preset)}
      long = arms[switch_table6.LONG].overrides
      assert long['total_steps'] == preset.start_steps + preset.steps
    claims = stated(study.claims).values()
    rows = [c.row for c in claims if c.than == switch_table6.LONG]
    assert rows and {arms[row].teacher for row in rows} != {''}


@each_study
def test_a_studys_arms_are_equal_in_flops(name):
  study = STUDIES[name]
  shared, models = study.shared(study.presets['quick']), {}
  for arm in study.arms_of(study.presets['quick']):
    before = dict.fromkeys(arm.runs_before, 'a run')
    config = layered(RunConfig, shared, {**arm.overrides, **before})
    options = run_config.read(config)
    models[arm.name] = model = options.filled(257).build()
    limited = ('gate, 0.', 'as shipped')
    # First choices are served before second ones.
    by_rank = ('GShard top-2', 'wide GShard', 'train ')
    leaks = arm.name.startswith(
      ('expert choice', 'strict', 'sentence / s', *limited, *by_rank)
    )
    assert model.stacks.leaks_future == leaks
  # Wide arms have equal slots instead; see the next test.
  models = {k: v for k, v in models.items() if not k.startswith('wide ')}
  # Arms that differ only in losses or steps have equal models.
  first = {model: name for name, model in reversed(models.items())}
  flops = {
    name: cost.count(model, shared.data.seq_len).training_flops
    for model, name in first.items()
  }
  # FLOPs are equal except for the router's, which are reported and not
  # compensated.
  unequal = name in UNEQUAL
  assert (max(flops.values()) < 1.2 * min(flops.values())) != unequal, flops


def test_switch_and_top_2_multiply_as_many_rows_at_equal_factors():
  study = switch_table1.STUDY
  preset = study.presets['full']
  moe = {}
  for arm in study.arms(preset):
    config = layered(RunConfig, study.shared(preset), arm.overrides)
    moe[arm.name] = run_config.read(config).model.moe
  for factor in switch_table1.FACTORS:
    products = {
      name: m.capacity.factor * m.num_selected * m.expert.hidden
      for name in ('Switch', switch_table1.WIDE, switch_table1.TOP2)
      for m in [moe[f'{name} {factor}']]
    }
    assert set(products.values()) == {factor * switch_table1.HIDDEN}
    priority = moe[f'{switch_table1.WIDE} {factor}'].router.slot_priority
    assert priority == 'choice_major'


@pytest.fixture(scope='session', name='results_folder')
def make_results_folder(tmp_path_factory):
  """A folder of results that all workers of pytest-xdist share."""
  folder = tmp_path_factory.getbasetemp()
  if os.environ.get('PYTEST_XDIST_WORKER'):
    folder = folder.parent
  return folder / 'results'


def bare(function):
  """The function that a partial one calls."""
  return getattr(function, 'func', function)


# Arms whose models other studies make, and whose measure other arms have.
ALIKE = ('pruned to a half', 'merged to a half', 'distilled, served')


@functools.cache
def new_arms():
  """Arms that are not made and measured as earlier ones, by study.

  Other arms differ from these in their configs alone, of which other tests
  build each model. The last arms of a study are those that have most.
  """
  recipes, arms_by_study = set(), {}
  for name, study in STUDIES.items():
    measure = bare(getattr(study.runner, 'measure', None))
    for arm in reversed(study.arms_of(study.presets['quick'])):
      begins = bool(arm.start), bool(arm.teacher)
      recipe = type(study.runner), measure, bare(arm.change), *begins
      if recipe not in recipes and arm.name not in ALIKE:
        recipes.add(recipe)
        arms_by_study.setdefault(name, []).append(arm.name)
  return arms_by_study


def brief(config):
  """A config of at most two layers and few small batches."""
  config = merge(config, {'batch_size': 4}).unlock()
  model = config.model
  model.num_layers = min(2, model.num_layers)
  if model.moe.layers == 'every 4':
    model.moe.layers = 'every 2'
  for entry in list(config.evals)[2:-1]:  # of the same kind as the others
    del config.evals[entry]
  limits = {'num_batches': 1, 'num_questions': 2, 'num_tokens': 4}
  for entry in config.evals.values():
    entry.update({key: limits[key] for key in limits if key in entry})
  return lock(RunConfig, config)


@pytest.mark.slow
@pytest.mark.parametrize('name', STUDIES)
def test_every_way_to_make_a_run_runs(name, results_folder, monkeypatch):
  if name not in new_arms():
    pytest.skip('its runs are made and measured as those of other studies')
  # Each is timed a few times on a few prompts.
  monkeypatch.setattr(kudugunta_table, 'SECONDS', 0.0)
  monkeypatch.setattr(kudugunta_table, 'PROMPTS', 4)
  monkeypatch.setattr(kudugunta_table, 'TOKENS', 2)
  study = STUDIES[name]
  quick = dataclasses.replace(
    study.presets['quick'], steps=4, seeds=1, overrides={}, start_steps=4
  )
  shared = brief(study.shared(quick))
  arms = [arm for arm in study.arms_of(quick) if arm.name in new_arms()[name]]
  # Studies share the runs that they begin with, as in one folder of results.
  *first, runs = study.runs(quick, shared, arms, [0], results_folder)
  for job in itertools.chain(*first):
    small = dataclasses.replace(job, config=brief(job.config))
    with submit.alone(results_folder / 'locks' / job.workdir.name):
      runner.train(small, None, jax.devices()[:1])
    assert (job.folder / 'checkpoints').exists()
  for job in runs:
    result = runner.train(job, study.runner.measure, jax.devices()[:1])
    losses = fnmatch.filter(result, 'eval/*/loss')  # of one source or of each
    losses += fnmatch.filter(result, 'eval/*/mean')
    assert losses and all(math.isfinite(result[key]) for key in losses)


@pytest.mark.slow
def test_a_launched_run_is_the_studys_own(monkeypatch, tmp_path):
  # The launched run has the study's folder and config, so that the study reads
  # its result.
  monkeypatch.chdir(ROOT)
  launch_items = read_items('experiments/shazeer_table6.py')
  check(launch_items)
  study = shazeer_table6.STUDY
  quick = study.presets['quick']
  shared, arms = study.shared(quick), study.arms_of(quick)
  seeds, results = range(quick.seeds), pathlib.Path('results')
  (runs,) = study.runs(quick, shared, arms, seeds, results)
  configs = {str(job.workdir): job.config for job in runs}
  assert {item.workdir for item in launch_items} == configs.keys()
  for item in launch_items[2:5]:
    options, _ = run_config.options_of(item.config, item.flags())
    assert not difference(section_of(options), configs[item.workdir])


def test_another_task_is_said_and_refused_where_it_does_not_fit():
  study = shazeer_table6.STUDY
  config = study.shared(study.presets['quick'], 'cipher')
  assert config.data.source.kind == 'experiments.study.cipher:CipherSource'
  with pytest.raises(ValueError, match=r"'cipher'.*\['kv_recall', 'text'\]"):
    eval_capacity.STUDY.shared(Preset(10, 2), 'cipher')


@pytest.mark.parametrize('accepts', [1, 0])
def test_the_allocator_is_tuned_where_it_can_be(accepts, monkeypatch):
  settings = {}

  def mallopt(name, value):
    settings[name] = value
    return accepts

  libc = types.SimpleNamespace(mallopt=mallopt)
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  monkeypatch.setattr('sys.platform', 'linux')
  monkeypatch.setattr('ctypes.CDLL', lambda name: libc)
  assert keep_freed_memory() is bool(accepts)
  # The numbers are those of glibc: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD,
  # M_ARENA_MAX.
  assert settings == {-3: 2**31 - 1, -1: 2**31 - 1, -8: 1}


@pytest.mark.parametrize(
  ('platforms', 'driver', 'tuned'),
  [
    ('cpu', 'nvidiactl', True),
    ('cuda,cpu', 'none', False),
    ('', 'vfio/0', False),
    ('', 'vfio/vfio', True),
  ],
)
def test_the_allocator_is_tuned_for_a_cpu_alone(
  platforms, driver, tuned, tmp_path, monkeypatch
):
  file = tmp_path / driver
  file.parent.mkdir(exist_ok=True)
  file.touch()
  settings = []
  libc = types.SimpleNamespace(
    mallopt=lambda *setting: settings.append(setting)
  )
  monkeypatch.setenv('JAX_PLATFORMS', platforms)
  with monkeypatch.context() as patch:
    patch.setattr('sys.platform', 'linux')
    patch.setattr('ctypes.CDLL', lambda name: libc)
    patch.setattr(devices.pathlib, 'Path', lambda name: tmp_path)
    keep_freed_memory()
  assert bool(settings) is tuned


@pytest.mark.skipif(
  not pathlib.Path('/proc/self/maps').exists(), reason='Linux tells regions'
)
def test_compiled_programs_are_forgotten_where_regions_are_many():
  traces = []

  @jax.jit
  def f(x):
    traces.append(None)
    return x + 1

  for most, expected in ((10**9, 1), (10**9, 1), (0, 1), (10**9, 2)):
    f(1.0)
    assert len(traces) == expected
    forget_programs(most)


def test_another_allocator_is_left_as_it_is(monkeypatch):
  monkeypatch.setattr('ctypes.CDLL', lambda name: types.SimpleNamespace())
  monkeypatch.setattr('sys.platform', 'linux')
  assert keep_freed_memory() is False  # the C library is not glibc
  monkeypatch.setattr('sys.platform', 'darwin')
  assert keep_freed_memory() is False
