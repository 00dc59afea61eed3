"""Selective precision: float32, bfloat16, and bfloat16 with exact routers.

    python -m experiments.switch_table2 --preset=quick

Switch Transformers (https://arxiv.org/abs/2101.03961), Table 2: a model in
float32 has a negative log perplexity of -1.718, one in bfloat16 diverges to
-3.780, and with float32 inside of routers alone it is -1.716, as fast as
bfloat16.

Here: decoders of bytes of two layers, both sparse with 16 experts, trained as
in the paper, at three and ten times T5's learning rate. Parameters are stored
in float32 in all arms. In bfloat16 the residual stream and all products are of
that type, which a CPU emulates, and the router's input, kernel, logits and
gates are rounded to it (`jax.lax.reduce_precision`); the sums of its softmax
are not, so that ours rounds less than theirs. No speed is measured. Bytes are
counted: what the rows of tokens would take to their experts and back, in both
directions of a step, with an expert on each of 16 devices. Flipped choices are
the first choices of the trained model that change between float32 and another
precision, whatever it was trained in. That two rows are alike is judged by 0.02
nats a byte, which was planned as twice what five seeds resolve; they resolve
0.011 at the lower rate and 0.020 at the higher.

The quick preset decides nothing. The full preset, 6 arms, 5 seeds and 400
steps, was planned for 18 minutes on two idle cores; its runs took 58 core
minutes. The claims were written before any run.
"""

import numpy as np

from experiments.stmoe_tables2_4 import MEANING, STABILITY, stability, tolerant
from experiments.study import (
  byte_models,
  command,
  parts,
  router_logits,
  routing,
)
from experiments.study.jobs import nested
from experiments.study.parts import Arm, Claim, Column, Figure, Preset, Row
from experiments.study.study import Study
from moe_jax.analysis import counts, memory
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

E = 16
_DTYPE = 'numerics.dtype'
_ROUTER = 'moe.router.token_choice.logits_dtype'
EXACT, LOW, SELECTIVE = 'float32', 'bfloat16', 'selective'
# Each precision has its changes of the model and its published row.
PRECISIONS = {
  EXACT: {_DTYPE: 'float32', _ROUTER: 'float32'},
  LOW: {_DTYPE: 'bfloat16', _ROUTER: 'bfloat16'},
  SELECTIVE: {_DTYPE: 'bfloat16', _ROUTER: 'float32'},
}
PAPER = {EXACT: 'fp32', LOW: 'bf16', SELECTIVE: 'selective'}
RATES = {', rate 0.03': 0.03, ', rate 0.1': 0.1}
FIRST, LAST = RATES
SAME = 0.02
LOGIT, BYTES = 'largest logit', 'bytes moved'
FLIPPED = {LOW: 'flipped in bfloat16', SELECTIVE: 'flipped in selective'}
MORE, AFTER = 'flipped by the router', 'bfloat16 in evaluation alone'


def config(steps: int):
  """The config that the rows share, evaluated in every precision."""
  config = byte_models.switch_decoder(steps, num_experts=E)
  tolerant(config)
  for name, changes in PRECISIONS.items():
    slots = {'moe.capacity.per_token.factor': 2.0}
    config.evals[name] = byte_models.evaluation(**nested(changes | slots))
  return config


def arms(_: Preset) -> list[Arm]:
  """An arm for each precision and rate."""
  arms, key = [], 'optimizer.learning_rate'
  for rate, peak in RATES.items():
    for name, changes in PRECISIONS.items():
      overrides = {f'model.{key}': value for key, value in changes.items()}
      arms.append(Arm(name + rate, {**overrides, key: peak}))
  return arms


def measure(run: Run, state: TrainState) -> dict[str, float]:
  """Losses over the run, logits, flipped choices, and bytes that would move."""
  numbers = {**stability(run), **router_logits.rounding(run, state)}
  exact = routing.evaluation_of(run, EXACT).model
  for name in FLIPPED:
    other = routing.evaluation_of(run, name).model
    flipped = router_logits.changed(run, state, exact, other)
    numbers |= routing.named({i: {name: x} for i, x in flipped.items()})
  B, T = run.options.batch_size, run.options.data.seq_len
  (half,) = counts.halves(run.model, T)
  for layer in run.model.stacks.sparse_layers:
    # Two exchanges, and two more in the backward pass, of E devices.
    moved = 4 * E * memory.exchange_bytes(half, B, E) / (B * T)
    numbers[f'routing/layer_{layer}/moved'] = moved
  return numbers


def rows(results: parts.Results) -> list[Row]:
  """A row of each arm, with what the router adds and what evaluation does."""
  table = []
  for name, runs in results.items():
    row = STUDY.row_of(Arm(name, {}), results)
    flipped = [row.values[column] for column in FLIPPED.values()]
    low, exact = ([run[f'eval/{x}/loss'] for run in runs] for x in (LOW, EXACT))
    more = {MORE: np.subtract(*flipped), AFTER: np.subtract(low, exact)}
    table.append(row.plus({name: x.tolist() for name, x in more.items()}))
  return table


def claims() -> parts.Claims:
  """The paper's claims at both rates, and ours on what rounding does."""
  paper_claims = {}
  for rate in RATES:
    for text, sign, one, other in (
      ('bfloat16 is worse than float32', '>', LOW, EXACT),
      ('bfloat16 is worse than selective precision', '>', LOW, SELECTIVE),
      ('selective precision is as good as float32', '=', SELECTIVE, EXACT),
    ):
      within = f' within {SAME}' if sign == '=' else ''
      cells = [f'switch2021/table2/{PAPER[name]}/nlp' for name in (one, other)]
      compared = f'loss: {one}{rate} {sign} {other}{rate}{within}'
      paper_claims[text + rate] = Claim(compared, cells)
  return {
    **paper_claims,
    'a rounded router flips choices that the rest does not': (
      f'{MORE}: {EXACT}{FIRST} > 0'
    ),
    'a higher rate makes larger logits': (
      f'{LOGIT}: {EXACT}{LAST} > {EXACT}{FIRST}'
    ),
    'bfloat16 in evaluation alone costs': f'{AFTER}: {EXACT}{FIRST} > 0',
  }


STUDY = Study(
  name='switch_table2',
  title='Selective precision at raised rates',
  source='Switch Transformers, Table 2 (negative log perplexity: higher is '
  'better there)',
  config=config,
  arms=arms,
  rows=rows,
  presets={'quick': parts.trial(60, 3, [f'*{LAST}']), 'full': Preset(400, 5)},
  columns=[
    byte_models.LOSS,
    *STABILITY,
    Column(LOGIT, 'routing/*/largest_logit', '', 1, bounds=parts.POSITIVE),
    *(
      parts.percent(column, f'routing/*/{name}', '% of tokens', 2)
      for name, column in FLIPPED.items()
    ),
    Column(MORE, unit='% of tokens', digits=2),
    Column(AFTER, unit='nats/byte'),
    Column(BYTES, 'routing/*/moved', 'bytes a token and layer', 0),
  ],
  claims=claims(),
  measure=measure,
  figure=Figure(['loss', LOGIT, FLIPPED[LOW], FLIPPED[SELECTIVE]]),
  remarks=f'{MEANING} Flipped choices are means over layers, and those flipped '
  'by the router are the ones of bfloat16 less those of selective precision.',
  written='2026-11-29',
)
get_config, get_items = command.entries(STUDY, __name__)
