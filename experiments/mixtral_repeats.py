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

from experiments.study import byte_models, command, domains, parts, routing
from experiments.study.parts import Claim, Figure, Preset, Row
from experiments.study.study import Study
from moe_jax.analysis import routing_measures
from moe_jax.analysis.recording import header_of
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

HIDDEN, EXPERTS, SELECTED = 256, 8, 2
# Layers by name; the rows of each layer are of the arm 'top-2'.
LAYERS = {'first layer': 0, 'middle layer': 2, 'last layer': 4}
# Shares of repeats if all pairs of experts were equally likely, in %.
CHANCES = routing_measures.uniform_repeats(EXPERTS, SELECTED)
FIRST_CHANCE, EITHER_CHANCE = (100 * share for share in CHANCES)
_BATCHES = 10  # number of measured batches of each domain


def config(steps: int):
  """The config that the arms share: all five layers are sparse."""
  config = domains.decoder(
    steps, hidden=HIDDEN, num_layers=5, num_experts=EXPERTS, drops=False
  )
  config.model.moe.layer_reduce = 'mean'
  return config


# Columns and the last parts of their keys.
MEASURED = {
  'first choice': 'first',
  'first choice, above chance': 'first_above',
  'first choice, different bytes': 'different',
  'first choice, different bytes, above chance': 'different_above',
  'either choice': 'any',
  'either choice, above chance': 'any_above',
}
COLUMNS = [byte_models.LOSS, *routing.columns(MEASURED)]


def measure(run: Run, state: TrainState) -> dict[str, float]:
  """Measures the repeats of a run's choices in each domain and in all.

  Returns:
    Shares by name, `routing/layer_<i>/<domain>/<what>` with the domain 'all',
    too: see `MEASURED`, and `Persistence` for what they are.
  """
  header, by_domain = header_of(run), defaultdict(list)
  for record in routing.last_records(run, state, _BATCHES):
    for subset in (header.sources[record.sources[0, 0]], 'all'):
      by_domain[subset].append(record)
  measures = {}
  for domain, records in by_domain.items():
    seed = run.options.seed
    layers = routing_measures.layers_of(header, records, seed=seed)
    for layer, choices in layers.items():
      repeats = routing_measures.persistence(choices)
      measures[f'layer_{layer}/{domain}'] = {
        'first': repeats.first,
        'first_above': repeats.first - repeats.first_chance,
        'different': repeats.different,
        'different_above': repeats.different - repeats.first_chance,
        'any': repeats.any,
        'any_above': repeats.any - repeats.any_chance,
      }
  return routing.named(measures)


def rows(results: parts.Results) -> list[Row]:
  """A row for each layer of the first arm, domain in the middle, and arm."""
  keys = {name: f'layer_{i}/all' for name, i in LAYERS.items()}
  for domain in domains.DOMAINS:
    keys[f'middle layer, {domain}'] = f'layer_{LAYERS["middle layer"]}/{domain}'
  layer_rows = [
    routing.row_at(f'top-2, {name}', results['top-2'], COLUMNS, key)
    for name, key in keys.items()
  ]
  return layer_rows + [
    routing.row_at(name, runs, COLUMNS, 'layer_*/all')
    for name, runs in results.items()
  ]


def repeated(column: str, share: float, published: str) -> parts.Claims:
  """Claims on repeats in three layers against those of random choices.

  Args:
    column: Name of the column.
    share: The share of random choices, in per cent.
    published: Name of the paper's column.
  """
  more = f'{column}: more repeats than of random choices'
  cell = f'mixtral2024/repeats/layer 15, {published}/low'
  return {
    f'{more}, middle layer': Claim(
      f'{column}: top-2, middle layer > {share:.4g}', [cell]
    ),
    f'{more}, last layer': f'{column}: top-2, last layer > {share:.4g}',
    f'{column}: about as many as of random choices, first layer': Claim(
      f'{column}: top-2, first layer = {share:.4g} within 2',
      note='The bound is ours.',
    ),
  }


CLAIMS = {
  **repeated('first choice', FIRST_CHANCE, 'first choice'),
  **repeated('either choice', EITHER_CHANCE, 'first or second choice'),
  **{
    f'there are more repeats in the {layer} layer than in the first': (
      f'first choice, above chance: top-2, {layer} layer > top-2, first layer'
    )
    for layer in ('middle', 'last')
  },
  **{
    f'more than by uneven loads and repeated bytes, {layer}': (
      f'first choice, different bytes, above chance: top-2, {layer} > 0'
    )
    for layer in LAYERS
  },
  **{
    f'more than by chance in every domain: {domain}': (
      f'first choice, above chance: top-2, middle layer, {domain} > 0'
    )
    for domain in domains.DOMAINS
  },
  'control: random choices repeat as often as computed': (
    f'first choice: random = {FIRST_CHANCE:.4g} within 1'
  ),
  'control: one of two random choices repeats as often as computed': (
    f'either choice: random = {EITHER_CHANCE:.4g} within 1'
  ),
  'learned choices follow the context: more repeats of different bytes than '
  'with a hash of the token': (
    'first choice, different bytes, above chance: top-2 > hash of token'
  ),
  'repeats do not come from the balance loss': (
    'first choice, above chance: top-2, no balance loss > 0'
  ),
}
STUDY = Study(
  name='mixtral_repeats',
  title='Consecutive tokens share experts',
  source='Mixtral of Experts, section 5 (none of its numbers was verified)',
  config=config,
  arms=lambda _: routing.top_2_and_controls(HIDDEN),
  rows=rows,
  presets={'quick': Preset(300, 3), 'full': Preset(600, 5)},
  columns=COLUMNS,
  claims=CLAIMS,
  figure=Figure(
    ['first choice', 'first choice, above chance', 'either choice']
  ),
  measure=measure,
  remarks='Random choices of two of eight experts would repeat the first '
  f'choice in {FIRST_CHANCE:.1f} % of cases, and one of the two in '
  f'{EITHER_CHANCE:.1f} %. Rows of whole arms are means over five layers. '
  'The tables of a hash are the same for all seeds.',
  tasks=domains.TASKS,
  written='2026-11-28',
)
get_config, get_items = command.entries(STUDY, __name__)
