"""The weight of Switch's balance loss: what it evens, and what it costs.

    python -m experiments.switch_balance --preset=quick

Switch Transformers (https://arxiv.org/abs/2101.03961), Section 2.2: the weight
of the balance loss was swept in powers of ten; 0.01 evened loads quickly and
did not interfere with the training loss. Less than 1 % of the tokens were
dropped in typical runs. The paper has no table of the sweep.

Here: decoders of bytes of two layers, both sparse with 16 experts, and their
dense twin. Rows are trained and evaluated with 1.25 slots a token, or with room
for all tokens, which tells what a balance loss costs by itself from what it
saves by fewer drops. The whole batch is one group. The optimizer is AdamW,
unlike in the paper, and rates are searched for each row. That a weight of 0.01
costs nothing is judged by 0.02 nats a byte, about what five paired seeds
resolve.

The quick preset decides nothing. The full preset, 8 arms, 5 seeds and 600
steps, and 64 trials of 180, took 44 of its planned 50 core minutes. The claims
were written before any run.
"""

from experiments.study import byte_models, command, parts
from experiments.study.byte_models import top_k
from experiments.study.parts import Arm, Claim, Column, Figure, Preset
from experiments.study.study import Study

HIDDEN = 256
WITH_DROPS, WITHOUT = (0.0, 0.001, 0.01, 0.1), (0.0, 0.01, 1.0)
DROPPED, MAX = 'dropped in training', 'max/mean load'
CAPACITY, SAME = 1.25, 0.02


def config(steps: int):
  """The config that the rows share."""
  config = byte_models.decoder(steps, hidden=HIDDEN, num_experts=16)
  moe = config.model.moe
  moe.capacity.update(kind='per_token', per_token={'factor': CAPACITY})
  moe.router.token_choice.z_weight = 0.0
  return config


def row(weight: float, drops: bool = True) -> str:
  """The name of the row of a weight, trained with drops or without any."""
  return f'weight {weight:g}' + ', no drops' * (not drops)


def arms(_: Preset) -> list[Arm]:
  """The dense twin, and an arm for each weight, with drops and without."""
  key = 'router.token_choice.balance_weight'
  return [
    byte_models.dense(),
    *(top_k(row(w), 1, HIDDEN, {key: w}) for w in WITH_DROPS),
    *(
      top_k(row(w, drops=False), 1, HIDDEN, {key: w, **byte_models.ROOM})
      for w in WITHOUT
    ),
  ]


NONE, USUAL = row(0), row(0.01)
ALONE = row(0, drops=False)
STUDY = Study(
  name='switch_balance',
  title="The weight of Switch's balance loss",
  source='Switch Transformers, Section 2.2',
  config=config,
  arms=arms,
  presets={'quick': parts.trial(100, 3), 'full': Preset(600, 5)},
  columns=[
    byte_models.LOSS,
    parts.percent(DROPPED, 'train/drop_rate'),
    Column(MAX, byte_models.MAX_LOAD, digits=2),
  ],
  claims={
    'a weight of 0.01 drops less than 1 % of the tokens': Claim(
      f'{DROPPED}: {USUAL} < 1', ['switch2021/drops/typical/dropped']
    ),
    'a weight of 0.01 keeps loads below the capacity': (
      f'{MAX}: {USUAL} < {CAPACITY}'
    ),
    'a weight of 0.01 lowers the loss': f'loss: {USUAL} < {NONE}',
    'a weight of 0.001 lowers the loss': f'loss: {row(0.001)} < {NONE}',
    'a weight of 0.1 is worse than one of 0.01': (
      f'loss: {row(0.1)} > {USUAL}'
    ),
    'without drops, a weight of 0.01 costs nothing': (
      f'loss: {row(0.01, drops=False)} = {ALONE} within {SAME}'
    ),
    'without drops, a weight of 1 costs quality': (
      f'loss: {row(1, drops=False)} > {ALONE}'
    ),
  },
  gates={
    f'loss: {USUAL} < dense': ['*lowers*', '*is worse*'],
    f'loss: {ALONE} < dense': ['without drops*'],
  },
  rates=(0.002, 0.004, 0.008, 0.016),
  figure=Figure(['loss', DROPPED, MAX]),
  remarks='Loads are those of validation batches.',
  written='2026-12-01',
)
get_config, get_items = command.entries(STUDY, __name__)
