"""Capacity and the balance loss in fine-tuning: does it matter what is dropped?

    python -m experiments.stmoe_table5 --preset=quick

ST-MoE (https://arxiv.org/abs/2202.08906), Table 5: a sparse model that is
fine-tuned with capacity factors of 0.75 to 4, with and without the auxiliary
load balance loss, drops between none and 15.6 % of its tokens and has a
SuperGLUE score between 85.7 and 86.7. The one row that has a spread over seeds
has 0.21. That nothing is resolved is the result of the paper.

Here: decoders of bytes of two layers, both sparse (`finetuned.ciphered`), with
first choices served before second ones, as in the paper, so that all arms may
leak: whether a second choice is dropped depends on later tokens. They are
pre-trained on program text in eight ciphers, and fine-tuned on that of other
modules in the same ciphers. The share that is dropped is of choices of experts
at the end of training, not of tokens, of which the paper's numbers are: with
two choices a token, a factor of 0.75 has slots for three choices of eight, and
1.25 for five. The z-loss stays on in all arms, as in the paper. Rates of
fine-tuning are searched for each arm; that of pre-training is not.

One arm has a slot for each expert and batch, in training and evaluation, so
that nearly all is dropped. As both layers are sparse, no feed-forward is left
to it, and what it loses is what these layers are worth in fine-tuning, not what
their routing is worth. Whether two arms are equal is judged by a bound of 0.03
nats a byte, which was chosen before any run; the gate wants a worth of three
times as much. One run of another seed, which is not stored, had a worth of 0.12
after 200 and 100 steps, with pre-training at a rate of 0.003.

The full preset, 9 arms, 5 seeds and 300 steps after 600, and 72 trials of 90,
took 20 of its planned 55 core minutes. The claims were written anew, before any
run of them, when the models and the text were changed.
"""

from experiments.study import byte_models, command, finetuned, parts
from experiments.study.parts import Arm, Claim, Figure, Preset, Row
from experiments.study.study import Study

# Capacity factors of evaluation, by that of training.
FACTORS = {0.75: 2.0, 1.25: 2.0, 2.0: 3.0, 4.0: 5.0}
AUX = {'aux': 0.01, 'no aux': 0.0}
SAME = 0.03
DROPPING = 'nearly all dropped'
# The names of rows, here and in the paper's table, by the factor of training:
# with the balance loss and without it.
ROWS = {
  train: [f'train {train:g}, eval {evaluated:g}, {aux}' for aux in AUX]
  for train, evaluated in FACTORS.items()
}


def arms(_: Preset) -> list[Arm]:
  """Arms for each pair of factors, with and without the balance loss."""
  factor, all_arms = 'moe.capacity.per_token.factor', []
  evaluation = f'evals.{byte_models.EVAL}.model_overrides'
  for number, (aux, weight) in enumerate(AUX.items()):
    for train, names in ROWS.items():
      overrides = {
        f'model.{factor}': train,
        f'{evaluation}.{factor}': FACTORS[train],
        'model.moe.router.token_choice.balance_weight': weight,
      }
      start = finetuned.SPARSE
      all_arms.append(Arm(names[number], overrides, aux, train, start))
  least = finetuned.NEARLY_ALL_DROPPED
  return [*all_arms, Arm(DROPPING, least, start=finetuned.SPARSE)]


def rows(results: parts.Results) -> list[Row]:
  """A row of each arm, and the difference of the least and most capacity."""
  table = {a.name: STUDY.row_of(a, results) for a in arms(Preset(1, 1))}
  full = table[ROWS[max(FACTORS)][0]]
  worth = finetuned.minus(finetuned.WORTH, table[DROPPING], full)
  return [*table.values(), worth]


def cells(column: str, *rows: str) -> list[str]:
  """Addresses of published numbers."""
  return [f'stmoe2022/table5/{name}/{column}' for name in rows]


def claims() -> parts.Claims:
  """Scores do not depend on capacity or loss; what is dropped does."""
  dropped, fullest = finetuned.DROPPED.name, max(FACTORS)
  return {
    **{
      f'capacity factor {train:g}, {aux}, is as good as 4': Claim(
        f'loss: {ROWS[train][i]} = {ROWS[fullest][i]} within {SAME}',
        cells('superglue', ROWS[train][i], ROWS[fullest][i]),
      )
      for i, aux in enumerate(AUX)
      for train in FACTORS
      if train != fullest
    },
    **{
      f'at capacity factor {train:g} it is as good without the loss': Claim(
        f'loss: {without} = {with_loss} within {SAME}',
        cells('superglue', without, with_loss),
      )
      for train, (with_loss, without) in ROWS.items()
    },
    **{
      f'at capacity factor {train:g} more is dropped without the loss': Claim(
        f'{dropped}: {without} > {with_loss}',
        cells('dropped', without, with_loss),
      )
      for train, (with_loss, without) in ROWS.items()
      if train < 2
    },
  }


STUDY = Study(
  name='stmoe_table5',
  title='Capacity and balance loss in fine-tuning',
  source='ST-MoE, Table 5 (SuperGLUE scores: higher is better there)',
  config=finetuned.ciphered,
  arms=arms,
  rows=rows,
  starts=finetuned.pretrained,
  presets={
    'quick': Preset(100, 3, start_steps=200, underpowered=finetuned.TOO_SHORT),
    'full': Preset(300, 5, start_steps=600),
  },
  columns=[finetuned.LOSS, finetuned.DROPPED],
  claims=claims(),
  gates={f'loss: {finetuned.WORTH} > {3 * SAME:g}': ['*as good*']},
  rates=finetuned.RATES,
  figure=Figure(
    ['loss', finetuned.DROPPED.name],
    'capacity factor in training',
    without=[finetuned.WORTH],
  ),
  tasks=finetuned.CIPHERED_TASKS,
  earlier=[
    'Until 2026-12-02 one layer of four was sparse, models were fine-tuned on '
    'generated tasks, no rate was searched, and the bound was 0.05 nats a '
    'token, where a whole sparse layer was worth 0.009. All ten claims of '
    'equality were "direction reproduced"; the largest difference was 0.0131 '
    '± 0.0101.'
  ],
  written='2026-12-02',
)
get_config, get_items = command.entries(STUDY, __name__)
