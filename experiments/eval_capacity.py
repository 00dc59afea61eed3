"""Quality against the capacity at evaluation, with and without priority.

    python -m experiments.eval_capacity --preset=quick

ST-MoE (https://arxiv.org/abs/2202.08906), Tables 8 and 18: a top-1 model
trained at capacity factor 0.75 gains 0.024 nats a token when it is evaluated at
2, and 0.019 when tokens queue by their router's probability (batch priority,
V-MoE, https://arxiv.org/abs/2106.05974) in training and evaluation. Priority
is said to keep quality at capacities far below 1.

Here: an encoder-decoder that is sparse in the encoder alone. An encoder sees
all of its input at once, so that priority leaks nothing. The model reads keys
and must have memorised their values (`--task=text`: it continues a prefix by a
few bytes). Two models, trained with and without priority, are evaluated at
every capacity in both orders.

Found: a model trained in the order of the text gains from more capacity at
evaluation; one trained with priority is best at the capacity of its training.
Priority helps wherever slots are short, whether or not it was used in training.
A model trained with priority depends on it: it is nearly perfect at its own
capacity, and by far the worst without priority.
"""

from experiments.study import byte_models, command, parts
from experiments.study.parts import Arm, Claim, Column, Figure, Preset, Row
from experiments.study.study import Study
from experiments.study.tasks import PREFIX_TASKS

FACTORS = (0.1, 0.25, 0.5, 0.75, 1.0, 2.0, 4.0)
ORDERS = {'order of the text': 'token_major', 'priority': 'batch_priority'}


def config(steps: int):
  """The config that both models share; its encoder alone is sparse."""
  config = byte_models.sparse_encoder(steps)
  config.model.moe.capacity.update(kind='per_token', per_token={'factor': 0.75})
  config.evals = {'no_drops': byte_models.no_drops()}
  for order in ORDERS.values():
    for factor in FACTORS:
      config.evals[_name(order, factor)] = byte_models.evaluation(
        moe={
          'router': {'token_choice': {'slot_priority': order}},
          'capacity': {'per_token': {'factor': factor}},
        }
      )
  return config


def _name(order: str, factor: float) -> str:
  return f'{order}_{round(100 * factor)}'


def arms(_: Preset) -> list[Arm]:
  """Two arms: training without and with batch priority."""
  key = 'model.moe.router.token_choice.slot_priority'
  return [Arm(name, {key: order}) for name, order in ORDERS.items()]


def rows(results: parts.Results) -> list[Row]:
  """A row for each model and way of evaluating it."""
  rows = []
  for trained, runs in results.items():
    room = Column('', 'eval/no_drops/loss')
    values = {'loss': list(map(room.of, runs)), 'dropped': [0.0] * len(runs)}
    rows.append(Row(f'trained in {trained}; no drops', values))
    for order, priority in ORDERS.items():
      for factor in FACTORS:
        line = f'trained in {trained}; {order}'
        columns = byte_models.columns_of(_name(priority, factor))
        name = f'{line}, CF {factor:g}'
        rows.append(parts.row_of(name, runs, columns, line, factor))
  return rows


# The beginnings of names of rows: the order in training, and at evaluation.
PLAIN = 'trained in order of the text; order of the text'
BPR_LATER = 'trained in order of the text; priority'
BPR = 'trained in priority; priority'
# Addresses of the paper's models of capacity factor 0.75, trained without and
# with batch priority.
WITHOUT = 'stmoe2022/table8/top-1, CF 0.75'
WITH = 'stmoe2022/table18/CF 0.75'
ENCODER = (
  "The paper's model is sparse in encoder and decoder, ours in the encoder "
  'alone.'
)
STUDY = Study(
  name='eval_capacity',
  title='Capacity at evaluation, with and without batch priority',
  source='ST-MoE, Tables 8 and 18 (negative log perplexity: higher is better '
  'there); V-MoE',
  config=config,
  arms=arms,
  presets={'quick': Preset(1000, 4), 'full': Preset(1600, 8)},
  columns=[
    Column('loss', 'eval/no_drops/loss', 'nats/token'),
    Column('dropped', 'eval/no_drops/drop_rate', '%', 1),
  ],
  claims={
    'trained at 0.75, a model is better evaluated at 2 than at 0.75': Claim(
      f'loss: {PLAIN}, CF 2 < {PLAIN}, CF 0.75',
      [f'{WITHOUT}/nlp_eval_2', f'{WITHOUT}/nlp_train_cf'],
    ),
    'at 0.75, priority in training and evaluation lowers the loss': Claim(
      f'loss: {BPR}, CF 0.75 < {PLAIN}, CF 0.75',
      [f'{WITH}/nlp_train_cf', f'{WITHOUT}/nlp_train_cf'],
      ENCODER,
    ),
    'evaluated at 2, priority in training lowers the loss': Claim(
      f'loss: {BPR}, CF 2 < {PLAIN}, CF 2',
      [f'{WITH}/nlp_eval_2', f'{WITHOUT}/nlp_eval_2'],
      ENCODER,
    ),
    **{
      f'at {factor}, priority at evaluation alone lowers the loss': (
        f'loss: {BPR_LATER}, CF {factor:g} < {PLAIN}, CF {factor:g}'
      )
      for factor in (0.1, 0.25, 0.5)
    },
    'at 0.25, a model trained with priority is better evaluated with it': (
      f'loss: {BPR}, CF 0.25 < trained in priority; order of the text, CF 0.25'
    ),
  },
  figure=Figure(['loss', 'dropped'], 'capacity factor at evaluation', True),
  rows=rows,
  tasks=PREFIX_TASKS,
  written='2026-11-25',
)
get_config, get_items = command.entries(STUDY, __name__)
