"""Is routing decided by token ids, and early, and are later tokens dropped?

    python -m experiments.openmoe_routing --preset=quick

OpenMoE (https://arxiv.org/abs/2402.01739) finds of decoders with top-2 of 16
and 32 experts: which expert a token goes to follows from its id, whatever the
context and the domain ("context-independent specialization"); it is learned
early and changes little later ("early routing learning"); and as experts fill
up in the order of a sequence, later tokens are dropped more ("drop towards the
end"). Only these directions are compared, no numbers of theirs.

Here: decoders of bytes of four domains, every other layer of which has 8
experts. As in the paper, gates are raw probabilities, and each sequence is a
group with slots for 1.25 choices a token in training and 2 in evaluation, at
two choices a token; with one, as top-1 and the hash have it, half as many.
Slots are taken in the order of tokens. Measured on validation batches, of first
choices before any is dropped:

- information that the expert has about a label, in per cent of the entropy of
  experts, less what shuffled labels have: about the id of the token, about the
  previous token where the id is known already (context), about the position in
  the document, and about the domain;
- agreement: the share of tokens whose id has the same favourite expert at an
  early checkpoint as at the end;
- churn: the share of tokens whose first choice changes from one checkpoint to
  the next, each a tenth of the run;
- dropped: the share of choices that are dropped in each quarter of a row, and
  what would be dropped if the same choices queued in random order.

Slots are as many as choices: with two choices a token no expert can be full in
the first quarter of a row, and later drops are in part the queue's own, as a
random router shows. It is one control, whose choices follow from nothing; a
hash of the token, whose choices follow from the id alone, is the other. Claims
were written before any run, but for the comparison with a random router's
drops, which was added after a trial of 20 steps.
"""

import itertools
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from experiments.study import byte_models, command, domains, parts, routing
from experiments.study.byte_models import top_k
from experiments.study.parts import Arm, Claim, Figure, Preset, Row
from experiments.study.study import Study
from moe_jax.analysis import routing_measures
from moe_jax.analysis.recording import header_of
from moe_jax.analysis.routing_measures import Information, Layer, layers_of
from moe_jax.analysis.traces import Header, Record
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.routing import even_choice
from moe_jax.shapes import Bool, Int
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

# Checkpoints that are compared with the end, in % of the run.
EARLY = (0, 10, 20, 50)
QUARTERS = 4
# Labels besides the token id that the expert may depend on.
OTHERS = ('context', 'position', 'domain')
# Number of batches of each source, at the end and at earlier checkpoints.
_BATCHES, _EARLY_BATCHES = 10, 2
_SHUFFLES = 8
HIDDEN = 256
# Slots of all experts together, divided by the choices of a group.
TRAINED, EVALUATED = 0.625, 1.0


def config(steps: int):
  """The config that the arms share; its groups are single sequences."""
  config = domains.decoder(steps, hidden=HIDDEN, num_layers=4)
  moe = config.model.moe
  moe.update(layers='every 2', group_size=0, layer_reduce='mean')
  moe.capacity.per_assignment.factor = TRAINED
  moe.router.token_choice.update(balance_weight=0.02, z_weight=1e-4)
  room = {'capacity': {'per_assignment': {'factor': EVALUATED}}}
  config.evals = {byte_models.EVAL: byte_models.evaluation(moe=room)}
  # Rounded up, as one checkpoint more would push the first one out.
  config.checkpoint.every_steps = -(-steps // 10)
  config.checkpoint.keep_newest = 10
  return config


def arms(_: Preset) -> list[Arm]:
  """Learned routers and the two controls, all equal in FLOPs."""
  gates = {'router.token_choice.gates': 'raw'}
  no_loss = {'router.token_choice.balance_weight': 0.0}
  return [
    top_k('top-2', 2, HIDDEN, gates),
    top_k('top-2, no balance loss', 2, HIDDEN, gates | no_loss),
    top_k('top-1', 1, HIDDEN),
    top_k('hash of token', 1, HIDDEN, {'router.kind': 'hash'}),
    top_k('random', 2, HIDDEN, gates | {'router.kind': 'random'}),
  ]


def measure(run: Run, state: TrainState) -> dict[str, float]:
  """Measures a run, with the capacity of its evaluation.

  Returns:
    Shares by name, `routing/layer_<i>/<what>`:
    - token, position, domain: information of the expert about it, as a share of
      the entropy of experts, less that of shuffled labels.
    - context: the same about the previous token, where the token is known.
    - token_less_<label>: the difference of both.
    - agreement_<share>: share of tokens whose id has the same favourite expert
      after that share of the run, in per cent, as at its end.
    - churn_early, churn_late: share of tokens whose first choice changes
      between checkpoints, in each half of the run; churn_ends: the difference.
    - dropped_<quarter>: share of choices dropped in a quarter of the row;
      dropped_later, shuffled_later: last less first quarter, in the order of
      the text and in a random one.
  """
  header, recorded = header_of(run), routing.last_records(run, state, _BATCHES)
  early = routing.batches(run, _EARLY_BATCHES)
  history = {
    step: routing.records(run, step, variables, early)
    for step, variables in routing.states(run, state)
  }
  layers = layers_of(header, recorded)
  over_time, measures = changes(header, history), {}
  shares = routing.fractions(layers, 'token', 'position', 'domain')
  for number, of_layer in shares.items():
    of_layer['context'] = context(recorded, number).fraction
    for label in OTHERS:
      of_layer[f'token_less_{label}'] = of_layer['token'] - of_layer[label]
    moe = routing.evaluation_of(run).model.stacks.moe_of(number)
    served = drops(layers[number], recorded, number, moe)
    measures[number] = {**of_layer, **over_time[number], **served}
  return routing.named(measures)


def context(records: Sequence[Record], layer: int) -> Information:
  """The information of first choices on the token before a known token."""
  rng = np.random.default_rng(0)
  tokens = routing_measures.real_tokens(records, rng)
  choices = [record.layers[layer].expert[..., 0].ravel() for record in records]
  expert = np.concatenate(choices)[tokens.flat_index]
  current, before = tokens.after, tokens.token[tokens.after - 1]
  return where_known(expert[current], before, tokens.token[current], rng)


def where_known(
  expert: Int[np.ndarray, ' N'],
  label: Int[np.ndarray, ' N'],
  condition: Int[np.ndarray, ' N'],
  rng: np.random.Generator,
) -> Information:
  """The information of a label on experts where another label is known.

  Experts are shuffled among tokens of an equal `condition`, the known label.
  Shuffling changes nothing but what the label adds, so that the net information
  is I(expert; label | condition), less that of chance.

  Args:
    expert: The expert of each token.
    label: The label.
    condition: The other label, which is known.
    rng: The generator of random numbers.
  """
  _, pair = np.unique(np.stack([condition, label]), axis=1, return_inverse=True)
  pair, grouped = pair.reshape(-1), np.argsort(condition, kind='stable')
  shape = int(pair.max()) + 1, int(expert.max()) + 1
  count = routing_measures.joint_counts

  def shuffled() -> Int[np.ndarray, 'pairs E']:
    permuted = np.empty_like(expert)
    order = np.lexsort((rng.random(len(condition)), condition))
    permuted[grouped] = expert[order]
    return count(pair, permuted, shape)

  shuffles = (shuffled() for _ in range(_SHUFFLES))
  table = count(pair, expert, shape)
  return routing_measures.information_of(table, shuffles)


def changes(
  header: Header, history: Mapping[int, Sequence[Record]]
) -> dict[int, dict[str, float]]:
  """Agreement of choices with those of the end, and churn, by layer.

  Args:
    header: The header of the records.
    history: Records of the same batches, by optimizer steps before.
  """
  steps, last = sorted(history), max(history)
  favourites = {s: layers_of(header, history[s]) for s in steps}
  churn = {
    new: routing_measures.churn(history[old], history[new])
    for old, new in itertools.pairwise(steps)
    if old  # what the first steps change, from nothing, is not counted
  }
  numbers: dict[int, dict[str, float]] = {layer: {} for layer in header.layers}
  for layer, measures in numbers.items():
    last_tokens = favourites[last][layer].by_token
    for share in EARLY:
      early_tokens = favourites[routing.nearest(steps, share)][layer].by_token
      same = early_tokens.argmax(1) == last_tokens.argmax(1)
      agreement = np.average(same, weights=last_tokens.sum(1))
      measures[f'agreement_{share}'] = float(agreement)
    halves = [], []
    for step, changed in churn.items():
      halves[2 * step > last].append(changed[layer])
    begin, end = (float(np.mean(half)) for half in halves)
    measures |= {'churn_early': begin, 'churn_late': end}
    measures['churn_ends'] = begin - end
  return numbers


def drops(
  layer: Layer, records: Sequence[Record], number: int, moe: MoeOptions
) -> dict[str, float]:
  """The share of choices that are dropped in each quarter of a row.

  Groups are single rows. The random order is another one in each row.

  Args:
    layer: The choices of a layer in the records.
    records: The records.
    number: Number of the layer.
    moe: Options of the layer.
  """
  rng = np.random.default_rng(0)
  by_row = np.concatenate(
    [
      in_random_order(r.layers[number].expert, r.documents > 0, moe, rng)
      for r in records
    ]
  )
  kept = by_row.reshape(-1, by_row.shape[-1])[layer.tokens.flat_index]
  part = routing_measures.parts_of(layer.tokens.column, layer.length, QUARTERS)
  in_order, shuffled = (
    routing_measures.drop_rates(layer.expert, served, part, QUARTERS)
    for served in (layer.kept, kept)
  )
  return {
    **{f'dropped_{i + 1}': float(share) for i, share in enumerate(in_order)},
    'dropped_later': float(in_order[-1] - in_order[0]),
    'shuffled_later': float(shuffled[-1] - shuffled[0]),
  }


def in_random_order(
  expert: Int[np.ndarray, 'B T K'],
  real: Bool[np.ndarray, 'B T'],
  moe: MoeOptions,
  rng: np.random.Generator,
) -> Bool[np.ndarray, 'B T K']:
  """The choices that would be served if a row's tokens queued in random order.

  Args:
    expert: The choices.
    real: False for padding.
    moe: The options of the layer, whose groups are single rows.
    rng: The generator of random numbers.
  """
  B, T = real.shape
  order = rng.permuted(np.tile(np.arange(T), (B, 1)), axis=1)
  queue = np.take_along_axis(expert, order[..., None], 1).clip(0)
  mask = jnp.asarray(np.take_along_axis(real, order, 1))
  sizes = dict(num_experts=moe.num_experts, capacity=moe.sizes.slots(T))
  served = even_choice(jnp.asarray(queue), **sizes, mask=mask)
  back = np.argsort(order, 1)[..., None]
  return np.take_along_axis(np.asarray(served.kept), back, 1)


COLUMNS = [
  byte_models.LOSS,
  *routing.columns({label: label for label in ('token', *OTHERS)}),
  *routing.columns({f'token less {x}': f'token_less_{x}' for x in OTHERS}),
  *(
    parts.percent(f'agreement at {share} %', f'routing/*/agreement_{share}')
    for share in EARLY
  ),
  *routing.columns(
    {
      'early churn': 'churn_early',
      'late churn': 'churn_late',
      'churn that ends': 'churn_ends',
      **{f'dropped, quarter {i}': f'dropped_{i}' for i in (1, 2, 3, 4)},
      'last less first quarter': 'dropped_later',
      'the same in random order': 'shuffled_later',
    }
  ),
]


def rows(results: parts.Results) -> list[Row]:
  """A row for each arm, and for each sparse layer of the first one."""
  arm_rows = [
    routing.row_at(name, runs, COLUMNS, 'layer_*')
    for name, runs in results.items()
  ]
  return arm_rows + [
    routing.row_at(f'top-2, {name}', results['top-2'], COLUMNS, layer)
    for name, layer in (
      ('first sparse layer', 'layer_1'),
      ('last sparse layer', 'layer_3'),
    )
  ]


CLAIMS = {
  **{
    f'the id of a token says more about its expert than the {label}{arm}': (
      f'token less {label}: {row} > 0'
    )
    for row, arm in (('top-2', ''), ('top-1', ', top-1'))
    for label in OTHERS
  },
  'most of the choice follows from the id': 'token: top-2 > 50',
  'the id decides less in the deeper layer': (
    'token: top-2, last sparse layer < top-2, first sparse layer'
  ),
  'the id decides less with a balance loss than without': (
    'token: top-2 < top-2, no balance loss'
  ),
  'decided early: four in five favourites of the end are there after a fifth '
  'of the run': Claim(
    'agreement at 20 %: top-2 > 80',
    note='The bound is a reading of "early", from before any run.',
  ),
  'the router has learned: favourites of the end are not those before '
  'training': Claim(
    'agreement at 0 %: top-2 < 50',
    note='"Not" means fewer than half of the favourites.',
  ),
  'choices change less in the second half of the run': Claim(
    'churn that ends: top-2 > 0', note='The learning rate falls, too.'
  ),
  'later tokens are dropped more': 'last less first quarter: top-2 > 0',
  'later tokens are dropped more, top-1': 'last less first quarter: top-1 > 0',
  'later tokens are dropped more than the queue drops random choices': Claim(
    'last less first quarter: top-2 > random',
    changes=['Added after a trial of 20 steps, before these runs.'],
  ),
  'it is the order of the queue: in random order later tokens are dropped no '
  'more': 'the same in random order: top-2 = 0 within 1',
  **{
    f'control: a random router knows nothing of the {label}': (
      f'{label}: random = 0 within 0.5'
    )
    for label in ('token', *OTHERS)
  },
  'control: a random router has no favourites': (
    'agreement at 20 %: random < 50'
  ),
  'control: a hash knows the token alone': 'token: hash of token > 99',
  'control: nothing is left of a hash for the context': (
    'context: hash of token = 0 within 0.5'
  ),
}
STUDY = Study(
  name='openmoe_routing',
  title='Token ids decide, early, and later tokens are dropped',
  source='OpenMoE, its three findings about routing (directions alone)',
  config=config,
  arms=arms,
  rows=rows,
  presets={'quick': Preset(300, 3), 'full': Preset(600, 5)},
  columns=COLUMNS,
  claims=CLAIMS,
  figure=Figure(
    ['token', 'context', 'agreement at 20 %', 'last less first quarter']
  ),
  measure=measure,
  written='2026-11-28',
  remarks='Information is in per cent of the entropy of first choices, less '
  'that of shuffled labels; those of domains are shuffled by rows. A random '
  'router draws anew for each batch. Agreement at 0 % is that of the '
  'parameters before training. Means are over both sparse layers. Both '
  'choices of a token queue before those of the next: in a system where all '
  'first choices queue before second ones, the drops of top-2 along a row are '
  'others, and only those of top-1 are the same.',
  tasks=domains.TASKS,
)
get_config, get_items = command.entries(STUDY, __name__)
