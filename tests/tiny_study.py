"""A study that takes seconds: `python -m tests.tiny_study`."""

from experiments.study import command
from experiments.study.parts import Arm, Claim, Column, Figure, Preset
from experiments.study.study import Study
from tests.training import tiny

EVAL = 'train_capacity'


def config(steps):
  """The config of `tests.training.tiny`, with few steps."""
  return tiny.config(
    total_steps=steps,
    batch_size=8,
    mesh={'data': -1},
    checkpoint={'every_steps': 0},
    evals={EVAL: {'every_steps': 0}},
  )


def arms(preset):
  """Two models, of which the second has two weights of its loss."""
  del preset
  weight = 'model.moe.router.token_choice.balance_weight'
  return [
    Arm('dense', {'model.moe.num_experts': 0}),
    Arm('little', {weight: 0.01}, 'sparse', 0.01),
    Arm('much', {weight: 0.5}, 'sparse', 0.5),
  ]


STUDY = Study(
  name='tiny_study',
  title='A question',
  source='No paper',
  config=config,
  arms=arms,
  presets={'quick': Preset(4, 2), 'full': Preset(6, 3)},
  columns=[
    Column('loss', f'eval/{EVAL}/loss', 'nats/byte'),
    Column('balance', f'eval/{EVAL}/layer_*/balance_loss'),
  ],
  claims=[
    Claim('little is better', 'loss: little < much'),
    Claim(
      'sparse is better', 'loss: little < dense', ['hash2021/reddit/Hash/ppl']
    ),
  ],
  figure=Figure(['loss', 'balance'], 'weight', log_x=True),
)

if __name__ == '__main__':
  command.main(STUDY)
