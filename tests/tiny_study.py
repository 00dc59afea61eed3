"""Studies of seconds; `python -m tests.tiny_study` runs the dense one."""

import dataclasses
import types

import jax
import numpy as np

from experiments.study import command
from experiments.study.parts import Arm, Claim, Column, Figure, Preset
from experiments.study.study import Study
from moe_jax.config import merge
from moe_jax.data import PackedRows
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
  """A dense model, and a sparse one with two weights of its balance loss."""
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
  claims={
    'little is better': 'loss: little < much',
    'sparse is better': Claim(
      'loss: little < dense', ['hash2021/reddit/Hash/ppl']
    ),
  },
  figure=Figure(['loss', 'balance'], 'weight', log_x=True),
)

# The same study of models that compile in no time and train as any other.
DENSE = dataclasses.replace(
  STUDY,
  name='dense_study',
  config=lambda steps: merge(config(steps), {'model': tiny.ONE_LAYER}),
  arms=lambda preset: [
    Arm(name, {'optimizer.learning_rate': rate}, 'rate', rate)
    for name, rate in {'slow': 1e-4, 'fast': 1e-3, 'faster': 1e-2}.items()
  ],
  columns=STUDY.columns[:1],
  claims={'a higher rate is better': 'loss: faster < slow'},
  figure=Figure(['loss'], 'rate', log_x=True),
)


def measured_run(moe, starts, stream, seq_len):
  """A run and its state, as a study's `measure` gets them.

  Parameters are larger than initial ones, since experts have to differ for what
  is measured to show. Documents of the stream begin at `starts`.
  """
  moe = {'layers': 'all', **moe}
  options = tiny.options(
    data={'seq_len': seq_len}, model={'num_layers': 1, 'moe': moe}
  )
  rows = PackedRows(stream, np.array(starts), seq_len)
  run = types.SimpleNamespace(
    options=options,
    model=tiny.model_of(options),
    dataset=types.SimpleNamespace(splits={'validation': rows}, vocab_size=257),
    programs=types.SimpleNamespace(variables=lambda state: {'params': state}),
  )
  return run, jax.tree.map(lambda x: 3 * x, tiny.params_of(options))


if __name__ == '__main__':
  command.main(DENSE)
