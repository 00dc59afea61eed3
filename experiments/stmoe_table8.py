"""Top-1 and top-2 by slots a token in training.

    python -m experiments.stmoe_table8 --preset=quick

ST-MoE (https://arxiv.org/abs/2202.08906), Table 8: with 0.75 slots a token,
evaluated with as many, top-1 has a negative log perplexity of -1.428, top-2 of
-1.424, with 1.25 slots -1.378 and -1.375, dense of equal FLOPs -1.474. More
slots in evaluation alone help, 0.022 with top-2 at 0.75.

Here: an encoder-decoder of bytes that is sparse in its encoder alone, 8 experts
in each of two layers; in the paper's model the decoder is sparse, too. The
model reads keys and has to know their values by heart; on spans of program
text, which the study had before, no sparse encoder was resolved better than its
dense twin. As in the paper, a capacity counts slots a token whatever the number
of choices, and experts are as wide as the dense layer: models of equal capacity
multiply equally many rows, and choices beyond it are dropped. With 1.25 slots
they multiply up to 1.25 times the rows of the dense layer. A group is the whole
batch: first choices are served in the order of the text, which leaves the last
rows without experts where slots are short, and then second ones. Gates of two
choices sum to one; in training second choices are sent with a probability of
their gate over 0.2, in evaluation all are. The z-loss has a weight of 0.001.
Rates are searched for each model. What top-1 gains from slots at evaluation,
and batch priority, are in `eval_capacity`.

Top-2 against top-1 is not claimed: the published difference is below what five
seeds can tell. The full preset, 5 arms, 5 seeds and 1,000 steps, and 40 trials
of 800, was planned for 86 core minutes; it took 77. The quick preset resolves
no loss. The claims were written before any of its runs.
"""

from experiments.study import byte_models, command, parts
from experiments.study.byte_models import top_k
from experiments.study.parts import Arm, Claim, Figure, Preset, Row
from experiments.study.study import Study
from experiments.study.tasks import PREFIX_TASKS

HIDDEN = 128  # of the dense feed-forward and of each expert
# Pairs of the choices of a token and the slots a token in training.
TABLE8 = ((1, 0.75), (2, 0.75), (1, 1.25), (2, 1.25))
# Slots at evaluation: as many as in training, or two a token.
OWN, TWO = 'as trained', 'at 2'
EVALS = {OWN: byte_models.EVAL, TWO: 'two_slots'}
FLOOR = 0.05  # nats a token, below which little is left to gain


def config(steps: int):
  """The config that the rows share; its encoder alone is sparse."""
  config = byte_models.sparse_encoder(steps, hidden=HIDDEN)
  config.model.moe.capacity.kind = 'per_token'
  config.model.moe.router.token_choice.z_weight = 1e-3
  config.evals[EVALS[TWO]] = byte_models.with_slots(2.0)
  return config


def _arm(K: int, slots: float) -> Arm:
  changes = {'capacity.per_token.factor': float(slots)}
  router = 'router.token_choice'
  if K > 1:
    changes[f'{router}.slot_priority'] = 'choice_major'
    changes[f'{router}.second_policy'] = 'threshold'
  name = f'top-{K}, CF {slots:g}'
  # All experts are as wide as the dense layer.
  return top_k('wide ' * (K > 1) + name, K, K * HIDDEN, changes)


def arms(_: Preset) -> list[Arm]:
  """The dense twin, and the models of Table 8."""
  return [byte_models.dense(), *(_arm(K, slots) for K, slots in TABLE8)]


def row(model: str, slots: str = OWN) -> str:
  """Name of the row of a model with its slots at evaluation."""
  return f'{model}; evaluated {slots}'


def rows(results: parts.Results) -> list[Row]:
  """A row for the dense twin, and one for each model and capacity."""
  table = [parts.row_of('dense', results['dense'], [byte_models.TOKEN_LOSS])]
  for arm in (_arm(K, slots).name for K, slots in TABLE8):
    # A quick preset leaves some out.
    for slots, evaluation in EVALS.items() if arm in results else ():
      columns = byte_models.columns_of(evaluation)
      name = row(arm.removeprefix('wide '), slots)
      table.append(parts.row_of(name, results[arm], columns))
  return table


def cell(model: str, slots: str = OWN) -> str:
  """Address of the published number of a model."""
  column = 'nlp_train_cf' if slots == OWN else 'nlp_eval_2'
  return f'stmoe2022/table8/{model}/{column}'


def better(model: str, than: str, slots: str = OWN) -> Claim:
  """A claim that a model has a lower loss than another, in the paper as well.

  Args:
    model: Name of the model.
    than: Name of the other model, which is evaluated as it was trained.
    slots: Slots with which the first model is evaluated.
  """
  compared = f'loss: {row(model, slots)} < {row(than)}'
  return Claim(compared, [cell(model, slots), cell(than)])


TRAINED, SLOTS = (
  'slots are better in training',
  'slots at evaluation are better',
)
STUDY = Study(
  name='stmoe_table8',
  title='Top-1 and top-2 by capacity in training',
  source='ST-MoE, Table 8 (negative log perplexity: higher is better there)',
  config=config,
  arms=arms,
  rows=rows,
  presets={
    'quick': parts.trial(100, 3, ['*top-1, CF 0.75']),
    'full': Preset(1000, 5),
  },
  columns=[
    byte_models.TOKEN_LOSS,
    parts.percent('dropped', byte_models.DROP_RATE, '% of choices'),
  ],
  claims={
    f'top-1: 1.25 {TRAINED} than 0.75': better(
      'top-1, CF 1.25', 'top-1, CF 0.75'
    ),
    f'top-2: 1.25 {TRAINED} than 0.75': better(
      'top-2, CF 1.25', 'top-2, CF 0.75'
    ),
    f'top-2, trained at 0.75: two {SLOTS}': better(
      'top-2, CF 0.75', 'top-2, CF 0.75', TWO
    ),
    f'top-2, trained at 1.25: two {SLOTS}': better(
      'top-2, CF 1.25', 'top-2, CF 1.25', TWO
    ),
    'top-1 beats the dense twin': Claim(
      f'loss: {row("top-1, CF 1.25")} < dense',
      [cell('top-1, CF 1.25'), cell('Dense-L')],
    ),
  },
  gates={
    f'loss: {row("top-1, CF 1.25")} < dense': ['top-1: *'],
    f'loss: {row("top-2, CF 1.25")} < dense': ['top-2: *'],
    f'loss: {row("top-2, CF 0.75", TWO)} < dense': ['*trained at 0.75*'],
    f'loss: {row("top-2, CF 1.25")} > {FLOOR}': ['*trained at 1.25*'],
  },
  rates=(0.001, 0.002, 0.004, 0.008),
  trial_share=0.8,
  figure=Figure(['loss', 'dropped'], rows='CF: slots a token in training'),
  remarks='Experts are as wide with two choices as with one, so that models '
  'with equal slots a token multiply as many rows.',
  tasks=PREFIX_TASKS,
  dropped=2,
  earlier=[
    'Until 2026-12-02 the task was span corruption of program text, without a '
    'search of rates: top-1 with 1.25 slots was not resolved better than its '
    'dense twin, and eight published claims were withheld. Four of them were '
    'taken out with their models: that top-2 with two slots is better than '
    'with 0.75 and that top-3 is then as good, which count as not resolved, '
    'and two on top-1 with 0.75 slots that `eval_capacity` decides. A claim '
    'of ours on top-2 with priority went, too.',
  ],
  written='2026-12-02',
)
get_config, get_items = command.entries(STUDY, __name__)
