"""Soft MoE against token choice and expert choice, in an encoder.

    python -m experiments.soft_moe --preset=quick

Soft MoE (https://arxiv.org/abs/2308.00951): each slot of an expert is a mixture
of all tokens of an example, each output a mixture of all slots, so that nothing
is dropped or uneven. At equal slots it beats token choice and expert choice on
images, and with more experts at a fixed number of slots it is better in the
same time. Directions alone are tested, as its numbers could not be verified.

Here: an encoder-decoder of bytes that is sparse in both layers of its encoder,
and there alone. It reads a key, and its decoder has to know the key's value by
heart, so that the encoder matters. A row is one key, six letters and an end in
eight places, so that a mixture of all tokens of a row is one of an example.
Soft mixtures have 8 slots a row, 2,048 in a batch of 256 rows. The choices are
made in the whole batch, as in their papers, and its 1,792 tokens, without
padding, fill slots: expert choice (EC) fills 1,792 with a factor of 1, and
2,048 with 1.14, as here; top-1 fills at most 1,792 of 2,048, and is served as
in V-MoE (https://arxiv.org/abs/2106.05974), by priority; unlike there, it has
Switch's balance loss and no noise. Arms of 8 experts have equally many
parameters; the products of mixtures, a sixteenth of the experts' own, come on
top. Unlike in the paper, no arm has more experts than a row has slots.

The full preset, 5 arms, 8 seeds and 1,000 steps, and 40 trials of 750, is
planned for 115 core minutes and took 124, beside other work, over the cap of
120; the quick one has hardly begun to learn. Claims were written before a loss
of soft mixtures or EC was seen on this task, and after four single runs: the
dense twin's loss was 1.20 nats after 1,000 steps with relative positions, and
0.11 with learned ones, falling from some 350 steps on; that of top-1 was 0.10
after 800 steps, and 2.15 after 700 at a higher rate. Much longer runs would
reach the floor of 0.02, below which no arm is judged.
"""

import numpy as np

from experiments.study import byte_models, command, parts, routing
from experiments.study.byte_models import expert_choice, top_k
from experiments.study.parts import Arm, Figure, Preset
from experiments.study.study import Study
from experiments.study.tasks import PREFIX_TASKS, Task
from moe_jax.layers.routers.contract import ROUTING, SOWN, sown
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

HIDDEN, SLOTS = 128, 8
TOP1, EC, FEWER, SOFT = 'top-1 of 8', 'EC of 8', 'soft, 4', 'soft, 8'
SHARE = 'largest share'
FLOOR = 0.02  # nats a token
ONE_KEY = {
  'data.pack': False,
  'data.seq_len': SLOTS,
  'data.target_len': 5,  # a value and its end
  'batch_size': 256,
  'model.positions.kind': 'learned',
}


def config(steps: int):
  """The config that the rows share; its encoder alone is sparse."""
  config = byte_models.sparse_encoder(steps, hidden=HIDDEN)
  config.model.moe.router.token_choice.z_weight = 0.0
  return config


def soft(E: int) -> Arm:
  """The arm of Soft MoE with E experts and all slots of a row among them."""
  moe = {
    'num_experts': E,
    'group_size': 0,
    'router.kind': 'soft',
    'router.soft.slots_per_expert': SLOTS // E,
    'capacity.kind': 'all',
    'dispatch.kind': 'einsum',
  }
  return byte_models.of_moe(f'soft, {E}', moe, 'soft', E)


def arms(_: Preset) -> list[Arm]:
  """The dense twin, both kinds of choice, and soft mixtures of E experts."""
  factor, priority = 'capacity.per_token.factor', 'token_choice.slot_priority'
  served = {'capacity.kind': 'per_token', factor: 1.0}
  served[f'router.{priority}'] = 'batch_priority'
  # Of 292 slots an expert fills 7/8, 256, since an eighth of a row is padding.
  chosen = {factor: 1.14, 'router.expert_choice.z_weight': 0.0}
  return [
    byte_models.dense(),
    top_k(TOP1, 1, HIDDEN, served),
    expert_choice(EC, 1, HIDDEN, chosen),
    *map(soft, (4, 8)),
  ]


def measure(run: Run, state: TrainState) -> dict[str, float]:
  """The largest share of a token in a slot, a mean over slots and rows."""
  if not run.options.model.moe.router.mixes:
    return {}
  (batch,) = routing.batches(run, 1)
  inputs, variables = run.model.inputs(batch), run.programs.variables(state)
  _, kept = run.model.apply(variables, **inputs, mutable=[SOWN])
  layers = map(sown, run.model.stacks.layer_trees(kept[SOWN]))
  largest = [x[ROUTING].share.max(1).mean() for x in layers if ROUTING in x]
  return {f'routing/all/{SHARE}': float(np.mean(largest))}


STUDY = Study(
  name='soft_moe',
  title='Soft mixtures against choices, in an encoder',
  source='Soft MoE (directions alone)',
  config=config,
  arms=arms,
  presets={'quick': parts.trial(100, 3, [FEWER]), 'full': Preset(1000, 8)},
  columns=[
    byte_models.TOKEN_LOSS,
    parts.percent('without expert', byte_models.DROP_RATE, bounds=parts.ANY),
    parts.percent(SHARE, f'routing/*/{SHARE}', '% of a slot'),
  ],
  claims={
    'soft mixtures beat token choice': f'loss: {SOFT} < {TOP1}',
    'soft mixtures beat expert choice': f'loss: {SOFT} < {EC}',
    'more experts help: 8 against 4': f'loss: {SOFT} < {FEWER}',
    'expert choice beats token choice': f'loss: {EC} < {TOP1}',
    # A plain mean of seven tokens has 14.3 % of each.
    'a token has over twice the share of a mean': f'{SHARE}: {SOFT} > 28.6',
  },
  timed=[FEWER, SOFT, TOP1, EC],
  measure=measure,
  gates={
    f'loss: {TOP1} < dense': ['*token choice'],
    f'loss: {EC} < dense': ['*expert choice*'],
    f'loss: {SOFT} < dense': ['more experts help*'],
    f'loss: {TOP1} > {FLOOR}': ['*token choice'],
    f'loss: {EC} > {FLOOR}': ['*expert choice*'],
    f'loss: {SOFT} > {FLOOR}': ['soft mixtures*', 'more experts help*'],
    f'loss: {FEWER} > {FLOOR}': ['more experts help*'],
  },
  rates=(0.001, 0.002, 0.004, 0.008),
  trial_share=0.75,
  figure=Figure(['loss'], 'experts', log_x=True),
  remarks='Tokens without an expert are dropped, or taken by no expert.',
  tasks={
    'kv_recall': Task(
      {**PREFIX_TASKS['kv_recall'].overrides, **ONE_KEY},
      'synthetic: KV-RECALL, an encoder reads one of 2048 keys, a decoder '
      'knows its value by heart',
    )
  },
  earlier=[
    'Until 2026-12-02 the task was span corruption of program text, without a '
    'search of rates. No sparse row was resolved better than the dense twin: '
    'soft mixtures of 16 experts were 0.003 ± 0.016 nats a token ahead, and '
    'six claims were withheld. Two were taken out: that soft mixtures beat a '
    'token choice that drops nothing, and that 16 experts beat 4. That they '
    'beat the dense twin is a gate now.'
  ],
  written='2026-12-02',
)
get_config, get_items = command.entries(STUDY, __name__)
