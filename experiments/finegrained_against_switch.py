"""Fine-grained experts with a shared one against Switch, at equal FLOPs.

    python -m experiments.finegrained_against_switch --preset=quick

DeepSeekMoE (https://arxiv.org/abs/2401.06066), its comparison of models of 2B
parameters: experts cut into smaller ones, of which more are chosen, and shared
experts beside them have a loss of 1.808 nats a token on the Pile, Switch 1.881,
a dense model 2.060. These numbers are from a secondary source.

Here: `configs/tiny_switch.py` against `configs/tiny_finegrained.py`, whose
docstring tells how their FLOPs are equal; in the paper DeepSeekMoE has half as
many again as Switch and the dense model (see `deepseek_table1`). The two differ
in more than the cut: gates are sigmoids that sum to 2.5, a bias balances loads,
and no token is dropped. Of these only drops have an arm of their own, so that
the claims are about the designs as a whole. The claims were committed after
seven runs of the preset `quick`, unchanged. The full preset has 600 steps
instead of the 800 of `tiny_switch`, so that 4 arms on 5 seeds were planned
for 25 minutes on two idle cores; their runs took 147 core minutes, beside other
work.
"""

from experiments.study import byte_models, command
from experiments.study.parts import Arm, Claim, Column, Figure, Preset
from experiments.study.study import Study
from moe_jax.config import difference
from moe_jax.configs import tiny_finegrained, tiny_switch


def config(steps: int):
  """The config `tiny_switch` with so many steps, evaluated at its end."""
  config = tiny_switch.get_config().unlock()
  byte_models.shorten(config, steps)
  config.evals = {byte_models.EVAL: byte_models.evaluation()}
  return config


def arms(_: Preset) -> list[Arm]:
  """Both configs, their dense twin, and Switch with room for every token."""
  whole = tiny_switch.get_config(), tiny_finegrained.get_config()
  changes = {key: new for key, (_, new) in difference(*whole).items()}
  return [
    byte_models.dense(),
    Arm('Switch', {}),
    Arm('Switch without drops', byte_models.DROPLESS),
    Arm('fine-grained', changes),
  ]


def cells(*rows: str) -> list[str]:
  """Addresses of published losses."""
  return [f'deepseekmoe2024/comparison_2b/{row}/pile_loss' for row in rows]


EQUAL = 'In the paper DeepSeekMoE has half as many FLOPs again as the other.'
STUDY = Study(
  name='finegrained_against_switch',
  title='Fine-grained experts against Switch',
  source='DeepSeekMoE, models of 2B parameters',
  config=config,
  arms=arms,
  presets={'quick': Preset(150, 3), 'full': Preset(600, 5)},
  columns=[
    byte_models.LOSS,
    Column('dropped', byte_models.DROP_RATE),
    Column('largest load', byte_models.MAX_LOAD, 'x mean', 2),
  ],
  claims={
    'fine-grained experts are better than those of Switch': Claim(
      'loss: fine-grained < Switch', cells('DeepSeekMoE', 'Switch'), EQUAL
    ),
    'they are better than those of a Switch that serves all tokens': (
      'loss: fine-grained < Switch without drops'
    ),
    'they are better than the dense twin': Claim(
      'loss: fine-grained < dense', cells('DeepSeekMoE', 'dense'), EQUAL
    ),
    'Switch is better than the dense twin': Claim(
      'loss: Switch < dense', cells('Switch', 'dense')
    ),
  },
  timed=['Switch', 'fine-grained'],
  gates={'loss: Switch without drops < dense': ['*']},
  figure=Figure(['loss', 'largest load']),
  remarks='FLOPs a token are equal but for the routers, of which the larger '
  'one takes 1.5 % more. Loads are relative to the mean of 8 experts or of 64.',
  written='2026-11-28',
)
get_config, get_items = command.entries(STUDY, __name__)
