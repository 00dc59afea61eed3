"""A step's time is divided among scopes by name; every share counts once."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

from moe_jax.analysis import explain_cost, sharded
from tests.analysis.test_sharded import PROGRAM

ROOT = pathlib.Path(__file__).parents[2]
LAYER = 'closed_call/layers/layer_1'
MODULES = 'email,json,asyncio'


@pytest.mark.parametrize(
  ('op_name', 'part'),
  [
    (f'jit(train_step)/jvp(Decoder)/{LAYER}/moe/router/dot_general', 'router'),
    # A path belongs to its innermost known scope.
    (
      f'jit(train_step)/jvp(Decoder)/{LAYER}/moe/dispatch/index/sort',
      'slots and indices',
    ),
    (
      f'jit(train_step)/transpose(jvp(Decoder))/{LAYER}/moe/combine/gather',
      'combine',
    ),
    (
      f'jit(train_step)/transpose(jvp(Decoder))/{LAYER}/moe/experts/cond/'
      'branch_0_fun/dot_general',
      'experts',
    ),
    (
      f'jit(train_step)/jvp(Decoder)/{LAYER}/moe/exchange/all_to_all',
      'exchange between devices',
    ),
    (
      f'jit(train_step)/jvp(Decoder)/{LAYER}/moe/reshape',
      'rest of sparse layers',
    ),
    (
      f'jit(train_step)/jvp(Decoder)/{LAYER}/attention/attention._project/'
      'dot_general',
      'attention',
    ),
    (
      f'jit(train_step)/jvp(Decoder)/{LAYER}/layer_1._norm/ffn_norm/mul',
      'norms',
    ),
    (
      f'jit(train_step)/jvp(Decoder)/{LAYER}/ffn/dot_general',
      'dense feed-forward',
    ),
    # Attention to an encoder's output has a row of its own.
    (
      f'jit(train_step)/transpose(jvp(EncoderDecoder))/{LAYER}/'
      'cross_attention/mul',
      'cross-attention',
    ),
    (
      f'jit(train_step)/jvp(EncoderDecoder)/{LAYER}/cross_attention_norm/mul',
      'norms',
    ),
    ('jit(train_step)/jvp(Decoder)/logits/dot_general', 'logits and loss'),
    ('jit(train_step)/jvp(loss)/reduce_sum', 'logits and loss'),
    ('jit(train_step)/jvp(Decoder)/embedding/gather', 'embedding'),
    # A transformation may wrap the scope's own name.
    ('jit(f)/transpose(jvp(experts))/mul', 'experts'),
    ('jit(train_step)/jvp(Decoder)/dot_general', explain_cost.AROUND),
    ('jit(train_step)/transpose(jvp())/exp', explain_cost.AROUND),
    ('jit(train_step)/optimizer/mul', 'optimizer'),
    # The name of a primitive is not a scope.
    ('jit(train_step)/dispatch', explain_cost.OTHER),
    ('jit(train_step)/add', explain_cost.OTHER),
    ('', explain_cost.OTHER),
  ],
)
def test_part_of(op_name, part):
  assert explain_cost.part_of(op_name) == part
  assert part in explain_cost.ROWS


def test_backward_is_what_is_transposed():
  lines = ['  %x = f32[] parameter(0)']
  lines += [
    f'  %{name} = f32[] add(%x, %x), metadata={{op_name="{op_name}/mul"}}'
    for name, op_name in (
      ('forward', 'jit(f)/jvp(experts)'),
      ('backward', 'jit(f)/transpose(jvp(experts))'),
    )
  ]
  program = sharded.parse('\n'.join(lines))
  times = explain_cost.by_part(program, {'forward': 1.0, 'backward': 2.0})
  assert times == {('experts', False): 1.0, ('experts', True): 2.0}


def test_a_loop_is_not_counted_beside_its_body():
  seconds = {
    'while.1': 9.0,  # the 4 and 5 of its body
    'fusion.1': 4.0,
    'copy.1': 5.0,
    'dot.1': 2.0,
    'not of this program': 1.0,
  }
  times = explain_cost.by_part(PROGRAM, seconds)
  assert times == {('experts', False): 9.0, (explain_cost.OTHER, False): 3.0}


def test_a_call_that_shows_no_inside_is_counted():
  times = explain_cost.by_part(PROGRAM, {'call.1': 3.0, 'dot.1': 1.0})
  assert times == {('router', False): 3.0, (explain_cost.OTHER, False): 1.0}


def test_shares_scale_to_the_step():
  times = {
    ('router', False): 1.0,
    ('router', True): 2.0,
    ('experts', False): 5.0,
  }
  # A step of 3 s has 8 s of work, which overlaps, and 1 s of waiting for input.
  shares = explain_cost.shares_of_step(times, step_seconds=4.0, wait=1.0)
  assert shares == [
    ('router', 3 / 8, 6 / 8),
    ('experts', 15 / 8, 0.0),
    (explain_cost.OTHER, 0.0, 0.0),
    (explain_cost.INPUT, 1.0, 0.0),
  ]


@pytest.mark.slow
def test_the_command_prints_parts_that_sum_to_the_step(tmp_path):
  process = subprocess.run(
    [
      sys.executable,
      '-m',
      'moe_jax.analysis.explain_cost',
      '--config=configs/tiny_switch.py:runlocal',
      f'--config.data.source.python_stdlib.modules={MODULES}',
      '--steps=3',
    ],
    cwd=ROOT,
    # The profiler would load every installed plugin.
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'COLUMNS': '100',
    },
    capture_output=True,
    text=True,
    timeout=300,
    check=False,
  )
  assert process.returncode == 0, process.stderr
  step_ms = float(
    re.search(r'A training step takes ([\d.]+) ms', process.stdout)[1]
  )
  rows = re.findall(r'│ (\D+?) +│.* ([\d.]+) │ +([\d.]+)% │', process.stdout)
  part_ms = {name: float(ms) for name, ms, _ in rows}
  scopes = {'router', 'experts', 'attention', 'norms'}
  assert scopes | {explain_cost.OTHER, explain_cost.INPUT} <= set(part_ms)
  assert part_ms['router'] > 0 and part_ms['experts'] > 0
  # Parts are rounded to 0.01 ms, the step to 0.1 ms.
  assert sum(part_ms.values()) == pytest.approx(
    step_ms, abs=0.05 + 0.005 * len(rows)
  )
