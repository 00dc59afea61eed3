"""Parts that train in fine-tuning: all, experts, or everything but experts.

    python -m experiments.stmoe_freezing --preset=quick

ST-MoE (https://arxiv.org/abs/2202.08906), Figure 5: fine-tuning all parameters,
those outside of the sparse layers, attention alone or dense feed-forward layers
alone is nearly as good; fine-tuning the sparse layers alone is drastically
worse, though they have about 80 % of the parameters. The figure has no table,
so that the directions here are "shown" or "refuted".

Here: a decoder of four layers, the last of which is sparse, is pre-trained on
the text of Python's library and fine-tuned on short tasks with instructions.
Whether an arm is "as good as all" is judged by a bound of 0.05 nats a token,
which was chosen before any result was seen.

Found: sparse layers alone are far worse, and all else alone is as good as all,
as in the paper. Attention or dense feed-forward layers alone are not, but the
longer both trainings are, the less they are behind.
"""

from experiments.study import command, finetuned
from experiments.study.parts import Arm, Claim, Figure, Preset
from experiments.study.study import Study

# The expression that selects what trains, by the name of the arm.
PARTS = {
  'all': 'all',
  'outside of sparse layers': 'all - experts - router',
  'sparse layers': 'experts + router',
  'attention': 'attention',
  'dense feed-forward': 'ffn',
}
SAME = 0.05


def arms(_: Preset) -> list[Arm]:
  """An arm for each part that trains."""
  return [
    Arm(name, {'trainable': part}, start=finetuned.SPARSE)
    for name, part in PARTS.items()
  ]


STUDY = Study(
  name='stmoe_freezing',
  title='What trains in fine-tuning a sparse model',
  source='ST-MoE, Figure 5',
  config=finetuned.config,
  arms=arms,
  starts=finetuned.pretrained,
  presets={
    'quick': Preset(200, 3, start_steps=300),
    'full': Preset(400, 6, start_steps=600),
  },
  columns=[finetuned.LOSS],
  claims={
    **{
      f'sparse layers alone are worse than {x}': f'loss: sparse layers > {x}'
      for x in PARTS
      if x != 'sparse layers'
    },
    **{
      f'{name} alone is as good as all': f'loss: {name} = all within {SAME}'
      for name in ('outside of sparse layers', 'attention')
    },
    'dense feed-forward layers alone are as good as all': Claim(
      f'loss: dense feed-forward = all within {SAME}',
      note='The paper has them slightly best.',
    ),
  },
  timed=[*PARTS],
  written='2026-11-27',
  figure=Figure(['loss']),
  tasks=finetuned.tasks('generated tasks with instructions'),
)
get_config, get_items = command.entries(STUDY, __name__)
