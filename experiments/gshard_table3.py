"""Experts times depth: what each adds where there is less or more of the other.

    python -m experiments.gshard_table3 --preset=quick

GShard (https://arxiv.org/abs/2006.16668), Table 3: translation models of 12 and
36 layers with 128, 512 or 2,048 experts in every second one. Three times the
layers gain 2.3, 3.7 and 3.0 BLEU. At 12 layers four times the experts gain 3.3,
and four times as many again 1.3.

Here: byte-level decoders of 2 and 4 layers with 4 or 16 experts, as wide as the
dense feed-forward, in every second layer, and a dense twin of each depth, on
text in 8 ciphers. Twice the layers are twice the sparse layers, too. Tokens are
served as in GShard, with two slots each in a group of the whole batch, and the
loss, which stands for BLEU, is evaluated without drops, which would otherwise
grow with the number of experts. Training may leak a little of later tokens.
Rates are searched for each row.

That 16 experts beat 4 in two layers is a gate and no claim: in an earlier study
on the same text they gained 0.049 nats a byte, and 32 gained nothing on 16, as
there are eight ciphers. More experts are therefore not here. The full preset, 6
arms of 600 steps, 5 seeds and 48 trials of 300, took 43 of its planned 45 core
minutes. The claims were written before any run.
"""

import numpy as np

from experiments.study import byte_models, command, parts
from experiments.study.parts import Arm, Claim, Figure, Preset, Row
from experiments.study.study import Study
from experiments.study.tasks import TASKS

# The paper has 32 times the experts, and 6 and 9 times the layers.
EXPERTS, LAYERS = {4: '128E', 16: '512E'}, {2: '12L', 4: '36L'}


def config(steps: int):
  """The config that the rows share."""
  config = byte_models.decoder(steps, hidden=128)
  config.model.moe.layers = 'every 2'
  byte_models.serve_as_gshard(config.model.moe)
  config.evals = {byte_models.EVAL: byte_models.no_drops()}
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


def gain(E: int) -> str:
  """Name of the row of what depth gains with so many experts."""
  return f'gain of depth, {E}E'


def rows(results: parts.Results) -> list[Row]:
  """A row of each arm, and of what more layers gain."""
  table = [STUDY.row_of(arm, results) for arm in arms(STUDY.presets['full'])]
  losses = {row.name: row.values['loss'] for row in table}
  for E in EXPERTS:
    gained = np.subtract(*(losses[named(E, L)] for L in LAYERS))
    table.append(Row(gain(E), {'loss': gained.tolist()}, difference=True))
  return table


def better(E: int, L: int, than: tuple[int, int]) -> parts.Claims:
  """A claim that a model has a lower loss than another, each E and L."""
  e, n = than
  cells = [
    f'gshard2020/table3/{EXPERTS[E]} {LAYERS[L]}/bleu',
    f'gshard2020/table3/{EXPERTS[e]} {LAYERS[n]}/bleu',
  ]
  text = f'{E} experts in {L} layers beat {e} in {n} layers'
  return {text: Claim(f'loss: {named(E, L)} < {named(*than)}', cells)}


DEEPER = 'depth gains more with 16 experts than with 4'
STUDY = Study(
  name='gshard_table3',
  title='Experts times depth',
  source='GShard, Table 3; 16E 4L is 16 experts in 4 layers',
  config=config,
  arms=arms,
  rows=rows,
  presets={'quick': parts.trial(100, 3), 'full': Preset(600, 5)},
  columns=[byte_models.LOSS],
  claims={
    **better(4, 4, (4, 2)),
    **better(16, 4, (16, 2)),
    **better(16, 4, (4, 4)),
    **better(16, 2, (4, 4)),
    DEEPER: Claim(
      f'loss: {gain(16)} > {gain(4)}',
      note='In the paper 3.7 BLEU with 512 experts, 2.3 with 128, and 3.0 with '
      '2,048.',
    ),
  },
  gates={
    f'loss: {named(16, 2)} < {named(4, 2)}': [DEEPER, '16*in 2 layers beat*'],
    **{
      f'loss: {named(16, L)} < {named(0, L)}': [f'*in {L} layers*', DEEPER]
      for L in LAYERS
    },
  },
  rates=(0.002, 0.004, 0.008, 0.016),
  trial_share=0.5,
  figure=Figure(['loss'], 'experts', log_x=True, without=['gain*']),
  remarks='Gains are paired by seed; training with experts may leak a little.',
  tasks={name: TASKS[name] for name in ('cipher', 'text')},
  written='2026-12-02',
)
get_config, get_items = command.entries(STUDY, __name__)
