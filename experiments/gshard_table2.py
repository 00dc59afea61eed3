"""Experts times depth: what each adds where there is less or more of the other.

    python -m experiments.gshard_table2 --preset=quick

GShard (https://arxiv.org/abs/2006.16668), Tables 2 and 3: translation models of
12 and 36 layers with 128, 512 or 2,048 experts in every second one. Three times
the layers gain 2.3, 3.7 and 3.0 BLEU. At 12 layers four times the experts gain
3.3, and four times as many again 1.3.

Here: byte-level decoders of 2 and 6 layers with 4, 16 or 64 experts, as wide as
a dense feed-forward, in every second layer, and a dense twin of each depth, on
text in 8 ciphers, where experts help within few steps (`switch_table7`). Tokens
are served as in GShard, with two slots each in a group of the whole batch; as
models are causal here, routers may see a little of later tokens. The loss, at
equal steps, stands for BLEU. Rates are searched for each row. The full preset,
8 arms of 700 steps, 5 seeds and 64 trials, is planned for 45 core minutes.
"""

import numpy as np

from experiments.study import byte_models, command, parts
from experiments.study.parts import Arm, Claim, Figure, Preset, Row
from experiments.study.study import Study
from experiments.study.tasks import TASKS

# The paper has 32 times the experts and 6 times the layers.
EXPERTS, LAYERS = (4, 16, 64), (2, 6)
BLEU = 'gshard2020/table3/{}E {}L/bleu'
FOURFOLD = '128E to 512E', '512E to 2048E'
# A worse and a better model, each (E, L), by the paper's Table 3.
PAIRS = [
  *(((E, 2), (E, 6)) for E in EXPERTS),
  *(((E, L), (4 * E, L)) for L in LAYERS for E in (4, 16)),
  *(((4, 6), (E, 2)) for E in (16, 64)),
]
# Pairs with rows of their differences, by the names of these.
GAINS = {f'gain of depth, {E}E': ((E, 2), (E, 6)) for E in EXPERTS}
GAINS |= {f'gain of {4 * E}E, 2L': ((E, 2), (4 * E, 2)) for E in (4, 16)}


def config(steps: int):
  """The config that the rows share."""
  config = byte_models.decoder(steps, hidden=128)
  config.model.moe.layers = 'every 2'
  byte_models.serve_as_gshard(config.model.moe)
  return config


def named(E: int, L: int) -> str:
  """Name of the row of a number of experts, 0 for none, and of layers."""
  return f'GShard top-2, {E}E {L}L' if E else f'dense, {L}L'


def arms(_: Preset) -> list[Arm]:
  """An arm for each number of experts and of layers."""
  keys = 'model.moe.num_experts', 'model.num_layers'
  return [
    Arm(named(E, L), {keys[0]: E, keys[1]: L}, f'{L} layers', E or None)
    for L in LAYERS
    for E in (0, *EXPERTS)
  ]


def rows(results: parts.Results) -> list[Row]:
  """A row of each arm, and of what more layers or experts gain."""
  table = [STUDY.row_of(arm, results) for arm in arms(STUDY.presets['full'])]
  losses = {row.name: row.values['loss'] for row in table}
  for name, (worse, better) in GAINS.items():
    gain = np.subtract(losses[named(*worse)], losses[named(*better)])
    table.append(Row(name, {'loss': gain.tolist()}, difference=True))
  return table


STUDY = Study(
  name='gshard_table2',
  title='Experts times depth',
  source='GShard, Tables 2 and 3; 16E 6L is 16 experts in 6 layers',
  config=config,
  arms=arms,
  rows=rows,
  presets={'quick': parts.trial(100, 3), 'full': Preset(700, 5)},
  columns=[byte_models.LOSS],
  claims={
    **{
      f'{E} experts in {L} layers beat {e} in {n} layers': Claim(
        f'loss: {named(E, L)} < {named(e, n)}',
        [BLEU.format(32 * E, 6 * L), BLEU.format(32 * e, 6 * n)],
      )
      for (e, n), (E, L) in PAIRS
    },
    'in 2 layers the first fourfold of experts gains more than the next': Claim(
      'loss: gain of 16E, 2L > gain of 64E, 2L',
      [f'gshard2020/text/{x}, 12L/bleu_gain' for x in FOURFOLD],
    ),
    'depth gains more with 64 experts than with 4': Claim(
      'loss: gain of depth, 64E > gain of depth, 4E',
      note='In the paper 3.0 BLEU against 2.3.',
    ),
  },
  gates={
    f'loss: {named(16, L)} < {named(0, L)}': [f'*in {L} layers*', 'depth*']
    for L in LAYERS
  },
  rates=(0.002, 0.004, 0.008, 0.016),
  figure=Figure(['loss'], 'experts', log_x=True, without=['gain*']),
  remarks='Gains are paired by seed; rows with experts may leak a little.',
  tasks={name: TASKS[name] for name in ('cipher', 'text')},
  written='2026-12-02',
)
get_config, get_items = command.entries(STUDY, __name__)
