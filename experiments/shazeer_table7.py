"""More experts at equal operations, between two LSTMs.

    python -m experiments.shazeer_table7 --preset=quick

Shazeer et al. 2017 (https://arxiv.org/abs/1701.06538), Table 7: models of 8.4
to 8.9 million operations a step on the 1-billion-word benchmark. After ten
epochs those without sparsity have a perplexity of 45.0 to 46.1, four experts
(of which all are used) among them; 32 experts have 39.7 and 256 have 35.7. Two
levels of gates cost little: 36.0.

Here: models of width 48 on bytes, with experts of hidden width 96. Proportions
are the paper's: a mixture has the operations of two LSTMs, and the 4 experts of
a token together have those of one that is four times as wide, or as deep. There
are fewer experts, as there is less text: the embedded corpus, in one pass or
less. Dropout is off.

Found, on the five seeds of `full`: 32 experts have a loss 0.06 nats a byte
below that of four LSTMs, 0.09 below four experts, 0.10 below one wide and 0.11
below one deep expert. Four experts and one wide expert do not differ by a
resolved amount. Two levels of gates cost nothing here: their loss is 0.006
below that of one level.
"""

from collections.abc import Mapping
from typing import Any

from experiments.study import byte_models, command
from experiments.study.parts import Arm, Claim, Column, Figure, Preset
from experiments.study.study import Study
from moe_jax.configs import base, shazeer_lstm

EXPERTS = (4, 16, 32)
TWO_LEVELS = 'MoE-32-h'


def config(steps: int):
  """The config that the rows share: the paper's, narrower and shorter."""
  config = shazeer_lstm.get_config('MoE-32')
  config.model.update(width=48, dropout=0.0)
  config.model.lstm.unroll = 4
  config.model.moe.expert.hidden = 96
  config.optimizer.learning_rate = 5e-3
  config.optimizer.schedule.update(kind='cosine', final_fraction=0.05)
  config.checkpoint = base.get_config().checkpoint
  byte_models.shorten(config, steps)
  config.sample.num_tokens = 0
  config.evals = {byte_models.EVAL: byte_models.evaluation()}
  return config


def two_levels(branching: int) -> dict[str, Any]:
  """The keys of noisy gates of two levels, with so many branches."""
  router = 'model.moe.router'
  options = dict(
    branching=branching,
    branches_selected=2,
    noisy=True,
    gates='renormalized',
    importance_weight=0.1,
    load_weight=0.1,
    z_weight=0.0,
  )
  keys = {f'{router}.hierarchical.{k}': v for k, v in options.items()}
  return {f'{router}.kind': 'hierarchical', **keys}


def arms(_: Preset) -> list[Arm]:
  """Arms of the paper's models without sparsity, then of its mixtures."""
  E = 'model.moe.num_experts'
  return [
    Arm('4xLSTM', {'model.num_layers': 4, 'model.moe.layers': 'none'}),
    Arm('MoE-1-Wide', {E: 0}),
    Arm('MoE-1-Deep', {E: 0, 'model.lstm.twin_depth': 4}),
    *(Arm(f'MoE-{n}', {E: n}, 'one level', n) for n in EXPERTS),
    Arm(TWO_LEVELS, two_levels(4), 'two levels', 32),
  ]


# The paper's rows that have other names than ours.
PAPER = {'4xLSTM': '4xLSTM-512', TWO_LEVELS: 'MoE-256-h'}


def claim(
  compared: str, paper: Mapping[str, str] = PAPER, note: str = ''
) -> Claim:
  """A claim on the losses of two rows, with those of the paper's table.

  Args:
    compared: Comparison of two rows, 'MoE-32 < MoE-4'.
    paper: The paper's names of rows that have other names than ours; they may
      have more experts.
    note: Difference between this comparison and the paper's.
  """
  rows = [paper.get(row, row) for row in compared.split()[::2]]
  cells = [f'shazeer2017/table7/{row}/ppl_10_epochs' for row in rows]
  return Claim(f'loss: {compared}', cells, note)


LARGEST = 'max/mean load'
FEWER = 'Here 32 experts are in 4 branches; in the paper, 256 are in 16.'
STUDY = Study(
  name='shazeer_table7',
  title='More experts at equal operations, between LSTMs',
  source='Shazeer et al. 2017, Table 7; -h is a router of two levels',
  config=config,
  arms=arms,
  presets={'quick': Preset(1000, 3), 'full': Preset(2000, 5)},
  columns=[
    byte_models.LOSS,
    Column(LARGEST, 'train/layer_*/load_max_over_mean', digits=2),
  ],
  claims={
    'more experts, lower loss: 32 against 4': claim('MoE-32 < MoE-4'),
    'experts beat more LSTMs': claim('MoE-32 < 4xLSTM'),
    'experts beat one that is wide': claim('MoE-32 < MoE-1-Wide'),
    'experts beat one that is deep': claim('MoE-32 < MoE-1-Deep'),
    'four of four are hardly more than one that is wide': claim(
      'MoE-4 < MoE-1-Wide'
    ),
    'two levels cost a little': claim(
      f'{TWO_LEVELS} > MoE-32', {**PAPER, 'MoE-32': 'MoE-256'}, FEWER
    ),
    'two levels of experts beat more LSTMs': claim(
      f'{TWO_LEVELS} < 4xLSTM', note=FEWER
    ),
    'more experts, lower loss: 16 against 4': 'loss: MoE-16 < MoE-4',
    'two levels balance too': Claim(
      f'{LARGEST}: {TWO_LEVELS} < 2',
      note='An aim of ours; 8 is the worst there can be.',
    ),
  },
  written='2026-11-25',
  figure=Figure(['loss', LARGEST], 'experts', log_x=True),
  remarks='Each model has the operations a step of two LSTMs and a mixture of '
  'four experts; only routers come on top.',
)
get_config, get_items = command.entries(STUDY, __name__)
