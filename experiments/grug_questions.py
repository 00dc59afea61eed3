"""Three open questions: a smaller shared expert, a frozen router, no z-loss.

    python -m experiments.grug_questions --preset=quick

The project marin ablates a sparse model, "grug", in public. It keeps the shared
expert, whose removal costs, and finds one of half the size promising
(https://github.com/marin-community/marin/issues/4768); removing the router
z-loss is neutral (issue 5214); a router that stays as it was drawn, with a bias
that balances loads, costs: the model trains as fast as one of 0.65 times the
compute (issues 5502 and 5512). These verdicts are of single runs and were read
in issues, not in a paper; none is printed as a published number.

Here: a two-layer byte-level decoder; 32 experts of 48, four of which a token
chooses, and a shared one of the model's width, 64. Gates are sigmoids. A bias
by sign balances loads, in the place of their quantiles. Rows without a shared
expert, or with half of one, have fewer FLOPs, as in the issues; nothing
compensates for it. That rows are alike is judged by bounds chosen before any
run.

Three seeds of the quick preset resolve about 0.02 nats a byte: the frozen
router perhaps, half a shared expert not. The full preset, 6 arms and 5 seeds,
was planned for 18 minutes on two idle cores; beside other work its runs took
105 core minutes. The claims were written before any run.
"""

from experiments.study import byte_models, command, parts
from experiments.study.parts import Arm, Claim, Column, Figure, Preset
from experiments.study.study import Study

WIDTH = 64
BASE, HALF, NO_SHARED = 'base', 'half a shared expert', 'no shared expert'
FROZEN, SHORT, NO_Z = 'frozen router', 'base, 0.65 of its steps', 'no z-loss'
Z_LOSS = 'router z-loss'
SAME = 0.01


def config(steps: int):
  """The config of the base, which the other arms change."""
  config = byte_models.decoder(
    steps,
    width=WIDTH,
    num_experts=32,
    num_selected=4,
    expert_hidden=48,
    drops=False,
  )
  moe = config.model.moe
  moe.layer_reduce = 'mean'
  moe.shared_expert.hidden = WIDTH
  moe.router.token_choice.update(
    gates='sigmoid', balance_bias_rate=0.01, balance_weight=0.0, z_weight=1e-3
  )
  return config


def arms(preset: Preset) -> list[Arm]:
  """The base, and an arm for each of its changes."""
  shared = 'model.moe.shared_expert.hidden'
  return [
    Arm(BASE, {}),
    Arm(HALF, {shared: WIDTH // 2}),
    Arm(NO_SHARED, {shared: 0}),
    Arm(FROZEN, {'trainable': 'all - router'}),
    Arm(SHORT, {'total_steps': round(0.65 * preset.steps)}),
    Arm(NO_Z, {'model.moe.router.token_choice.z_weight': 0.0}),
  ]


STUDY = Study(
  name='grug_questions',
  title='Shared expert of half size, frozen router, no z-loss',
  source='Ablations of grug in issues of marin (directions alone)',
  config=config,
  arms=arms,
  presets={'quick': parts.trial(100, 3, [NO_SHARED]), 'full': Preset(1000, 5)},
  columns=[
    byte_models.LOSS,
    byte_models.max_violation('MaxVio'),
    Column(Z_LOSS, f'eval/{byte_models.EVAL}/layer_*/z_loss', digits=2),
  ],
  claims={
    'the shared expert is worth its FLOPs': f'loss: {NO_SHARED} > {BASE}',
    'half a shared expert is as good as a whole one': (
      f'loss: {HALF} = {BASE} within {SAME}'
    ),
    'half a shared expert is better than none': f'loss: {HALF} < {NO_SHARED}',
    'a frozen router costs': f'loss: {FROZEN} > {BASE}',
    'a frozen router is as good as 0.65 of the steps with a trained one': (
      f'loss: {FROZEN} = {SHORT} within {SAME}'
    ),
    'the router z-loss can be left out': f'loss: {NO_Z} = {BASE} within {SAME}',
    'without the router z-loss logits are larger': Claim(
      f'{Z_LOSS}: {NO_Z} > {BASE}', note='A claim of ours.'
    ),
  },
  figure=Figure(['loss', 'MaxVio', Z_LOSS]),
  remarks='The router z-loss is the mean squared logsumexp of the logits, '
  'whatever its weight in training. All arms but one train for all steps.',
  written='2026-11-28',
)
get_config, get_items = command.entries(STUDY, __name__)
