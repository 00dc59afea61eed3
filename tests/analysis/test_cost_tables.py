"""What the command prints: tables that a person reads off."""

import io
import pathlib
import subprocess
import sys

import pytest
from rich.console import Console

from configs import mixtral_8x7b
from moe_jax import models
from moe_jax.analysis import cost
from moe_jax.config import merge
from tests.models import tiny
from tests.models.tiny import T


def text_of(*tables):
  console = Console(width=120, record=True, file=io.StringIO())
  for table in tables:
    console.print(table)
  return console.export_text()


def test_mixtral_is_47b_in_memory_and_13b_in_compute():
  config = mixtral_8x7b.get_config()
  model, work = models.build(config), cost.workload(config)
  text = text_of(
    cost.compute_table(model, work),
    cost.memory_table(model, work),
    cost.fit_table(model, work, ['h100', 'v5e']),
  )
  assert '46.7B parameters in memory, 12.9B in compute per token' in text
  rows = {
    cells[0]: cells[1:]
    for line in text.splitlines()
    if (cells := [cell.strip() for cell in line.strip('│ ').split('│')])
  }
  assert rows['weights'] == ['187 GB', '93.4 GB', '46.7 GB']
  # 2 * 32 layers * 8 heads of 128, 32768 times.
  assert rows['cache'] == ['8.59 GB', '4.3 GB', '4.3 GB']
  assert rows['H100-80GB, 80 GB'] == [
    'no: 3 of them',
    'no: 2 of them',
    'fits (64%)',
  ]
  assert rows['TPU v5e, 16 GB'][2] == 'no: 4 of them'
  assert 'all-to-all that each of 8 devices sends' in rows


def test_tables_of_an_encoder_decoder_name_both_halves():
  config = tiny.config(kind='encoder_decoder')
  config = merge(config, {'data': {'target_len': 6}})
  work = cost.workload(config, batch_size=3, num_parts=5)
  model = models.build(config)
  text = text_of(
    cost.compute_table(model, work),
    cost.memory_table(model, work),
    cost.fit_table(model, work),
  )
  text = ' '.join(text.split())
  for part in (
    'over 10 tokens read and 6 written',
    'a batch of 3 x 10 and 6 tokens',
    'encoder: buffers of a sparse layer (gather, 45 rows)',
    'decoder: 8 of them, a training step',
    'to generate: 3 x 6 tokens',
    'fits (0%)',
  ):
    assert part in text


def test_a_dense_model_has_no_buffers():
  model = tiny.build(dict(layers='none'))
  text = text_of(cost.memory_table(model, cost.Workload(2, T)))
  assert 'kept by layers' in text
  assert 'buffers' not in text


def test_a_workload_is_positive():
  with pytest.raises(ValueError, match='batch_size=0'):
    cost.Workload(0, T)


@pytest.mark.parametrize(
  ('n', 'expected'),
  [(7, '7 B'), (93_405_585_408, '93.4 GB'), (3_140_000_000_000, '3.14 TB')],
)
def test_in_bytes(n, expected):
  assert cost.in_bytes(n) == expected


def test_the_command_prints_the_tables():
  result = subprocess.run(
    [
      sys.executable,
      '-m',
      'moe_jax.analysis.cost',
      '--config=configs/switch_c.py',
      '--batch=4',
      '--expert_parallel=512',
    ],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parents[2],
    timeout=120,
  )
  assert result.returncode == 0, result.stderr
  assert '1.57T parameters in memory, 1.8B in compute' in result.stdout
  assert 'a batch of 4 x 512 and 128 tokens' in result.stdout
  assert 'each of 512 devices' in result.stdout
  assert '3.14 TB' in result.stdout


def test_bytes_need_no_vocabulary_and_others_are_asked_for():
  config = tiny.config(vocab_size=0)
  assert cost.with_own_vocabulary(config).model.vocab_size == 257
  given = tiny.config()
  assert cost.with_own_vocabulary(given) is given
  chars = merge(config, {'data': {'tokenizer': 'chars'}})
  with pytest.raises(ValueError, match=r"'chars'.*--config.model.vocab_size"):
    cost.with_own_vocabulary(chars)
  examples = merge(config, {'model': {'kind': 'deep_moe'}})
  with pytest.raises(ValueError, match="'deep_moe' has no cost a token"):
    cost.with_own_vocabulary(examples)
