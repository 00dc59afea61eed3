"""Stored results and their page: judged by claims of today, or withheld."""

import dataclasses
import functools
import importlib
import json
import pathlib
import shutil
import sys

import pytest
import scipy.stats

from experiments import recompute, report, serving_table
from experiments.study import command, figures, rates, stored, verdicts
from experiments.study import results as study_results
from experiments.study.jobs import Job, settings_digest, text_of
from experiments.study.parts import (
  SHARE,
  Arm,
  Claim,
  Column,
  Preset,
  Revision,
  Row,
  Start,
)
from experiments.study.tables import bounds_of
from experiments.study.tasks import TASKS
from moe_jax.analysis.intervals import Interval
from moe_jax.run_config import RunConfig
from tests import tiny_study
from tests.training import tiny

PATHS = sorted((report.HERE / report.KEPT).glob('*.json'))
STUDY = dataclasses.replace(
  tiny_study.STUDY,
  columns=[Column('loss, now'), Column('load')],
  claims={
    'little is better': 'load: little < much',
    'little is better than dense': 'load: little < dense',
    'its loss is lower': 'loss, now: little < much',
  },
  written='2026-01-01',
)


def summary(**changed):
  """A result of the preset `full` of `STUDY`, as it was stored."""
  values = {'dense': [3.0, 3.1, 3.0], 'little': [1.0, 1.1, 1.3]}
  values['much'] = [2.0, 2.1, 2.2]
  rows = [
    {'name': name, 'line': '', 'x': None, 'values': {'load': numbers}}
    for name, numbers in values.items()
  ]
  columns = [{'name': 'load', 'unit': '', 'digits': 1}]
  facts = dict(source='old', device='a CPU', jax='1', minutes=8.0, overrides={})
  about = dict(name='tiny_study', title='old', task=STUDY.tasks['text'].label)
  run = dict(steps=6, seeds=[0, 1, 2], date='2026-01-02', digests=['x'])
  run |= dict(times={}, remarks='old', claims={})
  stored_before = {**about, **facts, **run, 'columns': columns, 'rows': rows}
  return {**stored_before, **changed}


def words(judged):
  return [claim['verdict'] for claim in judged['claims']]


def test_a_stored_result_is_judged_by_the_claims_of_today():
  judged = stored.judged_again(summary(), STUDY)
  assert words(judged) == [verdicts.SHOWN, verdicts.SHOWN, verdicts.WITHHELD]
  assert "no 'loss, now' of 'little'" in judged['claims'][2]['reason']
  text = study_results.text_of(judged)
  assert '| load |' in text and '`python -m experiments.tiny_study' in text
  assert 'Claims were written on 2026-01-01' in text and '†' not in text
  assert '\nold\n' not in text
  reversed_claims = {'much is better': 'load: much < little'}
  study = dataclasses.replace(STUDY, claims=reversed_claims)
  assert words(stored.judged_again(summary(), study)) == [verdicts.REFUTED]


def test_what_a_study_has_revised_since_is_marked_and_withheld():
  def judged(revision, **changed):
    study = dataclasses.replace(STUDY, revisions=[revision])
    return stored.judged_again(summary(**changed), study)

  revision = Revision('2026-01-02', 'Little is less now.', rows=['litt*'])
  assert set(words(judged(revision))) == {verdicts.WITHHELD}
  text = study_results.text_of(judged(revision))
  assert '| little | 1.1333 ± 0.3795 † |' in text
  assert '| much | 2.1000 ± 0.2484 |' in text
  assert 'Little is less now.' in text
  # Columns that are not concerned, and results from after it, still decide.
  other = dataclasses.replace(revision, columns=['loss*'])
  assert words(judged(other))[0] == verdicts.SHOWN
  assert words(judged(revision, date='2026-01-03'))[0] == verdicts.SHOWN


def test_runs_of_other_configs_are_marked():
  configs = STUDY.digests(STUDY.presets['full'])
  assert configs.keys() == {'dense', 'little', 'much'}
  assert len(set(configs.values())) == 3
  same = stored.judged_again(summary(configs=configs), STUDY)
  assert same['outdated'] == same['marks'] == []
  changed_configs = {**configs, 'little': 'another'}
  judged = stored.judged_again(summary(configs=changed_configs), STUDY)
  assert 'Configs of today are others: little' in judged['outdated'][0]['what']
  assert set(words(judged)) == {verdicts.WITHHELD}
  shorter = stored.judged_again(summary(steps=5), STUDY)
  assert shorter['marks'] == ['The preset has 6 steps and 3 seeds today.']


def test_a_digest_is_of_what_is_stated():
  def digest(**changes):
    config = tiny.config(**changes)
    job = Job(Arm('a', {}), 0, config, tiny_study)
    return settings_digest(RunConfig, job)

  assert digest(seed=1) == digest(seed=2) != digest(batch_size=6)


def test_a_change_has_the_same_name_where_its_study_is_run(monkeypatch):
  change = functools.partial(serving_table.pruned, left=4)
  name = text_of(change)
  module = sys.modules[serving_table.__name__]
  monkeypatch.setitem(sys.modules, '__main__', module)
  monkeypatch.setattr(serving_table.pruned, '__module__', '__main__')
  assert text_of(change) == name
  assert 'experiments.serving_table.pruned' in name


@pytest.mark.parametrize(
  ('preset', 'withheld', 'reason'),
  [
    (Preset(4, 3), '', ''),
    (Preset(3, 3), '', 'a trial of 3 steps, of at least 4'),
    (Preset(4, 3, underpowered='too short'), '', 'too short'),
    (Preset(4, 3), 'served otherwise', 'served otherwise'),
  ],
)
def test_trials_decide_nothing(preset, withheld, reason):
  rows = [stored.row_of(row) for row in summary()['rows']]
  claims = {'a': Claim('load: little < much', withheld=withheld)}
  study = dataclasses.replace(STUDY, claims=claims)
  (claim,) = verdicts.judged(study, preset, STUDY.tasks['text'], rows)['claims']
  word = verdicts.WITHHELD if reason else verdicts.SHOWN
  assert (claim['verdict'], claim['reason']) == (word, reason)


def test_intervals_end_where_numbers_do():
  shares = Interval(96.0, 8.0)
  assert shares.text('.0f', SHARE) == '96 (88 to 100)'
  assert shares.text('.0f') == '96 ± 8'
  assert figures.bar(shares, SHARE) == (8.0, 4.0)
  # A difference of losses is in their column, and may be negative.
  assert Interval(-1.0, 0.5).ends([0.0, None]) == (-1.5, -0.5)
  row = verdicts.described_row(Row('a minus b', {}, difference=True))
  assert bounds_of(row, {'bounds': SHARE}) is None


@pytest.mark.parametrize('path', PATHS, ids=lambda path: path.stem)
def test_a_stored_command_makes_its_table(path):
  stored_summary = json.loads(path.read_text(encoding='utf-8'))
  study = importlib.import_module(f'experiments.{path.stem}').STUDY
  options = command.parse(study, stored.arguments_of(stored_summary))
  preset = study.presets[options.preset]
  judged = stored.judged_again(stored_summary, study)
  sizes = stored_summary['steps'], len(stored_summary['seeds'])
  if (preset.steps, preset.seeds) != sizes:
    assert f'{preset.steps:,} steps' in ' '.join(judged['marks'])
  assert options.flags == [] and len(judged['claims']) >= 4


def test_a_closed_gate_withholds_the_claims_behind_it():
  claims = {'a': 'load: much < dense', 'b': 'load: little < much'}
  study = dataclasses.replace(STUDY, claims=claims)

  def page(gate, *behind):
    gated = dataclasses.replace(study, gates={gate: behind})
    judged = stored.judged_again(summary(), gated)
    return words(judged), study_results.text_of(judged)

  verdict, text = page('load: little < dense', '*')
  assert verdict == [verdicts.SHOWN] * 2 and '**seen**' in text
  verdict, text = page('load: little < 1.0', 'b')
  assert verdict == [verdicts.SHOWN, verdicts.WITHHELD]
  assert (
    'Gate: load: little < 1.0. load, little minus 1: +0.1333 ± 0.3795' in text
  )
  assert '**withheld**: the gate "load: little < 1.0" is not resolved' in text
  # A preset that leaves the gate's rows out has not seen what it asks.
  presets = {'full': Preset(6, 3, without=['slow'])}
  gated = dataclasses.replace(
    study, gates={'load: slow < 1': 'b'}, presets=presets
  )
  claim = stored.judged_again(summary(), gated)['claims'][1]
  assert claim['reason'] == 'the gate "load: slow < 1" is not run'
  # A claim is not behind itself.
  assert page('load: much < dense', '*')[0] == [verdicts.SHOWN] * 2
  with pytest.raises(ValueError, match="no claim is like 'c\\*'"):
    page('load: much < dense', 'c*')


@pytest.mark.parametrize(
  ('seen', 'word', 'reason'),
  [
    (0, verdicts.UNRESOLVED, ''),
    (2, verdicts.SHOWN, ''),
    (3, verdicts.WITHHELD, '2 of at least 3 seeds'),
    (5, verdicts.WITHHELD, '0 of at least 3 seeds'),
  ],
)
def test_seeds_that_were_added_after_a_look_judge_alone(seen, word, reason):
  values = {'little': [4.0, 3.0, 1.0, 1.1, 1.2], 'much': [2.0] * 5}
  rows = [
    verdicts.described_row(Row(name, {'load': numbers}))
    for name, numbers in values.items()
  ]
  compared = 'load: little < much'
  study = dataclasses.replace(
    STUDY,
    claims={'the first two say no, the others yes': compared},
    gates={compared: ()},
    presets={'full': Preset(6, 5, seeds_seen=seen)},
  )
  judged = stored.judged_again(summary(rows=rows, seeds=[*range(5)]), study)
  (claim,), (gate,) = judged['claims'], judged['gates']
  assert (claim['verdict'], claim['reason']) == (word, reason)
  # A gate is no finding: all seeds decide it, and all stand in the table.
  assert gate['verdict'] == verdicts.UNRESOLVED
  assert [len(row['values']['load']) for row in judged['rows']] == [5, 5]
  sentence = f'seeds from {seen} on alone judge the claims'
  assert (sentence in study_results.text_of(judged)) == bool(seen)


def test_a_check_is_small_and_counted_nowhere(monkeypatch):
  reason = 'Little is less than much.'
  named = {STUDY.name: {'little is better': reason}}
  monkeypatch.setattr(verdicts, 'checks', lambda: named)
  judged = stored.judged_again(summary(), STUDY)
  assert [claim['kind'] for claim in judged['claims']] == [
    verdicts.CHECK, *[verdicts.OURS] * 2
  ]  # fmt: skip
  table, _, small = study_results.text_of(judged).partition('<sub>Checks')
  difference = 'little minus much: -0.9667 ± 0.1434; claimed below 0'
  assert f'{difference}; shown). {reason}' in small
  assert '| little is better than dense |' in table
  assert '| little is better |' not in table
  page = report.overview([judged])
  assert (
    '(results/tiny_study.md) |  |  | 0 / 0 / 0 / 0 | 1 / 0 / 0 / 1 |' in page
  )


def test_of_many_findings_some_fall():
  def claim(p, verdict, kind=verdicts.OURS):
    return {'p': p, 'verdict': verdict, 'kind': kind, 'doubtful': False}

  found = [
    claim(0.001, verdicts.SHOWN),
    claim(0.04, verdicts.REFUTED),  # 0.06, as two of three are so small
    claim(0.6, verdicts.UNRESOLVED),
    claim(0.04, verdicts.SHOWN, verdicts.CHECK),
    claim(None, verdicts.WITHHELD),
  ]
  verdicts.mark_false_discoveries([{'claims': found}])
  assert [x['doubtful'] for x in found] == [False, True, False, False, False]


def test_each_arm_goes_on_with_the_rate_of_its_best_trials():
  grid = (0.1, 0.2, 0.4, 0.8)
  study = dataclasses.replace(tiny_study.STUDY, rates=grid)
  preset = study.presets['full']
  arms, (stage,) = study.arms_of(preset), study.stages(preset)
  trials = stage.arms(arms, study.shared(preset))
  assert len(trials) == 12 and {*stage.seeds}.isdisjoint(range(preset.seeds))
  assert trials[1].name == 'dense, trial at 0.2'
  overrides = {'total_steps': 2, 'optimizer.learning_rate': 0.2}
  assert trials[1].overrides.items() >= overrides.items()
  own = dataclasses.replace(arms[0], overrides={rates.KEY: 3.0})
  taken = Arm('taken', {}, rate_of='little')
  assert not stage.arms([own, taken], study.shared(preset))

  key, nan = f'eval/{tiny_study.EVAL}/loss', float('nan')
  losses = {
    'dense': [(1.0, 5.0), (2.5, 2.5), (3.0, 3.0), (nan, 0.0)],
    'little': [(nan, nan), (4.0, 4.0), (3.0, 3.0), (2.0, 2.0)],
    'much': [(3.0, 3.0), (2.0, 2.0), (2.0, 2.0), (nan, nan)],
  }
  results = {
    f'{arm}, trial at {rate:g}': [{key: loss} for loss in both]
    for arm, of_rates in losses.items()
    for rate, both in zip(grid, of_rates)
  }
  best = {
    arm.name: arm.overrides[rates.KEY]
    for arm in stage.chosen([*arms, taken], results, {})
  }
  both = {'little': 0.8, 'taken': 0.8}
  assert best == {'dense': 0.2, 'much': 0.2, **both}
  text = rates.described(best, grid)
  assert 'much 0.2, taken 0.8. At an end of the grid: little, taken' in text
  with pytest.raises(ValueError, match='fewer than 4'):
    dataclasses.replace(study, rates=grid[:3])
  with pytest.raises(ValueError, match='exemption of tiny_study'):
    dataclasses.replace(study, exempt='it would take long')


def test_arms_are_tried_with_starts_that_have_the_rates_of_their_trials():
  grid, key = (0.1, 0.2, 0.4, 0.8), f'eval/{tiny_study.EVAL}/loss'
  start = Start('start', overrides={'total_steps': 10}, searched=True)
  study = dataclasses.replace(
    tiny_study.STUDY, rates=grid, starts=lambda _: [start, Start('other')]
  )
  preset, output = study.presets['full'], pathlib.Path('results')
  shared, arms = study.shared(preset), [Arm('goes on', {}, start='start')]
  first, second = study.stages(preset)
  trials = first.arms(arms, shared)
  assert [arm.name for arm in trials] == [
    f'start, trial at {rate:g}' for rate in grid
  ]
  overrides = {'total_steps': 3, rates.KEY: 0.1}
  assert trials[0].overrides.items() >= overrides.items()
  losses = (3.0, 2.0, 1.0, 2.0)
  made = {arm.name: [{key: x}] * 2 for arm, x in zip(trials, losses)}
  assert first.chosen(arms, made, {}) == arms
  tried = second.arms(arms, shared)
  (job,), last = study.runs(preset, shared, tried, [1000], output, made)
  assert job.config.optimizer.learning_rate == 0.4
  assert job.config.total_steps == 10 and len(last) == len(grid)
  assert {j.begins_with for j in last} == {job.folder}
  other = study.starts_at(preset, made)[1]
  assert rates.KEY not in other.overrides


def test_a_verdict_has_the_probability_of_its_test():
  rows = [Row('a', {'x': [1.0, 1.2, 1.5]}), Row('b', {'x': [1.1, 1.0, 1.1]})]
  verdict = verdicts.verdict(Claim('x: a > b'), rows)
  expected = scipy.stats.ttest_rel(rows[0].values['x'], rows[1].values['x'])
  assert verdict.p == pytest.approx(expected.pvalue)
  # The bound is as far from the difference as the other side of zero.
  within = 2 * verdict.difference.mean
  equal = verdicts.verdict(Claim(f'x: a = b within {within:.10f}'), rows)
  assert equal.p == pytest.approx(verdict.p)
  counted = [Row('c', {'x': [2.0] * 3}), Row('d', {'x': [1.0] * 3})]
  assert verdicts.verdict(Claim('x: c > d'), counted).p == 0


@pytest.mark.slow
def test_pages_are_those_of_the_stored_results():
  summaries = report.read(report.HERE / report.KEPT)
  for name, text in report.pages(summaries).items():
    assert (report.HERE / name).read_text('utf-8') == text, name
  texts = {s['name']: {c['text'] for c in s['claims']} for s in summaries}
  for name, named in verdicts.checks().items():
    assert named.keys() <= texts[name], name


@pytest.mark.slow
def test_pages_are_recomputed_from_values_of_seeds(tmp_path, capsys):
  assert recompute.main() == 0
  capsys.readouterr()
  shutil.copytree(report.HERE / report.KEPT, tmp_path / report.KEPT)
  shutil.copy(report.HERE / report.PAGE, tmp_path)
  page = tmp_path / report.KEPT / 'shazeer_table6.md'
  text = page.read_text('utf-8')
  for old, new in (
    ('1.4571 ± 0.0077', '1.4572 ± 0.0077'),  # a cell
    ('12.88 ± 1.55', '12.88 (0.00 to 14.43)'),  # cut without need
    ('-0.0375 ± 0.0095', '-0.0375 ± 0.0096'),  # a claim
    ('**opposite**', '**not resolved**'),
    ('**opposite**', '**withheld**'),  # without a reason
    ('claimed below 0; direction rep', 'claimed above 0; direction rep'),
  ):
    assert old in text
    page.write_text(text.replace(old, new, 1), 'utf-8')
    assert recompute.main(tmp_path) == 1
    out = capsys.readouterr().out
    assert 'shazeer_table6: 30 cells, 9 claims, 1 disagree' in out


def summary_of(name: str, digest: str) -> dict:
  """Summary of a study of two rows with one claim."""
  claims = {'a is better': 'loss: a < b'}
  study = dataclasses.replace(
    tiny_study.DENSE, name=name, title=f'About {name}', claims=claims
  )
  rows = [Row('a', {'loss': [1.0, 1.1]}), Row('b', {'loss': [1.0, 1.1]})]
  made = dict(device='a', cores='2', date='2026', jax='1', minutes=1.0)
  results = {'a': [{'data_digest': digest, 'made': made}]}
  return study_results.summary_of(
    study, Preset(1, 2), TASKS['text'], rows, results, {}
  )


def write_summary(results, name: str, digest: str):
  """Writes a study's folder as its full preset does."""
  folder = results / name / 'full'
  folder.mkdir(parents=True)
  text = json.dumps(summary_of(name, digest))
  (folder / study_results.SUMMARY).write_text(text)
  (folder / study_results.PICTURE).write_bytes(b'')


def test_a_page_that_is_refused_changes_nothing(tmp_path, capsys):
  results, output = tmp_path / 'results', tmp_path / 'page'
  argv = [f'--results={results}', f'--output={output}']
  write_summary(results, 'first', 'one')
  (output / report.KEPT).mkdir(parents=True)
  misses = output / report.KEPT / report.MISSES
  misses.write_text('# Misses\n\n## first\n\nIt misses\nnothing.\n')
  report.main(argv)
  page = (output / report.PAGE).read_text()
  assert '(results/first.md)' in page
  text = (output / report.KEPT / 'first.md').read_text()
  assert '# About first' in text and '\nIt misses nothing.\n' in text
  write_summary(results, 'second', 'two')
  with pytest.raises(SystemExit):
    report.main(argv)
  assert 'saw different data' in capsys.readouterr().err
  file_names = sorted(path.name for path in (output / report.KEPT).iterdir())
  assert file_names == ['first.json', 'first.md', 'first.png', report.MISSES]
  assert (output / report.PAGE).read_text() == page
