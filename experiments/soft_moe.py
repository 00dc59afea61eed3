"""Soft MoE against token choice and expert choice, in an encoder.

    python -m experiments.soft_moe --preset=quick

Soft MoE (https://arxiv.org/abs/2308.00951): each slot of an expert is a mixture
of all tokens, each output a mixture of all slots, so that nothing is dropped or
uneven. At equal slots it beats token choice and expert choice on images, and
with more experts at a fixed number of slots it is better in the same time. Its
numbers could not be verified, so that directions alone are tested.

Here: an encoder-decoder of bytes that is sparse in its encoder alone, trained
on span corruption; mixtures of all tokens are possible in an encoder alone. A
group is a row of 128 tokens. All arms have 128 slots a row, a slot a token: 4,
16 or 64 experts with 32, 8 or 2 slots each; expert choice (EC) takes each token
once on average. Token choice is V-MoE's, with a slot a token served by
priority; it also has a row that drops nothing. The products of Soft MoE's
router, with the parameters of every slot, come on top: they are a quarter of
the experts' own.

Three seeds of the quick preset have hardly begun to learn, and resolve large
differences alone. The full preset, 7 arms and 5 seeds, was planned for 20
minutes on two idle cores; its runs took 42 core minutes. The claims were
written before any run.
"""

from experiments.study import byte_models, command, parts
from experiments.study.byte_models import expert_choice, top_k
from experiments.study.parts import Arm, Column, Figure, Preset
from experiments.study.study import Study
from experiments.study.tasks import DENOISING_TASKS

HIDDEN, SLOTS, EXPERTS = 256, 128, (4, 16, 64)
TOP1, ROOMY = 'top-1 of 16', 'top-1 of 16, no drops'
EC = 'EC of 16'


def config(steps: int):
  """The config that the rows share; its groups are single rows."""
  config = byte_models.sparse_encoder(steps, hidden=HIDDEN, num_experts=16)
  config.data.pack = False  # a mixture would mix the examples of a row
  config.model.moe.update(group_size=0, layer_reduce='mean')
  config.model.moe.router.token_choice.z_weight = 0.0
  return config


def soft(E: int) -> Arm:
  """The arm of Soft MoE with E experts and all slots shared among them."""
  moe = {
    'num_experts': E,
    'router.kind': 'soft',
    'router.soft.slots_per_expert': SLOTS // E,
    'capacity.kind': 'all',
    'dispatch.kind': 'einsum',
  }
  return byte_models.of_moe(f'soft, {E}', moe, 'soft', E)


def arms(_: Preset) -> list[Arm]:
  """The dense twin, both kinds of choice, and soft mixtures of E experts."""
  slots = {'capacity.kind': 'per_token', 'capacity.per_token.factor': 1.0}
  priority = {'router.token_choice.slot_priority': 'batch_priority'}
  return [
    byte_models.dense(),
    top_k(TOP1, 1, HIDDEN, slots | priority),
    top_k(ROOMY, 1, HIDDEN, byte_models.ROOM),
    expert_choice(EC, 1, HIDDEN),
    *map(soft, EXPERTS),
  ]


STUDY = Study(
  name='soft_moe',
  title='Soft mixtures against choices, in an encoder',
  source='Soft MoE (directions alone)',
  config=config,
  arms=arms,
  presets={
    'quick': parts.trial(100, 3, [ROOMY, 'soft, 4', 'soft, 64']),
    'full': Preset(1000, 5),
  },
  columns=[
    byte_models.TOKEN_LOSS,
    parts.percent('without expert', byte_models.DROP_RATE, bounds=parts.ANY),
    Column('max/mean load', byte_models.MAX_LOAD, digits=2),
  ],
  claims={
    'soft mixtures beat token choice': f'loss: soft, 16 < {TOP1}',
    'soft mixtures beat token choice that drops nothing': (
      f'loss: soft, 16 < {ROOMY}'
    ),
    'soft mixtures beat expert choice': f'loss: soft, 16 < {EC}',
    'soft mixtures beat the dense twin': 'loss: soft, 16 < dense',
    'more experts help: 16 against 4': 'loss: soft, 16 < soft, 4',
    'more experts help: 64 against 16': 'loss: soft, 64 < soft, 16',
    'expert choice beats token choice': f'loss: {EC} < {TOP1}',
  },
  timed=['soft, 4', 'soft, 16', 'soft, 64', TOP1, EC],
  gates={
    'loss: top-1 of 16 < dense': [
      '* beat token choice*',
      '* beats token choice',
      '* beat expert choice',
      'more experts help*',
    ]
  },
  figure=Figure(['loss'], 'experts', log_x=True),
  remarks='Tokens without an expert are dropped, or taken by no expert. The '
  'load of Soft MoE counts the weights of mixtures.',
  tasks=DENOISING_TASKS,
  written='2026-11-28',
)
get_config, get_items = command.entries(STUDY, __name__)
