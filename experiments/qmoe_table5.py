"""Experts in few bits: rounding to the nearest value against GPTQ.

    python -m experiments.qmoe_table5 --preset=quick

QMoE (https://arxiv.org/abs/2310.16795), Table 5: Switch models whose experts
are quantised to 2 bits and to ternary values, {min, 0, max} of each output
unit. Rounding to the nearest value (RTN) costs 0.5 to 2.8 nats a token on the
smallest one, GPTQ 0.03 to 0.3, and most ternary weights are 0, so that codes of
16 bits for sequences of weights take less than a bit a weight. These numbers
are from a secondary source.

Here: a decoder of bytes, whose experts are quantised after training. Each arm
is the same trained run in another format, paired by seed. Data of GPTQ are
batches of the training split. Whether 8 bits lose nothing is judged by a bound
of 0.002 nats a byte, which was chosen before any result was seen. Experts are
narrow, so that the metadata of an output unit are a far larger part of the bits
a weight than in the paper.
"""

import functools
import pathlib
from collections.abc import Mapping

import numpy as np

from experiments.study import byte_models, command, parts, rates
from experiments.study.parts import Arm, Claim, Column, Figure, Preset, Row
from experiments.study.study import Study
from moe_jax.compression.quantize import quantize
from moe_jax.kernels.kernel_format import KernelFormat

TRAINED = 'trained'
# The bits of a weight by format, for the figure; QMoE calls ternary 1.5 bits.
FORMATS = {'int8': 8.0, 'int4': 4.0, 'int2': 2.0, 'ternary': 1.5}
SAME = 0.002
BATCHES = 16  # number of training batches that GPTQ reads
ADDED = Column('added loss', unit='nats/byte')
ZEROS = parts.percent('zeros', 'zeros', bounds=parts.ANY)
CODES = Column('codes', 'code bits', 'bits/weight', 2)
METADATA = Column('metadata', 'metadata bits', 'bits/weight', 2)


def config(steps: int):
  """The config of training: a decoder whose layers are all sparse."""
  return byte_models.decoder(steps, num_layers=4)


def quantized(
  run: pathlib.Path,
  new: pathlib.Path,
  *,
  format: str,
  method: str,
  batches: int,
) -> Mapping[str, float]:
  """Quantises the experts of a run, as a change of an arm."""
  kernel_format = KernelFormat(format)
  return quantize(run, new, kernel_format, method=method, num_batches=batches)


ARMS = [
  Arm(
    f'{method} {format}',
    {},
    line=method,
    x=bits,
    start=TRAINED,
    change=functools.partial(
      quantized, format=format, method=method.lower(), batches=BATCHES
    ),
  )
  for method in ('RTN', 'GPTQ')
  for format, bits in FORMATS.items()
]


def rows(results: parts.Results) -> list[Row]:
  """The trained run, and each way of quantising it."""
  loss = byte_models.LOSS
  before = [*map(loss.of, results[TRAINED])]
  table = [Row(TRAINED, {loss.name: before, ADDED.name: [0.0] * len(before)})]
  for arm in ARMS:
    columns = [loss, ZEROS, CODES, METADATA]
    row = parts.row_of(arm.name, results[arm.name], columns, arm.line, arm.x)
    added = np.subtract(row.values[loss.name], before).tolist()
    table.append(row.plus({ADDED.name: added}))
  return table


def published(*columns: str) -> list[str]:
  """Addresses of the losses of the paper's smallest model."""
  return [f'qmoe2023/c4_loss/base128/{column}' for column in columns]


CLAIMS = {
  'GPTQ is better than RTN at 2 bits': Claim(
    'loss: GPTQ int2 < RTN int2', published('qmoe_2bit', 'rtn_2bit')
  ),
  'GPTQ is better than RTN with ternary values': Claim(
    'loss: GPTQ ternary < RTN ternary', published('qmoe_ternary', 'rtn_ternary')
  ),
  'with GPTQ, ternary values are worse than 2 bits': Claim(
    'loss: GPTQ ternary > GPTQ int2', published('qmoe_ternary', 'qmoe_2bit')
  ),
  'with GPTQ, 2 bits are worse than the trained model': Claim(
    f'loss: GPTQ int2 > {TRAINED}', published('qmoe_2bit', 'bf16')
  ),
  'more ternary weights than weights of 2 bits are 0': Claim(
    'zeros: GPTQ ternary > GPTQ int2',
    [f'qmoe2023/size/base128/{n}' for n in ('zeros_ternary', 'zeros_2bit')],
  ),
  'GPTQ is better than RTN at 4 bits': 'loss: GPTQ int4 < RTN int4',
  **{
    f'8 bits lose nothing with {x}': f'loss: {x} int8 = {TRAINED} within {SAME}'
    for x in ('RTN', 'GPTQ')
  },
}
STUDY = Study(
  name='qmoe_table5',
  title='Experts in few bits, by rounding and by GPTQ',
  source='QMoE, Table 5',
  config=config,
  arms=lambda _: ARMS,
  rows=rows,
  starts=lambda _: [parts.Start(TRAINED)],
  presets={'quick': Preset(500, 3), 'full': Preset(2000, 5)},
  columns=[byte_models.LOSS, ADDED, ZEROS, CODES, METADATA],
  claims=CLAIMS,
  written='2026-11-27',
  exempt=rates.UNTRAINED,
  figure=Figure(['added loss', 'zeros'], 'bits', log_x=True),
  length=lambda preset: f'{preset.steps:,} steps, then quantised',
)
get_config, get_items = command.entries(STUDY, __name__)
