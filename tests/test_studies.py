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
import types

import jax
import numpy as np
import pytest
from scipy import stats

from experiments import (
  eval_capacity,
  fastermoe_tables,
  fp8_products,
  glam_capacity,
  kudugunta_table,
  megablocks_tables,
  merge_or_prune,
  replayed_policy,
  report,
  shazeer_table6,
  specialisation,
  switch_scaling,
  switch_table1,
  switch_table6,
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
from experiments.study import claims as claims_lib
from experiments.study import results as study_results
from experiments.study.jobs import in_order, layered
from experiments.study.parts import Arm, Claim, Column, Preset, Row, Start
from experiments.study.times import Burst, StepTime
from moe_jax import devices, run_config
from moe_jax.analysis import cost
from moe_jax.config import difference, lock, merge, section_of
from moe_jax.devices import forget_programs, keep_freed_memory
from moe_jax.items import check
from moe_jax.run_config import RunConfig
from moe_jax.training import loop
from tests import tiny_study
from tests.training import tiny
from tests.training.hooks import StepMetrics

ROOT = pathlib.Path(__file__).parents[1]
# Studies without a byte-level model, which have tests of their own.
OTHER_MODELS = ('eigen_2013', 'jacobs_table1')
# Studies whose arms differ in FLOPs, by which they set the lengths of runs.
UNEQUAL = (
  'deepseek_table1',
  'expert_choice_table2',
  'gshard_table3',
  'upcycling_figures',
)
# Beginnings of the names of arms whose routers see later tokens; the last two
# serve first choices before second ones, as do sparse arms of some studies.
LEAKING = (
  *('expert choice', 'strict', 'sentence / s', 'gate, 0.', 'as shipped'),
  *('GShard top-2', 'wide GShard', 'train '),
)
FIRST_CHOICES_FIRST = (
  *('flan_moe', 'sparse_overfits', 'stmoe_batch_rate', 'stmoe_table5'),
)
STUDIES = {
  path.stem: importlib.import_module(f'experiments.{path.stem}').STUDY
  for path in sorted((ROOT / 'experiments').glob('*.py'))
  if path.stem not in OTHER_MODELS and '\nSTUDY = Study(' in path.read_text()
}


PAPER = ['shazeer2017/table6/(0.1, 0.1)/test_ppl']
UNVERIFIED = ['hash2021/reddit/Hash/ppl']


# Losses of three seeds, against 1.2, 1.4 and 1.3 of row b with the same seeds.
@pytest.mark.parametrize(
  ('statement', 'mine', 'published', 'word'),
  [
    # Seeds differ by more than rows do, but rows always differ by the same
    # amount.
    ('loss: a < b', [1.18, 1.37, 1.265], PAPER, 'reproduced'),
    ('loss: a > b', [1.18, 1.37, 1.265], PAPER, 'opposite'),
    ('loss: a > b', [1.22, 1.43, 1.325], PAPER, 'reproduced'),
    ('loss: a < b', [1.18, 1.43, 1.29], PAPER, 'unresolved'),
    ('loss: a < 0.6', [0.57, 0.55, 0.56], PAPER, 'reproduced'),
    ('loss: a < 0.56', [0.57, 0.55, 0.56], PAPER, 'unresolved'),
    # What no paper printed, or nobody checked, is not reproduced.
    ('loss: a < 0.6', [0.57, 0.55, 0.56], [], 'shown'),
    ('loss: a > 0.6', [0.57, 0.55, 0.56], PAPER + UNVERIFIED, 'refuted'),
    # All within 0.05, with the interval, above or below.
    ('loss: a = b within 0.05', [1.21, 1.40, 1.31], [], 'shown'),
    ('loss: a = b within 0.05', [1.19, 1.40, 1.29], [], 'shown'),
    # The mean is beyond the bound, and its interval is not.
    ('loss: a = b within 0.05', [1.22, 1.50, 1.39], [], 'unresolved'),
    # The interval has the bound in it, but not zero.
    ('loss: a = b within 0.05', [1.245, 1.455, 1.35], [], 'unresolved'),
    ('loss: a = b within 0.05', [1.40, 1.61, 1.50], [], 'refuted'),
    ('loss: a = b within 0.05', [1.00, 1.19, 1.10], [], 'refuted'),
    # One seed resolves nothing.
    ('loss: a < b', [1.0], PAPER, 'withheld'),
  ],
)
def test_a_verdict_is_of_paired_differences(statement, mine, published, word):
  base = [1.2, 1.4, 1.3][: len(mine)]
  rows = [Row('a', {'loss': mine}), Row('b', {'loss': base})]
  verdict = verdicts.verdict(Claim(statement, published), rows)
  assert verdict.word == getattr(verdicts, word.upper())
  if ' b' in statement:
    differences = [a - b for a, b in zip(mine, base, strict=True)]
    assert verdict.difference.mean == pytest.approx(np.mean(differences))
    # Student's interval, which is unknown of one number.
    width = math.inf
    if len(mine) > 1:
      width = stats.t.ppf(0.975, len(mine) - 1) * stats.sem(differences)
    np.testing.assert_allclose(verdict.difference.half_width, width)


def test_starts_are_run_before_those_that_begin_with_them():
  starts = [
    Start('last', None, 'tuned'), Start('tuned', None, 'plain'),
    Start('plain', None), Start('idle', None),
    Start('taught', None, teacher='tuned'),
  ]  # fmt: skip

  def levels(starts, **needs):
    arms = [Arm('a', {}), Arm('b', {}, **needs)]
    return [[s.name for s in level] for level in in_order(starts, arms)]

  assert levels(starts) == []
  assert levels(starts, start='last') == [['plain'], ['tuned'], ['last']]
  assert levels(starts, start='taught') == [['plain'], ['tuned'], ['taught']]
  taught = levels(starts, start='plain', teacher='tuned')
  assert taught == [['plain'], ['tuned']]
  circle = [Start('a', None, 'b'), Start('b', None, 'a')]
  with pytest.raises(ValueError, match=r"each other: \['a', 'b', 'a'\]"):
    levels(circle, start='a')


def test_a_claim_names_what_exists():
  rows = [Row('dense', {'loss': [1.0, 2.0]})]
  with pytest.raises(ValueError, match=r"unknown row 'dens'.*'dense'"):
    verdicts.verdict(Claim('loss: dens < 0.0'), rows)
  for wrong in ('loss: a = b', 'a < b', 'loss a < b', 'loss: a <b'):
    with pytest.raises(ValueError, match=wrong):
      Claim(wrong)


def test_a_column_is_a_mean_over_what_matches():
  result = {'eval/main/layer_0/cv': 1.0, 'eval/main/layer_1/cv': 2.0, 'cv': 9.0}
  column = Column('CV', 'eval/main/layer_*/cv', each=lambda cv: 2 * cv)
  assert column.of(result) == 3
  assert math.isnan(Column('CV', 'eval/other/layer_*/cv').of(result))


def jobs_of(shared, arms, output, seeds=range(2)):
  """The runs of these arms, which are trained."""
  return jobs.jobs_of(RunConfig, shared, arms, seeds, output)


def test_runs_are_kept_by_their_config():
  shared = tiny.config()
  arms = [Arm('a b/c', {}), Arm('d', {'model.width': 8})]
  all_jobs = jobs_of(shared, arms, pathlib.Path('out'))
  names = [(job.arm.name, job.seed) for job in all_jobs]
  assert names == [('a b/c', 0), ('d', 0), ('a b/c', 1), ('d', 1)]
  assert len({job.workdir for job in all_jobs}) == 4
  assert all_jobs[0].workdir.parent == pathlib.Path('out/runs/a_b_c')
  assert all_jobs[1].config.model.width == 8 and all_jobs[3].config.seed == 1
  reordered = dict(reversed(list(shared.to_dict().items())))
  other = type(shared)(reordered).lock()
  assert jobs.config_hash(other) == jobs.config_hash(shared)
  with pytest.raises(ValueError, match="two arms are named 'd'"):
    jobs_of(shared, [arms[1], arms[1]], pathlib.Path('out'))


def test_an_arm_is_a_later_layer_and_may_choose_other_kinds():
  key = 'model.moe.router.token_choice.gates'
  shared = layered(RunConfig, tiny.config(), {key: 'sigmoid'})
  arms = [
    Arm('hash', {'model.moe.router.kind': 'hash'}), Arm('raw', {key: 'raw'})
  ]  # fmt: skip
  hashed, raw = (
    run_config.read(job.config).model.moe.router
    for job in jobs_of(shared, arms, pathlib.Path('out'), [0])
  )
  assert type(hashed).__name__ == 'Hash' and raw.gates == 'raw'
  # An option of an arm that has no effect is refused by name.
  vain = Arm('vain', {'model.moe.router.kind': 'hash', key: 'even'})
  with pytest.raises(ValueError, match=key):
    jobs_of(shared, [vain], pathlib.Path('out'))


def copied(source, new, note=''):
  """A change of a run that changes nothing."""
  del note
  shutil.copytree(source, new)
  return {'copies': 1.0}


@pytest.mark.slow
def test_a_run_is_made_of_a_trained_one_and_evaluated(tmp_path):
  study = dataclasses.replace(
    tiny_study.STUDY,
    starts=lambda preset: [
      Start('trained', lambda shared: shared),
      Start('copy', lambda shared: shared, 'trained', copied),
    ],
  )
  arms = [
    Arm('copied', {}, start='trained', change=copied),
    Arm('copied twice', {}, start='copy', change=copied),
    Arm('goes on', {'optimizer.learning_rate': 1e-9}, start='copy'),
  ]
  preset = study.presets['quick']
  *first, later = study.runs(preset, study.shared(preset), arms, [0], tmp_path)
  all_jobs = [*itertools.chain(*first), *later]
  results = [runner.train(job, None, jax.devices()[:1]) for job in all_jobs]
  losses = [result[f'eval/{tiny_study.EVAL}/loss'] for result in results]
  np.testing.assert_allclose(losses, losses[0], rtol=1e-6)
  assert later[1].result()['copies'] == 1.0
  assert len({result['data_digest'] for result in results}) == 1
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
def test_a_study_is_written_and_reported(tmp_path, monkeypatch):
  claims = {
    **tiny_study.DENSE.claims,
    'x': Claim('loss: fast < slow', UNVERIFIED),
  }
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
  # A finished run is not trained again.
  monkeypatch.setattr(runner, 'train_and_evaluate', None)
  command.main(study, argv)
  again = (folder / study_results.TABLE).read_text()
  assert again.splitlines()[3:] == text.splitlines()[3:]
  folder.rename(folder.with_name('full'))
  report.main([f'--results={tmp_path}', f'--output={tmp_path / "page"}'])
  overview = (tmp_path / 'page' / report.PAGE).read_text()
  assert '(results/dense_study.md) |  |  | 0 / 0 / 0 / 0 | 0 / 0 / 0 / 2 |' in (
    overview
  )
  page = (tmp_path / 'page' / report.KEPT / 'dense_study.md').read_text()
  hidden = [f'{claims_lib.find(address).value}' for address in UNVERIFIED]
  assert 'unverified, not shown' in page
  assert not [number for number in hidden if number in page]


class Recorder(StepMetrics):
  """Collects the metrics of steps, and has the step that the run was given."""

  def start(self, run):
    self.given = run.train_step
    return super().start(run)


@pytest.mark.slow
def test_a_shared_step_is_the_runs_own(tmp_path):
  router = {'kind': 'noisy_top_k', 'noisy_top_k': {'importance_weight': 0.3}}
  moe = {'router': router, 'layers': 'all'}
  first = tiny.config(
    total_steps=3,
    max_nonfinite_steps=1,
    model={'num_layers': 1, 'moe': moe},
    aux_losses={'kind': 'linear', 'line_steps': 2},
  )
  key = 'model.moe.router.noisy_top_k.z_weight'
  second = layered(RunConfig, first, {'seed': 1, key: 0.2})
  compiled = []
  for i, config in enumerate([first, second]):
    losses = {}
    for shared in ([], [shared_steps.SharedStep()]):
      hooks = [*shared, recorder := Recorder()]
      loop.train_and_evaluate(
        run_config.read(config),
        tmp_path / f'{i}-{len(shared)}',
        hooks=hooks,
        devices=jax.devices()[:1],
      )
      losses[len(shared)] = [step.loss for step in recorder.steps]
    compiled.append(recorder.given.func)
    assert len(losses[0]) == config.total_steps
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
  assert compiled[0] is compiled[1]


@pytest.mark.parametrize(
  ('target', 'lengths', 'losses', 'ratio'),
  [
    # Half of the loss between lengths 0.25 and 1 is half of the way in
    # logarithms, whatever comes before.
    (1.5, (0.1, 0.25, 1.0), [2.5, 2.0, 1.0], 0.5),
    # Beyond the ends the nearest two lengths are used.
    (0.5, (0.25, 1.0), [2.0, 1.0], 2.0),
    (2.5, (0.25, 1.0), [2.0, 1.0], 0.125),
    # A loss that rises never reaches the target.
    (0.5, (0.25, 1.0), [1.0, 2.0], math.nan),
  ],
)
def test_ratio_to_a_loss_is_told(target, lengths, losses, ratio):
  reached = switch_scaling.ratio_to(target, lengths, losses)
  np.testing.assert_allclose(reached, ratio)


# These numbers are what measures of studies add to a run's metrics.
MEASURED = [
  'max_violation_batch', 'leak/changed', 'leak/at_once', 'leak/generated',
  'agreement', 'removed/loss', 'unlearned', 'experts', 'none', 'lost',
  'foreseen', 'stable', 'cost/params', 'cost/flops',
  'cost/memory', 'cost/activations', 'data/epochs', 'data/distinct',
  'cv_importance', 'cv_load', 'max_over_mean', 'counted_max_over_mean',
  'scores/chrf', 'scores/bleu', 'disk', 'memory', 'flops',
  'tokens_per_second', 'speed', 'bytes', 'unused', 'zeros', 'gate/leaving',
  'gate/kept_at_home', 'whole/bytes', 'learning_rate', 'extracted/loss',
  'extracted/bytes', 'extracted/speed', 'code bits', 'metadata bits',
  'disabled/1', 'disabled/2', 'disabled/4',
]  # fmt: skip
FACTS = dict(device='a machine', cores='2', date='2026-01-02', jax='1')


def stand_in(config, number: float) -> dict[str, float]:
  """A result with every key that a run of this config has."""
  names = [
    *MEASURED, *(f'steps/{slots}/{key}' for slots in glam_capacity.ROOM.values()
                 for key in ('loss', 'dropped'))
  ]  # fmt: skip
  for name in clusters.CLUSTERS:  # of a run with a trace
    for source in (fastermoe_tables.TRACE, fastermoe_tables.SKEWED):
      for arm in simulate.ARMS:
        prefix = fastermoe_tables.prefix_of(name, source, arm)
        names += [column.key for column in fastermoe_tables.columns(prefix)]
  sources = [
    f'{source}{key}'
    for source in config.data.mixture.sources
    for key in ('', '.chance', '.nats')
  ]
  layers = config.model.num_layers + config.model.encoder.num_layers
  keys = ('load_cv', 'load_max_over_mean', 'importance_loss', 'z_loss')
  by_layer = [f'layer_{i}/{key}' for i in range(layers) for key in keys]
  names += [f'train/{key}' for key in ('drop_rate', *by_layer)]
  means = ['loss', 'drop_rate', 'mean', 'held_out_cluster_mean']
  names += [
    f'eval/{name}/{key}'
    for name in config.evals
    for key in (*means, *sources, *by_layer)
  ]
  step_keys = ('step/flops', 'step/expert_flops', 'step/optimizer_bytes')
  return {
    **dict.fromkeys(names, number),
    **dict.fromkeys(step_keys, 1e9),
    'data_digest': 'x',
    'made': {**FACTS, 'minutes': 1.5},
    'parameters': 1 + config.model.moe.num_experts,
  }


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
  layers += [*fp8_products.CASES, *merge_or_prune.SMALLER]
  layers += [*replayed_policy.CASES]
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


def check_flops(study):
  """FLOPs are equal but for the router's, which nobody compensates."""
  preset, models = study.presets['quick'], {}
  shared = study.shared(preset)
  for arm in study.arms_of(preset):
    before = dict.fromkeys(arm.runs_before, 'a run')
    config = layered(RunConfig, shared, {**arm.overrides, **before})
    models[arm.name] = run_config.read(config).filled(257).build()
    is_leaking = arm.name.startswith(LEAKING) or (
      study.name in FIRST_CHOICES_FIRST and 'dense' not in arm.name
    )
    assert models[arm.name].stacks.leaks_future == is_leaking
  # Wide arms have equal slots instead, which another test compares. Arms that
  # differ only in losses or steps have equal models.
  flops = [
    cost.count(model, shared.data.seq_len).training_flops
    for model in {m for n, m in models.items() if not n.startswith('wide ')}
  ]
  assert (max(flops) < 1.2 * min(flops)) != (study.name in UNEQUAL), flops


def check_claims(study, folder):
  """Claims, columns and figures are about the rows that stand-ins make."""
  assert set(study.presets) == {'quick', 'full'}
  for preset in study.presets.values():
    arms = study.arms_of(preset)
    shared, seeds = study.shared(preset), range(2)
    levels = study.runs(preset, shared, arms, seeds, folder)
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
  figures.draw(study.figure, summary, folder / 'figure.png')
  if study.pictures is not None:
    study.pictures(results, folder)


# A study with and one without runs that others begin with, and one of served
# models.
FAST = ('eval_capacity', 'switch_table6', 'serving_table')


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow)
    for name in STUDIES
  ],
)
def test_a_study_keeps_its_contract(name, tmp_path):
  check_claims(STUDIES[name], tmp_path)
  check_flops(STUDIES[name])


def test_a_share_is_of_the_gap_between_a_control_and_the_teacher():
  key = f'eval/{byte_models.EVAL}/loss'
  names = {*map(switch_table6.teacher_of, switch_table6.EXPERTS)}
  names |= {*switch_table6.STUDENTS}
  # In the second the teacher's mean is better, but the interval has zero.
  for taught, share in (([1.7, 1.8, 1.6], 25.0), ([1.89, 2.0, 1.6], math.nan)):
    losses = {name: [2.0, 2.1, 1.9] for name in names} | {
      switch_table6.TEACHER: taught,
      switch_table6.CONTROL: [1.9, 2.0, 1.8], switch_table6.PLAIN: [2.0] * 3,
      switch_table6.STUDENT: [1.85, 1.95, 1.75],
    }  # fmt: skip
    results = {n: [{key: x} for x in by_seed] for n, by_seed in losses.items()}
    rows = {row.name: row.values for row in switch_table6.rows(results)}
    student = rows[switch_table6.STUDENT]
    # The control has the same start, 0.2 above the first teacher.
    np.testing.assert_allclose(student[switch_table6.GAIN.name], [0.05] * 3)
    np.testing.assert_allclose(student[switch_table6.SHARE.name], [share] * 3)
    # The other share is over the dense model trained on, 0.3 above it.
    kept = student[switch_table6.OVER_TWIN.name]
    np.testing.assert_allclose(kept, [2 * share] * 3)
    # Without a start, it is the dense model.
    gain = rows[switch_table6.PLAIN][switch_table6.GAIN.name]
    np.testing.assert_allclose(gain, [0, 0.1, -0.1], atol=1e-9)
    for name in (switch_table6.DENSE, switch_table6.CONTROL):
      assert np.isnan(rows[name][switch_table6.GAIN.name]).all()
    assert np.isnan(rows[switch_table6.TEACHER][switch_table6.SHARE.name]).all()


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


@functools.cache
def new_arms():
  """Arms that are not made and measured as earlier ones, by study.

  Other arms differ from these in their configs alone, of which other tests
  build each model. The last arms of a study are those that have most. One has a
  model that another study makes, and a measure that other arms have.
  """
  recipes, arms_by_study = set(), {}
  for name, study in STUDIES.items():
    measure = getattr(study.runner, 'measure', None)
    for arm in reversed(study.arms_of(study.presets['quick'])):
      # A partial function is known by the one that it calls.
      made = [getattr(f, 'func', f) for f in (measure, arm.change)]
      recipe = type(study.runner), *made, bool(arm.start), bool(arm.teacher)
      if recipe not in recipes and arm.name != 'distilled, served':
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
@pytest.mark.parametrize('name', new_arms())
def test_every_way_to_make_a_run_runs(name, results_folder, monkeypatch):
  # Each is timed a few times on a few prompts.
  monkeypatch.setattr(kudugunta_table, 'SECONDS', 0.0)
  monkeypatch.setattr(kudugunta_table, 'PROMPTS', 4)
  monkeypatch.setattr(kudugunta_table, 'TOKENS', 2)
  all_cases = fp8_products.CASES  # each is a program of its own
  last = {fp8_products.AFTER_ROUTER: all_cases[fp8_products.AFTER_ROUTER]}
  monkeypatch.setattr(fp8_products, 'CASES', last)
  monkeypatch.setattr(replayed_policy, 'UPDATES', 2)
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


@pytest.mark.parametrize(
  ('platforms', 'driver', 'libc', 'tuned'),
  [
    ('cpu', 'nvidiactl', 'glibc', True),
    ('cuda,cpu', 'none', 'glibc', False),
    ('', 'vfio/0', 'glibc', False),
    ('', 'vfio/vfio', 'glibc', True),
    ('cpu', 'none', 'another', False),
    ('cpu', 'none', 'refuses', False),
  ],
)
def test_the_allocator_is_tuned_where_it_can_be(
  platforms, driver, libc, tuned, tmp_path, monkeypatch
):
  (tmp_path / driver).parent.mkdir(exist_ok=True)
  (tmp_path / driver).touch()
  settings = {}

  def mallopt(name, value):
    settings[name] = value
    return libc == 'glibc'

  library = types.SimpleNamespace(mallopt=mallopt)
  if libc == 'another':
    del library.mallopt
  monkeypatch.setenv('JAX_PLATFORMS', platforms)
  with monkeypatch.context() as patch:
    patch.setattr('sys.platform', 'linux')
    patch.setattr('ctypes.CDLL', lambda name: library)
    patch.setattr(devices.pathlib, 'Path', lambda name: tmp_path)
    assert keep_freed_memory() is tuned
  # The numbers are those of glibc: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD,
  # M_ARENA_MAX.
  if tuned:
    assert settings == {-3: 2**31 - 1, -1: 2**31 - 1, -8: 1}


@pytest.mark.skipif(
  not pathlib.Path('/proc/self/maps').exists(), reason='Linux tells regions'
)
def test_compiled_programs_are_forgotten_where_regions_are_many():
  traces = []
  f = jax.jit(lambda x: traces.append(None) or x + 1)
  for most, expected in ((10**9, 1), (10**9, 1), (0, 1), (10**9, 2)):
    f(1.0)
    assert len(traces) == expected
    forget_programs(most)
