"""Loads made even in each sequence, in a few of them, or in the whole batch.

    python -m experiments.balance_scope --preset=quick

"Demons in the Detail" (https://arxiv.org/abs/2501.11873) says that a balance
loss of the few sequences of a device holds experts back from domains of their
own, as it wants each domain spread over all of them; one of the whole batch
lets them specialise, and the loss is lower. DeepSeek-V3
(https://arxiv.org/abs/2412.19437) has a loss of each sequence, of tiny weight.
These are directions; no number of theirs was checked.

Here: a two-layer byte-level decoder, top-2 of 16 experts, on four domains of
text; the 16 rows of a batch take turns among them, so that a row is of one
domain, two rows of two. Experts drop nothing. The loss counts one row, two, or
all 16, with weights of 0.01 and 0.1 (two rows with 0.1 alone). Specialisation
is the information of a token's first choice about its domain, in per cent of
the entropy of choices, less that of shuffled domains. MaxVio, (largest load -
mean) / mean, is taken over all validation batches, or in each row of 128
tokens. A whole batch here is as small as a device's share of a real one, so
that it stands for the middle of the paper's scale.

Three seeds of the quick preset resolve specialisation and loads, not losses, of
which differences of 0.01 nats a byte are expected. The full preset has 6 arms
and 5 seeds; it was planned for 20 minutes on two idle cores, and took 27 beside
other work. The claims were written before any run.
"""

from experiments.study import byte_models, command, domains, routing
from experiments.study.parts import Arm, Column, Figure, Preset
from experiments.study.study import Study
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

# Options of the router that each arm changes.
ARMS = {
  'no loss': {},
  'a row 0.01': {'sequence_balance_weight': 0.01},
  'a row 0.1': {'sequence_balance_weight': 0.1},
  'two rows 0.1': {'batch_balance_weight': 0.1, 'batch_balance_rows': 2},
  'the batch 0.01': {'global_balance_weight': 0.01},
  'the batch 0.1': {'global_balance_weight': 0.1},
}
_BATCHES = 10  # number of batches of each domain


def config(steps: int):
  """The config that the arms share, without a balance loss."""
  config = domains.decoder(
    steps, num_experts=16, num_selected=2, expert_hidden=128, drops=False
  )
  config.model.moe.layer_reduce = 'mean'
  config.model.moe.router.token_choice.update(
    gates='renormalized', balance_weight=0.0, z_weight=0.0
  )
  return config


def arms(_: Preset) -> list[Arm]:
  """An arm for each scope and weight of the loss, and one without any."""
  router = 'model.moe.router.token_choice'
  return [
    Arm(name, {f'{router}.{key}': value for key, value in options.items()})
    for name, options in ARMS.items()
  ]


def measure(run: Run, state: TrainState) -> dict[str, float]:
  """Measures specialisation, and how even loads are within single rows.

  Returns:
    Numbers by name, `routing/layer_<i>/<what>`: domain and token, information
    of first choices about them as a share of the choices' entropy; row, MaxVio
    in a row, averaged over rows.
  """
  layers = routing.last_layers(run, state, _BATCHES)
  measures = routing.fractions(layers, 'domain', 'token')
  for number, shares in measures.items():
    load = routing.loads(layers[number], layers[number].length)  # of each row
    shares['row'] = float((load.max(1) / load.mean(1) - 1).mean())
  return routing.named(measures)


CLAIMS = {
  **{
    text: claim
    for w, narrow in ((0.01, 'a row'), (0.1, 'a row'), (0.1, 'two rows'))
    for text, claim in {
      f'of weight {w}, a loss of the batch lets experts specialise more than '
      f'one of {narrow}': f'domain: the batch {w} > {narrow} {w}',
      f'of weight {w}, a loss of the batch costs less quality than one of '
      f'{narrow}': f'loss: the batch {w} < {narrow} {w}',
    }.items()
  },
  'a loss of each row takes specialisation away': 'domain: a row 0.1 < no loss',
  'a loss of each row evens rows': 'MaxVio in a row: a row 0.1 < no loss',
  'a loss of the batch leaves rows less even': (
    'MaxVio in a row: the batch 0.1 > a row 0.1'
  ),
  **{
    f'a loss of {scope} evens the whole': f'MaxVio: {scope} 0.1 < no loss'
    for scope in ('a row', 'two rows', 'the batch')
  },
}
STUDY = Study(
  name='balance_scope',
  title='Balance in each sequence or in the whole batch',
  source='Demons in the Detail (directions alone)',
  config=config,
  arms=arms,
  presets={
    'quick': Preset(200, 3, without=['* 0.01', 'two rows*']),
    'full': Preset(1000, 5),
  },
  columns=[
    byte_models.LOSS,
    *routing.columns({'domain': 'domain', 'token': 'token'}),
    byte_models.max_violation('MaxVio'),
    Column('MaxVio in a row', 'routing/*/row', digits=3),
  ],
  claims=CLAIMS,
  measure=measure,
  figure=Figure(['loss', 'domain', 'MaxVio', 'MaxVio in a row']),
  remarks='"Domain" and "token" are the information that first choices have '
  'about the domain and the token, in per cent of the entropy of choices.',
  tasks=domains.TASKS,
  written='2026-11-28',
)
get_config, get_items = command.entries(STUDY, __name__)
