"""The benchmark of prepared data compares what it reads with what it wrote."""

import pytest

from experiments import bench_prepare
from experiments.benchmarks import random_reads, timing
from moe_jax import data

ROW = {
  'tokenizer': 'bytes', 'engine': 'pool of 2', 'processes': 2,
  'megabytes': 200.0, 'rounds': 5,
  'mb_per_second': timing.Spread(80.0, 90.0, 100.0),
  'speed_up': timing.Spread(1.8, 1.9, 2.0), 'load': 0.5,
}  # fmt: skip
READ = {
  'rows_per_second': 1234.4, 'checked': 20, 'wrong': 1, 'open_seconds': 0.3
}  # fmt: skip
ONCE = {
  'gigabytes': 5.0, 'documents': 1000, 'processes': 2, 'seconds': 99.0,
  'mb_per_second': 50.5, 'token_gigabytes': 10.0, 'peak_mib': 400.0,
  'load': 2.0, 'first': [READ], 'unchecked': [READ, READ],
}  # fmt: skip


def test_the_report_has_every_number():
  text = bench_prepare.report([ROW], ONCE)
  for number in ('90.0 (80.0-100.0)', '45.0', '1.90 (1.80-2.00)', '5.00 GB',
                 '50.5 MB/s', '400 MiB', '1,234 and 1,234 rows',
                 '60 documents', '3 were not'):  # fmt: skip
    assert number in text, number


@pytest.mark.slow
def test_documents_can_be_made_again_by_their_number(tmp_path):
  training = random_reads.write(tmp_path / 'lines', 200_000)
  texts = data.FilesSource(f'{tmp_path}/lines/*.jsonl').texts()
  docs = [random_reads.document(i) for i in range(len(training))]
  for split, train in zip(data.SPLITS, (True, False)):
    expected = [t for t, is_train in zip(docs, training) if is_train == train]
    assert list(texts.texts(split)) == expected


@pytest.mark.slow
def test_both_tokenizers_are_measured(tmp_path, monkeypatch):
  monkeypatch.setattr(bench_prepare, '_BPE_DOCUMENTS', 50)
  rows = bench_prepare.measure(tmp_path, 100_000, [1], 1)
  assert [row['tokenizer'] for row in rows] == ['bytes', 'BPE']
  for row in rows:
    assert row['mb_per_second'].median > 0 and row['speed_up'].median == 1
