"""Do sentinels go to experts of their own, in the encoder and in the decoder?

    python -m experiments.stmoe_table14 --preset=quick

ST-MoE (https://arxiv.org/abs/2202.08906), Table 14: in an encoder-decoder that
learns span corruption, the sentinels that stand for cut-out spans go to few
experts of the encoder: the entropy of their choices falls from 2.2 nats in the
first sparse layer to 1.2 in the sixth. In the decoder it is 3.4, nearly that of
a uniform choice of 32 experts, 3.5. Experts of the encoder specialise in kinds
of tokens; no specialisation was found in the decoder.

Here: bytes, three sparse layers in either half, with 16 experts, two of which a
token chooses; a row of 128 bytes has seven sentinels. Entropies of so many
choices are too low by less than 0.01 nats. "Concentration" is the entropy of
the choices of all tokens, less that of the sentinels. How far experts
specialise is measured by the information that the first choice has about the
token's id, in per cent of its entropy. With a hash of the token, sentinels go
to as many experts as they hash to; a random router is the other control.

Found after 600 steps: sentinels are concentrated on fewer experts in the
decoder (1.6 nats) than in the encoder (2.3), and the encoder concentrates them
less in its last layer than in its first. Both are the reverse of the paper.
Choices follow token ids more in the decoder than in the encoder.

Claims were written before any run. The runs of the full preset, 4 arms and 5
seeds, left two claims open; four more seeds were then added, on 2026-11-30, to
be run with the others anew. The runs of all nine took 47 core minutes.
"""

from experiments.study import byte_models, command, parts, validation_routing
from experiments.study.byte_models import top_k
from experiments.study.parts import Arm, Claim, Column, Figure, Preset, Row
from experiments.study.runner import TrainingRunner
from experiments.study.study import Study
from experiments.study.tasks import Task
from experiments.study.validation_routing import (
  HALVES,
  layers_by_half,
  named,
  row_at,
)
from moe_jax.analysis.recording import header_of
from moe_jax.analysis.routing_measures import (
  TOKEN,
  entropy,
  layers_of,
  specialisation,
)
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

HIDDEN, EXPERTS, LAYERS = 256, 16, 3
TOP2, FREE = 'top-2', 'top-2, no balance loss'
HASH, RANDOM = 'hash of token', 'random'
UNIFORM = 2.7726  # ln 16


def config(steps: int):
  """The config that the arms share: an encoder-decoder of sparse layers."""
  config = byte_models.decoder(
    steps, hidden=HIDDEN, num_layers=LAYERS, num_experts=EXPERTS
  )
  config.data.task.kind = 'span_corruption'
  config.data.seq_len = 128
  config.data.target_len = 32
  config.batch_size = 16
  m = config.model
  m.kind = 'encoder_decoder'
  m.positions.kind = 'relative'
  m.moe.layer_reduce = 'mean'
  m.moe.capacity.kind = 'per_token'
  m.moe.capacity.per_token.factor = 1.25
  m.moe.router.token_choice.update(balance_choices='first', z_weight=1e-3)
  room = {'capacity': {'per_token': {'factor': 2.0}}}
  config.evals = {byte_models.EVAL: byte_models.evaluation(moe=room)}
  return config


def arms(_: Preset) -> list[Arm]:
  """ST-MoE's router with and without the balance loss, and two controls."""
  chance = {'router.token_choice.second_policy': 'threshold'}
  no_loss = {'router.token_choice.balance_weight': 0.0}
  raw = {'router.token_choice.gates': 'raw'}
  return [
    top_k(TOP2, 2, HIDDEN, chance),
    top_k(FREE, 2, HIDDEN, chance | no_loss),
    top_k(HASH, 2, HIDDEN, raw | {'router.kind': 'hash'}),
    top_k(RANDOM, 2, HIDDEN, raw | {'router.kind': 'random'}),
  ]


ENTROPY, ALL = 'entropy of sentinels', 'entropy of all tokens'
CONCENTRATION, BY_TOKEN = 'concentration', 'token'
_BATCHES = 40


def measure(run: Run, state: TrainState) -> dict[str, float]:
  """Measures which experts sentinels and all tokens go to.

  Returns:
    Numbers by name, `routing/<half>_<i>/<what>` with the number of the layer in
    its half, from 1:
    - sentinels, all: entropy in nats of the first choices of sentinels and of
      all tokens; concentration: the difference.
    - token: information of the first choice about the token id, as a share of
      the entropy of experts, less that of shuffled ids.
  """
  header = header_of(run)
  records = validation_routing.last_records(
    run, state, byte_models.EVAL, _BATCHES
  )
  choices = layers_of(header, records)
  about_token = specialisation(choices)[TOKEN]
  ids, measures = [*run.dataset.tokenizer.sentinel_ids], {}
  for name, layer in layers_by_half(header).items():
    table = choices[layer].by_token
    sentinels, overall = entropy(table[ids].sum(0)), entropy(table.sum(0))
    measures[name] = {
      'sentinels': sentinels,
      'all': overall,
      'concentration': overall - sentinels,
      'token': about_token[layer].fraction,
    }
  return named(measures)


def columns() -> list[Column]:
  """Columns of the loss and of measurements of one half's layers."""
  return [
    Column('loss', f'eval/{byte_models.EVAL}/loss', 'nats/token'),
    Column(ENTROPY, 'routing/*/sentinels', 'nats', 2),
    Column(ALL, 'routing/*/all', 'nats', 2),
    Column(CONCENTRATION, 'routing/*/concentration', 'nats', 2),
    parts.percent(BY_TOKEN, 'routing/*/token', bounds=parts.ANY),
  ]


def row_name(arm: str, half: str, layer: int = 0) -> str:
  """Name of the row of a half of an arm's model, or of one of its layers."""
  return f'{arm}, {half}{f" {layer}" if layer else ""}'


def rows(results: parts.Results) -> list[Row]:
  """A row for each layer of the first arm, and for each half of every arm."""
  layers = [
    row_at(row_name(TOP2, half, i), results[TOP2], columns(), f'{half}_{i}')
    for half in HALVES
    for i in range(1, LAYERS + 1)
  ]
  return layers + [
    row_at(row_name(arm, half), runs, columns(), f'{half}_*')
    for arm, runs in results.items()
    for half in HALVES
  ]


def cells(*rows: str) -> list[str]:
  """Addresses of published entropies."""
  return [f'stmoe2022/table14/{row}/entropy' for row in rows]


def _unresolved(interval: str) -> str:
  """The change of a claim that five seeds left open."""
  before = f'Not resolved with five seeds ({interval})'
  return parts.more_seeds(before, 'nine', '2026-11-30')


def claims() -> list[Claim]:
  """Claims of Table 14 and its text, and claims on the controls."""
  encoder, decoder = (row_name(TOP2, half) for half in HALVES)
  first, last = (row_name(TOP2, 'encoder', i) for i in (1, LAYERS))
  sixth = 'The paper has six layers in the encoder, here are three.'
  return [
    Claim(
      'sentinels go to fewer experts in the encoder than in the decoder, first '
      'layer',
      f'{ENTROPY}: {first} < {row_name(TOP2, "decoder", 1)}',
      cells('encoder 1', 'decoder'),
      changes=[_unresolved('0.38 ± 0.52')],
    ),
    Claim(
      'sentinels go to fewer experts in the encoder than in the decoder, last '
      'layer',
      f'{ENTROPY}: {last} < {row_name(TOP2, "decoder", LAYERS)}',
      cells('encoder 6', 'decoder'),
      sixth,
    ),
    Claim(
      "sentinels go to fewer experts in the encoder's last layer than in its "
      'first',
      f'{ENTROPY}: {last} < {first}',
      cells('encoder 6', 'encoder 1'),
      sixth,
    ),
    Claim(
      'in the decoder sentinels go to nearly all experts alike',
      f'{ENTROPY}: {decoder} = {UNIFORM} within 0.2',
      cells('decoder', 'uniform over 32'),
      'The bound is ours.',
    ),
    Claim(
      'sentinels are concentrated more than tokens are, encoder',
      f'{CONCENTRATION}: {encoder} > 0',
    ),
    Claim(
      'in the decoder sentinels are concentrated no more than tokens are',
      f'{CONCENTRATION}: {decoder} = 0 within 0.1',
      note='The paper finds no specialisation there. The bound is ours.',
    ),
    Claim(
      'choices follow token ids more in the encoder than in the decoder',
      f'{BY_TOKEN}: {encoder} > {decoder}',
    ),
    Claim(
      'it is not the balance loss that concentrates sentinels',
      f'{CONCENTRATION}: {row_name(FREE, "encoder")} > 0',
      changes=[_unresolved('0.11 ± 0.17')],
    ),
    *(
      Claim(
        f'control: a random router spreads sentinels evenly, {half}',
        f'{ENTROPY}: {row_name(RANDOM, half)} = {UNIFORM} within 0.05',
      )
      for half in HALVES
    ),
    *(
      Claim(
        f'control: a hash concentrates sentinels, {half}',
        f'{CONCENTRATION}: {row_name(HASH, half)} > 0',
      )
      for half in HALVES
    ),
  ]


STUDY = Study(
  name='stmoe_table14',
  title='Sentinels have experts of their own',
  source='ST-MoE, Table 14',
  config=config,
  arms=arms,
  rows=rows,
  presets={'quick': Preset(300, 3), 'full': Preset(600, 9)},
  columns=columns(),
  claims=claims(),
  figure=Figure([ENTROPY, CONCENTRATION, BY_TOKEN]),
  runner=TrainingRunner(measure),
  remarks=f'A uniform choice of 16 experts has {UNIFORM:.2f} nats. Entropies '
  'are of first choices before any is dropped. Rows of a half are means over '
  'its three layers. The tables of a hash are the same for all seeds.',
  tasks={
    'text': Task({}, 'span corruption of the Python standard library, bytes')
  },
  written='2026-11-28',
)
get_config, get_items = STUDY.get_config, STUDY.get_items

if __name__ == '__main__':
  command.main(STUDY)
