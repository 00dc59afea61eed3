"""A tenth of the usual initial variance: loss, and its spread over seeds.

    python -m experiments.switch_table3 --preset=quick

Switch Transformers (https://arxiv.org/abs/2101.03961), Table 3: kernels are
drawn from a truncated normal distribution of variance s / fan-in. With 32
experts, after 3,500 steps, the negative log perplexity of three seeds is -2.72
with a standard deviation of 0.01 at s = 0.1, and -3.60 with 0.68 at s = 1.

Here: decoders of bytes of two layers, both sparse with 32 experts, and their
dense twins, trained as in the paper: Adafactor, whose updates are relative to
the size of a kernel, embeddings of deviation 1, top-1 with a capacity factor of
1.25 (2 in evaluation), a balance loss of 0.01. The rate 0.01 is T5's, and the
raised one three times that. Unlike in the paper, the rate warms up and falls
over the run, which has a ninth of the steps. The spread is judged by each
seed's distance from the median loss of its row, paired by seed (the test of
Brown and Forsythe): it tells deviations apart that differ by a factor of about
three. A step that is not finite is left out.

Three seeds of the quick preset tell no spreads apart. The full preset, 8 arms,
8 seeds and 400 steps, was planned for 18 minutes on two idle cores; its runs
took 53 core minutes. The claims were written before any run.
"""

import numpy as np

from experiments.study import byte_models, command, parts
from experiments.study.parts import Arm, Claim, Column, Figure, Preset, Row
from experiments.study.study import Study

SCALES = {'1.0x': 1.0, '0.1x': 0.1}
RAISED = ', raised rate'
RATES = {'': 0.01, RAISED: 0.03}
MODELS = {'dense': {'model.moe.num_experts': 0}, 'sparse': {}}
DISTANCE = 'distance from the median'
# Text between model and rate in the names of rows of differences.
GAIN = ', 1.0x minus 0.1x'


def config(steps: int):
  """The config that the rows share."""
  config = byte_models.switch_decoder(steps, num_experts=32)
  config.max_nonfinite_steps = steps
  return config


def arms(_: Preset) -> list[Arm]:
  """An arm for each model, rate and scale: 'sparse, 0.1x, raised rate'."""
  scale, peak = 'model.numerics.init.scale', 'optimizer.learning_rate'
  return [
    Arm(f'{model}, {s}{rate}', {**changes, scale: SCALES[s], peak: RATES[rate]})
    for model, changes in MODELS.items()
    for rate in RATES
    for s in SCALES
  ]


def rows(results: parts.Results) -> list[Row]:
  """A row of each arm with its spread, and of what the scale is worth."""
  table, gains = {}, []
  for arm in results:
    row = STUDY.row_of(Arm(arm, {}), results)
    losses = np.array(row.values['loss'])
    distance = np.abs(losses - np.median(losses)).tolist()
    table[arm] = row.plus({DISTANCE: distance})
  for model in MODELS:
    for rate in RATES:
      names = [f'{model}, {scale}{rate}' for scale in SCALES]
      if table.keys() >= {*names}:
        usual, small = (table[name].values['loss'] for name in names)
        gain = {'loss': np.subtract(usual, small).tolist()}
        gains.append(Row(f'{model}{GAIN}{rate}', gain, difference=True))
  return [*table.values(), *gains]


def claims() -> parts.Claims:
  """The paper's claims at both rates, and ours about the dense twin."""
  paper_claims = {}
  for rate in RATES:
    small, usual = f'sparse, 0.1x{rate}', f'sparse, 1.0x{rate}'
    for text, column, cell in (
      ('0.1x has a lower loss', 'loss', 'nlp'),
      ('0.1x has less spread', DISTANCE, 'sd'),
    ):
      cells = [f'switch2021/table3/{s}/{cell}' for s in ('0.1x', '1.0x')]
      compared = f'{column}: {small} < {usual}'
      paper_claims[text + rate] = Claim(compared, cells)
    text = f'the smaller scale is worth more to the sparse model{rate}'
    paper_claims[text] = f'loss: dense{GAIN}{rate} < sparse{GAIN}{rate}'
  return {
    **paper_claims,
    'the dense model has a lower loss at 0.1x, too, at the raised rate': (
      f'loss: dense, 0.1x{RAISED} < dense, 1.0x{RAISED}'
    ),
    'sparse beats dense at 0.1x': 'loss: sparse, 0.1x < dense, 0.1x',
    'at 1.0x the raised rate spreads sparse runs more': (
      f'{DISTANCE}: sparse, 1.0x < sparse, 1.0x{RAISED}'
    ),
  }


STUDY = Study(
  name='switch_table3',
  title='A tenth of the usual initial variance',
  source='Switch Transformers, Table 3 (negative log perplexity: higher is '
  'better there)',
  config=config,
  arms=arms,
  rows=rows,
  presets={
    'quick': Preset(
      100, 3, underpowered='three seeds of 100 steps tell no spreads apart'
    ),
    'full': Preset(400, 8),
  },
  columns=[
    byte_models.LOSS,
    Column(DISTANCE, unit='nats/byte', bounds=parts.POSITIVE),
    parts.percent('dropped in training', 'train/drop_rate'),
  ],
  claims=claims(),
  gates={
    'loss: sparse, 1.0x < dense, 1.0x': [
      '0.1x has*',
      'the smaller scale*',
      'at 1.0x*',
    ]
  },
  figure=Figure(['loss', DISTANCE], without=['*minus*']),
  remarks="The distance is that of a seed's loss from the median of its row, "
  'the mean of which measures the spread. Rows of differences are paired by '
  'seed.',
  written='2026-11-29',
)
get_config, get_items = command.entries(STUDY, __name__)
