"""Ever more experts at equal operations, and where returns turn.

    python -m experiments.shazeer_table8 --preset=quick

Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538), Table 8: between two
LSTMs, 32 to 131,072 experts, of which a token passes four. After an epoch of
100 billion words perplexity falls from 40.4 with 32 experts to 28.9 with 65,536
and is 29.2 with 131,072. After a tenth of the epoch it falls from 48.5 to 38.2
with 16,384, and is 39.8 with 131,072.

Here: the models of `shazeer_table7`, of width 48 on bytes, with 32, 128 and 512
experts of hidden width 96, and four LSTMs. As in the paper, many experts have
gates of two levels, here from 128 on; in `shazeer_table7` two levels were 0.006
± 0.006 nats a byte better than one at equal experts. Runs have all steps or a
quarter of them, the learning rate annealed over each. Experts have far fewer
tokens than there: with all steps 360,000 choices fall to each of 32, and 22,000
to each of 512; in a quarter 5,600, of which the paper's turn at 131,072 experts
has fifty times as many. Four LSTMs are deeper than a mixture, too. That 32
experts beat them in 2,000 steps was known from `shazeer_table7`: with all steps
it is the gate, and no claim. Rates are searched for each row.

The quick preset decides nothing. The full one, 8 arms of 1,400 or 350 steps, 5
seeds and 64 trials of half of these, took 87 core minutes, planned for 45. The
claims were written before any run.
"""

from experiments import shazeer_table7
from experiments.study import byte_models, command, parts
from experiments.study.parts import Arm, Claim, Figure, Preset
from experiments.study.study import Study

LSTM, FEW, MORE, MOST = '4xLSTM', 'MoE-32', 'MoE-128-h', 'MoE-512-h'
EXPERTS, BRANCHES = {FEW: 32, MORE: 128, MOST: 512}, 16
# The paper's rows that have other names than ours.
PAPER = {MORE: 'MoE-256-h', MOST: 'MoE-1024-h'}
MANY = 'In the paper 32, 256 and 1,024 experts.'
SHORT = ', a quarter of the steps'


def arms(preset: Preset) -> list[Arm]:
  """An arm for each model and length: 'MoE-32, a quarter of the steps'."""
  models = {LSTM: {'model.num_layers': 4, 'model.moe.layers': 'none'}}
  for name, E in EXPERTS.items():
    gates = {} if name == FEW else shazeer_table7.two_levels(BRANCHES)
    models[name] = {'model.moe.num_experts': E, **gates}
  short = shazeer_table7.config(preset.steps // 4)
  warmup_steps = short.optimizer.schedule.warmup_steps
  quarter = {
    'total_steps': short.total_steps,
    'optimizer.schedule.warmup_steps': warmup_steps,
  }
  return [
    Arm(name + end, {**keys, **length}, f'MoE{end}', EXPERTS.get(name))
    for end, length in (('', {}), (SHORT, quarter))
    for name, keys in models.items()
  ]


def claim(better: str, worse: str, end: str = '') -> parts.Claims:
  """A claim that one model has a lower loss than another, as in the paper.

  Args:
    better: Name of the model with the lower loss.
    worse: Name of the other.
    end: `SHORT` for shorter runs, where the paper has a tenth of an epoch.
  """
  rows = [f'table8/{PAPER.get(name, name)}' for name in (better, worse)]
  column = 'ppl_0.1_epoch' if end else 'ppl_1_epoch'
  compared = f'loss: {better}{end} < {worse}{end}'
  cells = [f'shazeer2017/{row}/{column}' for row in rows]
  return {f'{better} beats {worse}{end}': Claim(compared, cells, MANY)}


STUDY = Study(
  name='shazeer_table8',
  title='Ever more experts between LSTMs, by length of training',
  source='Shazeer et al. 2017, Table 8; -h is a router of two levels',
  config=shazeer_table7.config,
  arms=arms,
  presets={'quick': parts.trial(200, 3), 'full': Preset(1400, 5)},
  columns=[byte_models.LOSS],
  claims={
    **claim(MORE, FEW),
    **claim(MOST, MORE),
    **claim(FEW, LSTM, SHORT),
    **claim(MORE, FEW, SHORT),
    f'{MOST} is worse than {MORE}{SHORT}': Claim(
      f'loss: {MOST}{SHORT} > {MORE}{SHORT}',
      [f'shazeer2017/table8/MoE-{E}-h/ppl_0.1_epoch' for E in (131072, 16384)],
      'In the paper 131,072 and 16,384 experts.',
    ),
  },
  gates={
    f'loss: {FEW} < {LSTM}': [f'{MORE} beats {FEW}', f'{MOST} beats {MORE}'],
    f'loss: {FEW}{SHORT} < {LSTM}{SHORT}': [
      f'{MORE} beats {FEW}{SHORT}',
      f'{MOST} is worse*',
    ],
  },
  rates=(0.005, 0.01, 0.02, 0.04),
  trial_share=0.5,
  figure=Figure(['loss'], 'experts', log_x=True),
  remarks='Each model has the operations a step of two LSTMs and a mixture of '
  'four experts; only routers come on top.',
  written='2026-12-02',
)
get_config, get_items = command.entries(STUDY, __name__)
