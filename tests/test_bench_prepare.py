"""The benchmark of prepared data compares what it reads with what it wrote."""

import pytest

from experiments import bench_prepare
from experiments.benchmarks import random_reads
from moe_jax import data


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
