"""The page of all studies: the summaries it takes, and those it keeps."""

import dataclasses
import json

import pytest

from experiments import report
from experiments.study import results as study_results
from experiments.study.parts import Preset, Row
from experiments.study.tasks import TASKS
from tests import tiny_study


def summary(name: str, digest: str) -> dict:
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
