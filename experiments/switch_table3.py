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

import dataclasses

import numpy as np

from experiments.study import byte_models, command, finetuned, parts
from experiments.study.parts import Arm, Claim, Column, Figure, Preset, Row
from experiments.study.study import Study

SCALES = {'1.0x': 1.0, '0.1x': 0.1}
RATES = {'': 0.01, ', raised rate': 0.03}
MODELS = {'dense': {'model.moe.num_experts': 0}, 'sparse': {}}
DISTANCE = 'distance from the median'


def arm_name(model: str, scale: str, rate: str = '') -> str:
  """The name of a row: 'sparse, 0.1x, raised rate'."""
  return f'{model}, {scale}{rate}'


def gain(model: str, rate: str = '') -> str:
  """The name of the row of 1.0x minus 0.1x of a model."""
  return f'{model}, 1.0x minus 0.1x{rate}'


def config(steps: int):
  """The config that the rows share."""
  config = byte_models.switch_decoder(steps, num_layers=2, num_experts=32)
  config.max_nonfinite_steps = steps
  return config


def arms(_: Preset) -> list[Arm]:
  """An arm for each model, rate and scale of the initialisation."""
  return [
    Arm(
      arm_name(model, scale, rate),
      {
        **changes,
        'model.numerics.init.scale': value,
        'optimizer.learning_rate': peak,
      },
    )
    for model, changes in MODELS.items()
    for rate, peak in RATES.items()
    for scale, value in SCALES.items()
  ]


def rows(results: parts.Results) -> list[Row]:
  """A row of each arm with its spread, and of what the scale is worth."""
  by_name = {}
  for name in results:
    row = STUDY.row_of(Arm(name, {}), results)
    losses = np.array(row.values['loss'])
    distance = np.abs(losses - np.median(losses)).tolist()
    values = {**row.values, DISTANCE: distance}
    by_name[name] = dataclasses.replace(row, values=values)
  gains = []
  for model in MODELS:
    for rate in RATES:
      usual, small = (by_name.get(arm_name(model, s, rate)) for s in SCALES)
      if usual and small:
        difference = finetuned.minus(gain(model, rate), usual, small)
        only = {'loss': difference.values['loss']}
        gains.append(dataclasses.replace(difference, values=only))
  return [*by_name.values(), *gains]


def claim(
  text: str, column: str, smaller: str, larger: str, published: str = ''
) -> Claim:
  """A claim that one row's number is below another's.

  Args:
    text: Text of the claim.
    column: Name of the column.
    smaller: Name of the row with the smaller number.
    larger: Name of the other row.
    published: Name of the paper's column, of both scales; '' where it has none.
  """
  cells = [f'switch2021/table3/{s}/{published}' for s in ('0.1x', '1.0x')]
  cells = cells if published else []
  return Claim(text, f'{column}: {smaller} < {larger}', cells)


def claims() -> list[Claim]:
  """The paper's claims at both rates, and ours about the dense twin."""
  paper_claims = []
  for rate in RATES:
    small, usual = (arm_name('sparse', s, rate) for s in ('0.1x', '1.0x'))
    paper_claims += [
      claim(f'0.1x has a lower loss{rate}', 'loss', small, usual, 'nlp'),
      claim(f'0.1x has less spread{rate}', DISTANCE, small, usual, 'sd'),
      claim(
        f'the smaller scale is worth more to the sparse model{rate}',
        'loss',
        gain('dense', rate),
        gain('sparse', rate),
      ),
    ]
  raised = ', raised rate'
  return [
    *paper_claims,
    claim(
      'the dense model has a lower loss at 0.1x, too, at the raised rate',
      'loss',
      arm_name('dense', '0.1x', raised),
      arm_name('dense', '1.0x', raised),
    ),
    claim(
      'sparse beats dense at 0.1x',
      'loss',
      arm_name('sparse', '0.1x'),
      arm_name('dense', '0.1x'),
    ),
    claim(
      'at 1.0x the raised rate spreads sparse runs more',
      DISTANCE,
      arm_name('sparse', '1.0x'),
      arm_name('sparse', '1.0x', raised),
    ),
  ]


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
  figure=Figure(['loss', DISTANCE], without=['*minus*']),
  remarks=(
    "The distance is that of a seed's loss from the median of its row, the "
    'mean of which measures the spread. Rows of differences are paired by '
    'seed.'
  ),
  written='2026-11-29',
)
get_config, get_items = STUDY.get_config, STUDY.get_items

if __name__ == '__main__':
  command.main(STUDY)
