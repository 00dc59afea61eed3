"""The tables that the cost command prints."""

import io
import pathlib

import pytest
from rich.console import Console

from moe_jax import run_config
from moe_jax.analysis import cost, explain_cost
from moe_jax.configs import mixtral_8x7b
from tests.models import tiny
from tests.models.tiny import T
from tests.training import tiny as tiny_run

ROOT = pathlib.Path(__file__).parents[2]


def text_of(*tables):
  console = Console(width=120, record=True, file=io.StringIO())
  for table in tables:
    console.print(table)
  return console.export_text()


def test_mixtral_is_47b_in_memory_and_13b_in_compute():
  options = run_config.read(mixtral_8x7b.get_config())
  model = options.build()
  work = cost.Workload(1, options.data.seq_len, num_parts=options.mesh.expert)
  text = text_of(
    cost.compute_table(model, work),
    cost.memory_table(model, work),
    cost.fit_table(model, work),
  )
  assert '46.7B parameters in memory, 12.9B in compute per token' in text
  rows = {
    cells[0]: cells[1:]
    for line in text.splitlines()
    if (cells := [cell.strip() for cell in line.strip('│ ').split('│')])
  }
  assert rows['weights'] == ['187 GB', '93.4 GB', '46.7 GB']
  # The cache has 2 * 32 layers * 8 heads of 128, for 32768 tokens.
  assert rows['cache'] == ['8.59 GB', '4.3 GB', '4.3 GB']
  assert rows['H100-80GB, 80 GB'] == [
    'needs 3',
    'needs 2',
    'fits (64%)',
  ]
  assert rows['TPU v5e, 16 GB'][2] == 'needs 4'
  assert 'one all-to-all, as each of 8 devices sends it' in rows


def test_tables_of_an_encoder_decoder_name_both_halves():
  model = tiny.build(kind='encoder_decoder')
  work = cost.Workload(3, T, target_len=6, num_parts=5)
  text = text_of(
    cost.compute_table(model, work),
    cost.memory_table(model, work),
    cost.fit_table(model, work),
  )
  text = ' '.join(text.split())
  for part in (
    'over 10 tokens read and 6 written',
    'a batch of 3 x 10 and 6 tokens',
    'encoder: rows to and from the experts of a sparse layer (gather, 45 rows)',
    'decoder: the 8 all-to-alls of a training step',
    'Memory to generate 3 x 6 tokens',
    'fits (<1%)',
  ):
    assert part in text


def test_a_dense_model_has_no_rows_of_experts():
  model = tiny.build(dict(layers='none'))
  text = text_of(cost.memory_table(model, cost.Workload(2, T)))
  assert 'kept by all layers' in text
  assert 'experts' not in text


@pytest.mark.parametrize(
  ('n', 'expected'),
  [(7, '7 B'), (93_405_585_408, '93.4 GB'), (3_140_000_000_000, '3.14 TB')],
)
def test_in_bytes(n, expected):
  assert cost.in_bytes(n) == expected


@pytest.mark.slow
def test_the_command_prints_the_tables_of_overrides(capsys, monkeypatch):
  monkeypatch.chdir(ROOT)
  monkeypatch.setenv('COLUMNS', '120')
  cost.main(
    [
      *('--config=configs/switch_c.py', '--batch=4', '--expert_parallel=512'),
      '--config.data.target_len=96',
      '--config.model.moe.router.kind=hash',
    ]
  )
  out = capsys.readouterr().out
  # Without the 15 + 15 routers of 2080 x 2048 it is 0.1B less than 1.8B.
  assert '1.57T parameters in memory, 1.67B in compute' in out
  assert 'a batch of 4 x 512 and 96 tokens' in out
  assert 'each of 512 devices' in out
  assert '3.14 TB' in out
  # The file sets options of its router that the hash router does not have.
  assert 'has no effect with these flags; ignored' in out


# Flags are read as in `tests/test_main.py`, which has more mistakes.
@pytest.mark.slow
@pytest.mark.parametrize(
  ('main', 'flag', 'nearest'),
  [
    (explain_cost.main, '--config.model.widht=64', 'model.width'),
    (cost.main, '--config.model.moe.router.token_choice.jiter=0.1', 'jitter'),
  ],
)
def test_an_unknown_key_is_refused_in_one_line(
  main, flag, nearest, capsys, monkeypatch
):
  monkeypatch.chdir(ROOT)
  with pytest.raises(SystemExit) as exit_info:
    main(['--config=configs/tiny_switch.py', flag])
  assert exit_info.value.code == 1
  captured = capsys.readouterr()
  assert captured.out == ''
  (line,) = captured.err.strip().splitlines()
  assert 'unknown config key' in line
  assert f"{nearest}'" in line.split('; have')[0]


def test_a_vocabulary_that_depends_on_the_data_is_asked_for():
  config = tiny_run.config()
  options = run_config.read(config)
  assert cost.with_own_vocabulary(options).model.vocab_size == 257
  sized_options = tiny_run.options(model={'vocab_size': 300})
  assert cost.with_own_vocabulary(sized_options).model.vocab_size == 300
  chars_options = tiny_run.options(data={'tokenizer': {'kind': 'chars'}})
  with pytest.raises(ValueError, match=r'Chars.*--config.model.vocab_size'):
    cost.with_own_vocabulary(chars_options)
