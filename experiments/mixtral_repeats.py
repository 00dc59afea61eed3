"""Do consecutive tokens share experts, in which layers and domains?

    python -m experiments.mixtral_repeats --preset=quick

Mixtral of Experts (https://arxiv.org/abs/2401.04088), section 5: with two of
eight experts, random choices would give 12.5 % of tokens the first choice of
the token before them, and 46 % one of its two choices. The paper is said to
find about these shares in the first layer and larger ones in the middle one,
which could not be verified; the share in the last layer is our question. None
of its percentages is given here.

Here: decoders of bytes with eight experts in each of five layers, two of which
a token chooses, without a capacity; four domains. Bytes repeat more often than
Mixtral's tokens do (spaces above all), and a router that goes by the token
would follow them: so repeats are also counted among neighbours that are
different bytes. Uneven loads alone cause repeats as well, which comparing with
a random other token of the batch takes off: "above chance" is the share of
neighbours less that of such strangers, which may be equal bytes. A hash of the
token, which knows no context, and a random router are controls. Claims were
written before any run but trials of 30 steps, after which the claims on the
first layer and the bound of the controls (0.5 at first, 1 now) were changed.
"""

from collections import defaultdict

from experiments.study import (
  byte_models,
  command,
  domains,
  parts,
  validation_routing,
)
from experiments.study.byte_models import top_k
from experiments.study.parts import Arm, Claim, Column, Figure, Preset, Row
from experiments.study.runner import TrainingRunner
from experiments.study.study import Study
from experiments.study.validation_routing import row_at
from moe_jax.analysis.recording import header_of
from moe_jax.analysis.routing_measures import (
  layers_of,
  persistence,
  uniform_repeats,
)
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

HIDDEN, EXPERTS, SELECTED = 256, 8, 2
TOP2, FREE = 'top-2', 'top-2, no balance loss'
HASH, RANDOM = 'hash of token', 'random'
LAYERS = {'first layer': 0, 'middle layer': 2, 'last layer': 4}
# Shares of repeats if all pairs of experts were equally likely, in %.
FIRST_CHANCE, EITHER_CHANCE = (
  100 * share for share in uniform_repeats(EXPERTS, SELECTED)
)
NEAR = 2  # % of repeats that count as few more than random choices have


def config(steps: int):
  """The config that the arms share: all five layers are sparse."""
  config = domains.decoder(
    steps, hidden=HIDDEN, num_layers=5, num_experts=EXPERTS
  )
  config.model.moe.layer_reduce = 'mean'
  byte_models.drop_nothing(config.model.moe)
  return config


def arms(_: Preset) -> list[Arm]:
  """Mixtral's router with and without a balance loss, and two controls."""
  no_loss = {'router.token_choice.balance_weight': 0.0}
  kinds = ({'router.kind': kind} for kind in ('hash', 'random'))
  raw = {'router.token_choice.gates': 'raw'}
  return [
    top_k(TOP2, SELECTED, HIDDEN),
    top_k(FREE, SELECTED, HIDDEN, no_loss),
    *(
      top_k(name, SELECTED, HIDDEN, raw | kind)
      for name, kind in zip((HASH, RANDOM), kinds, strict=True)
    ),
  ]


FIRST, EITHER = 'first choice', 'either choice'
ABOVE = 'above chance'
DIFFERENT = 'different bytes'
# Columns and the last parts of their keys.
MEASURED = {
  FIRST: 'first',
  f'{FIRST}, {ABOVE}': 'first_above',
  f'{FIRST}, {DIFFERENT}': 'different',
  f'{FIRST}, {DIFFERENT}, {ABOVE}': 'different_above',
  EITHER: 'any',
  f'{EITHER}, {ABOVE}': 'any_above',
}
_BATCHES = 10  # number of measured batches of each domain


def measure(run: Run, state: TrainState) -> dict[str, float]:
  """Measures the repeats of a run's choices in each domain and in all.

  Returns:
    Shares by name, `routing/layer_<i>/<domain>/<what>` with the domain 'all',
    too: see `MEASURED`, and `Persistence` for what they are.
  """
  header, by_domain = header_of(run), defaultdict(list)
  for record in validation_routing.last_records(
    run, state, byte_models.EVAL, _BATCHES
  ):
    for subset in (header.sources[record.sources[0, 0]], 'all'):
      by_domain[subset].append(record)
  measures = {}
  for domain, records in by_domain.items():
    layers = layers_of(header, records, seed=run.options.seed)
    for layer, choices in layers.items():
      repeats = persistence(choices)
      measures[f'layer_{layer}/{domain}'] = {
        'first': repeats.first,
        'first_above': repeats.first - repeats.first_chance,
        'different': repeats.different,
        'different_above': repeats.different - repeats.first_chance,
        'any': repeats.any,
        'any_above': repeats.any - repeats.any_chance,
      }
  return validation_routing.named(measures)


def columns() -> list[Column]:
  """Columns of the loss and of repeats, means over layers where not told."""
  return [
    byte_models.LOSS,
    *(
      parts.percent(name, f'routing/*/{key}', bounds=parts.ANY)
      for name, key in MEASURED.items()
    ),
  ]


def row_name(layer: str, domain: str = '') -> str:
  """Name of the row of a layer of the first arm, in a domain or in all."""
  return f'{TOP2}, {layer}{f", {domain}" if domain else ""}'


def rows(results: parts.Results) -> list[Row]:
  """A row for each arm, layer of the first arm, and domain in the middle."""
  middle = LAYERS['middle layer']
  key_of_row = {
    row_name(layer): f'layer_{i}/all' for layer, i in LAYERS.items()
  }
  key_of_row |= {
    row_name('middle layer', domain): f'layer_{middle}/{domain}'
    for domain in domains.DOMAINS
  }
  layer_rows = [
    row_at(name, results[TOP2], columns(), layer_key)
    for name, layer_key in key_of_row.items()
  ]
  return layer_rows + [
    row_at(name, runs, columns(), 'layer_*/all')
    for name, runs in results.items()
  ]


def claims() -> list[Claim]:
  """More repeats than by chance, but for the first layer, in all domains."""
  first, middle, last = map(row_name, LAYERS)
  published = 'mixtral2024/repeats/layer 15, {}/low'.format
  repeat_claims = []
  for column, share, paper_column in (
    (FIRST, FIRST_CHANCE, 'first choice'),
    (EITHER, EITHER_CHANCE, 'first or second choice'),
  ):
    chance = f'{share:.4g}'
    repeat_claims += [
      Claim(
        f'{column}: more repeats than of random choices, middle layer',
        f'{column}: {middle} > {chance}',
        [published(paper_column)],
      ),
      Claim(
        f'{column}: more repeats than of random choices, last layer',
        f'{column}: {last} > {chance}',
      ),
      Claim(
        f'{column}: about as many as of random choices, first layer',
        f'{column}: {first} = {chance} within {NEAR}',
        note='The bound is ours.',
      ),
    ]
  for row, name in ((middle, 'middle'), (last, 'last')):
    repeat_claims.append(
      Claim(
        f'there are more repeats in the {name} layer than in the first',
        f'{FIRST}, {ABOVE}: {row} > {first}',
      )
    )
  repeat_claims += [
    Claim(
      f'more than by uneven loads and repeated bytes, {layer}',
      f'{FIRST}, {DIFFERENT}, {ABOVE}: {row_name(layer)} > 0',
    )
    for layer in LAYERS
  ]
  repeat_claims += [
    Claim(
      f'more than by chance in every domain: {domain}',
      f'{FIRST}, {ABOVE}: {row_name("middle layer", domain)} > 0',
    )
    for domain in domains.DOMAINS
  ]
  return repeat_claims + [
    Claim(
      'control: random choices repeat as often as computed',
      f'{FIRST}: {RANDOM} = {FIRST_CHANCE:.4g} within 1',
    ),
    Claim(
      'control: one of two random choices repeats as often as computed',
      f'{EITHER}: {RANDOM} = {EITHER_CHANCE:.4g} within 1',
    ),
    Claim(
      'learned choices follow the context: more repeats of different bytes '
      'than with a hash of the token',
      f'{FIRST}, {DIFFERENT}, {ABOVE}: {TOP2} > {HASH}',
    ),
    Claim(
      'repeats do not come from the balance loss',
      f'{FIRST}, {ABOVE}: {FREE} > 0',
    ),
  ]


STUDY = Study(
  name='mixtral_repeats',
  title='Consecutive tokens share experts',
  source='Mixtral of Experts, section 5 (none of its numbers was verified)',
  config=config,
  arms=arms,
  rows=rows,
  presets={'quick': Preset(300, 3), 'full': Preset(600, 5)},
  columns=columns(),
  claims=claims(),
  figure=Figure([FIRST, f'{FIRST}, {ABOVE}', EITHER]),
  runner=TrainingRunner(measure),
  remarks=(
    'Random choices of two of eight experts would repeat the first choice in '
    f'{FIRST_CHANCE:.1f} % of cases, and one of the two in '
    f'{EITHER_CHANCE:.1f} %. Rows of whole arms are means over five layers. '
    'The tables of a hash are the same for all seeds.'
  ),
  tasks=domains.TASKS,
  written='2026-11-28',
)
get_config, get_items = STUDY.get_config, STUDY.get_items

if __name__ == '__main__':
  command.main(STUDY)
