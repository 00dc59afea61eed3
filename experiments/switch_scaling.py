"""Steps and seconds to the dense twin's loss, as experts are added.

    python -m experiments.switch_scaling --preset=quick

Switch Transformers (https://arxiv.org/abs/2101.03961), section 3.1: at equal
FLOPs a token more experts are better at every step, and 64 of them reach at 60k
steps what T5-Base has at 450k, 7.5 times as soon, in a seventh of the time.

Here: narrow byte-level decoders, every layer sparse and dropless. Each model is
trained to three lengths, the learning rate annealed over each, and the length
at which it would end at its twin's final loss is read from the lines between
those (loss over the logarithm of steps; below the shortest, beyond its line).
The ratio is to the twin's own steps: 0.5 is twice as soon. Seconds are that
ratio times the measured ratio of step times, on this machine. The gap opens
late: a ratio below 1 at a short length says little about a long one.

Found: the dense loss in 0.53 of the steps (top-2 of 64) to 0.72 (top-1 of 4),
and no time gained: a step of so narrow a model costs 1.4 to 2.2 dense ones on a
CPU.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from experiments import byte_models, study
from experiments.study import Arm, Claim, Column, Figure, Preset, Row, Study

# Experts and chosen ones; K of them have the dense twin's width together.
SWITCH = [(2, 1), (4, 1), (8, 1), (16, 1), (32, 1), (64, 1)]
TOP_2 = [(16, 2), (64, 2)]
LENGTHS = (0.3, 0.6, 1.0)  # of the dense twin's
DENSE = 'dense'
WIDTH, HIDDEN = 32, 128
STEPS, SECONDS = 'steps to dense loss', 'seconds to dense loss'


def config(steps: int):
  """What the rows share."""
  made = byte_models.decoder(steps, width=WIDTH, hidden=HIDDEN, num_layers=3)
  made.model.moe.capacity_rule = 'all'
  made.model.moe.dispatch = 'dropless'
  return made.lock()


def arms(preset: Preset) -> list[Arm]:
  """Each model at each length; the dense twin at the whole one."""
  made = [Arm(DENSE, {'model.moe.num_experts': 0})]
  for E, K in SWITCH + TOP_2:
    overrides = {
      'model.moe.num_experts': E,
      'model.moe.num_selected': K,
      'model.moe.hidden': HIDDEN // K,
      'model.moe.gates': 'raw' if K == 1 else 'renormalized',
    }
    for length in LENGTHS:
      steps = round(length * preset.steps)
      made.append(
        Arm(arm_name(E, K, length), {**overrides, 'total_steps': steps})
      )
  return made


def model_name(E: int, K: int) -> str:
  """Of a row."""
  return f'top-{K} of {E}'


def arm_name(E: int, K: int, length: float) -> str:
  """Of a run."""
  return f'{model_name(E, K)}, {length} of the steps'


def ratio_to(
  target: float, lengths: Sequence[float], losses: Sequence[float]
) -> float:
  """The length at which the loss would be `target`.

  Between the two lengths around it, or beyond the ends by the nearest two, a
  line over the logarithm of the length. NaN where the loss does not fall there.
  """
  logs = np.log(lengths)
  above = sum(loss > target for loss in losses)
  i = int(np.clip(above, 1, len(losses) - 1))
  slope = (losses[i] - losses[i - 1]) / (logs[i] - logs[i - 1])
  if not slope < 0:
    return float('nan')
  return float(np.exp(logs[i] + (target - losses[i]) / slope))


def rows(results: study.Results, times: Mapping[str, float]) -> list[Row]:
  """A model a row."""
  dense = STUDY.row_of(Arm(DENSE, {}), results)
  target = dense.values['loss']
  made = [Row(DENSE, {'loss': target, TIME: [1.0] * len(results[DENSE])})]
  for E, K in SWITCH + TOP_2:
    arms = [arm_name(E, K, length) for length in LENGTHS]
    if arms[-1] not in results:
      continue
    found = [STUDY.row_of(Arm(arm, {}), results).values for arm in arms]
    step = times[arms[-1]]
    ratios = [
      ratio_to(goal, LENGTHS, losses)
      for goal, *losses in zip(target, *(f['loss'] for f in found), strict=True)
    ]
    shorter, whole = (
      [mine - twin for mine, twin in zip(f['loss'], target, strict=True)]
      for f in (found[1], found[-1])
    )
    values = {
      'loss': found[-1]['loss'],
      'minus dense': whole,
      SHORT: shorter,
      STEPS: ratios,
      SECONDS: [ratio * step for ratio in ratios],
      TIME: [step] * len(ratios),
    }
    line = 'Switch' if K == 1 else f'top-{K}'
    made.append(Row(model_name(E, K), values, line, float(E)))
  return made


def absent(result: study.Result) -> float:
  """Of columns that `rows` fills."""
  del result
  return float('nan')


TIME = 'step time / dense'
SHORT = f'minus dense, at {LENGTHS[1]} of its steps'
NARROW = 'Their ratio is the inverse of the published speed-up.'
SPEEDUP = 'switch2021/scaling/64E'
STUDY = Study(
  name='switch_scaling',
  title='Steps and seconds to the dense loss, by number of experts',
  source='Switch Transformers, section 3.1 and Figure 4',
  config=config,
  arms=arms,
  presets={
    'quick': Preset(500, 2, without=[f'top-1 of {E},*' for E in (2, 8, 32)]),
    'full': Preset(2500, 3),
  },
  columns=[
    Column('loss', f'eval/{byte_models.EVAL}/loss', 'nats/byte'),
    Column('minus dense', absent, 'nats/byte'),
    Column(SHORT, absent, 'nats/byte'),
    Column(STEPS, absent, digits=2),
    Column(SECONDS, absent, digits=2),
    Column(TIME, absent, digits=2),
  ],
  claims=[
    Claim(
      '64 experts reach the dense loss in fewer steps',
      STEPS,
      model_name(64, 1),
      1.0,
      'lower',
      [f'{SPEEDUP}/step_speedup'],
      NARROW,
    ),
    Claim(
      '64 experts reach the dense loss in less time',
      SECONDS,
      model_name(64, 1),
      1.0,
      'lower',
      [f'{SPEEDUP}/time_speedup'],
      NARROW,
    ),
    Claim(
      'few experts help already',
      STEPS,
      model_name(4, 1),
      1.0,
      'lower',
    ),
    Claim(
      'more experts, lower loss: 16 against 4',
      'loss',
      model_name(16, 1),
      model_name(4, 1),
      'lower',
    ),
    Claim(
      'more experts, lower loss: 64 against 16',
      'loss',
      model_name(64, 1),
      model_name(16, 1),
      'lower',
    ),
    Claim(
      'below the dense loss at 0.6 of its steps',
      SHORT,
      model_name(64, 2),
      0.0,
      'lower',
      (),
      'An aim of ours; read off, not interpolated.',
    ),
  ],
  figure=Figure(['loss', STEPS, SECONDS], 'experts', log_x=True),
  rows=rows,
  remarks=(
    'The intervals of seconds are of seeds alone: the ratio of step times is '
    'one number, its quartiles above. No time is gained here because the step '
    'of a model of width 32 is made of small products: 64 experts have as many '
    'kernels to read and gradients to write, where the dense twin has one.'
  ),
  timed=[DENSE, *(arm_name(E, K, 1.0) for E, K in SWITCH + TOP_2)],
)
get_config, get_items = STUDY.get_config, STUDY.get_items

if __name__ == '__main__':
  study.main(STUDY)
