"""The page of all studies: the summaries it takes, and those it keeps."""

import json

import pytest

from experiments import report
from experiments.study import results as study_results
from experiments.study.parts import Column, Figure, Preset, Row
from experiments.study.study import Study
from experiments.study.tasks import TASKS


def summary(name: str, digest: str) -> dict:
  """Summary of a study with two rows, whose step time is measured once."""
  study = Study(
    name=name,
    title=f'About {name}',
    source='No paper',
    config=lambda steps: None,
    arms=lambda preset: [],
    presets={},
    columns=[Column('loss', 'loss'), Column('time', 'time', digits=2)],
    claims={
      'a is better': 'loss: a < b',
    },
    figure=Figure(['loss']),
  )
  rows = [
    Row('a', {'loss': [1.0, 1.1], 'time': [1.25, 1.25]}),
    Row('b', {'loss': [1.0, 1.1]}),
  ]
  made_at = {'device': 'a', 'cores': '2', 'date': '2026', 'jax': '1'}
  made_at['minutes'] = 1.0
  results = {'a': [{'data_digest': digest, 'made': made_at}]}
  return study_results.summary_of(
    study, Preset(1, 2), TASKS['text'], rows, results, {}
  )


def write_summary(results, name: str, digest: str):
  """Writes a study's folder as its full preset does."""
  folder = results / name / 'full'
  folder.mkdir(parents=True)
  text = json.dumps(summary(name, digest))
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
  assert '## About first' in page and '\nIt misses nothing.\n' in page
  write_summary(results, 'second', 'two')
  with pytest.raises(SystemExit):
    report.main(argv)
  assert 'saw different data' in capsys.readouterr().err
  file_names = sorted(path.name for path in (output / report.KEPT).iterdir())
  assert file_names == ['first.json', 'first.png', report.MISSES]
  assert (output / report.PAGE).read_text() == page


def test_what_is_measured_once_has_no_interval():
  numbers = summary('first', 'one')
  table = study_results.results_table(numbers)
  assert '| a | 1.0500 ± 0.6353 | 1.25 |' in table
  assert '| b | 1.0500 ± 0.6353 |  |' in table


def test_a_study_may_claim_nothing():
  numbers = {**summary('first', 'one'), 'claims': []}
  assert study_results.text_of(numbers).startswith('## About first')


def test_studies_without_a_result_are_named():
  stored_summary = {**summary('first', 'one'), 'name': 'eigen_2013'}
  text = report.pending([stored_summary])
  assert '`eval_capacity`' in text and '`eigen_2013`' not in text
  assert 'bench_' not in text and text in report.page([stored_summary])
