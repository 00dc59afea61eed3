"""Measures of first choices: information on tokens, its beginning, drops.

Measurements of one trained run of a decoder on a mixture, by sparse layer, for
the study `openmoe_routing`.
"""

import itertools
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from experiments.study import byte_models, validation_routing
from moe_jax import routing
from moe_jax.analysis import routing_measures
from moe_jax.analysis.recording import header_of
from moe_jax.analysis.routing_measures import (
  POSITION,
  SOURCE,
  TOKEN,
  Information,
  Layer,
  drop_rates,
  information_of,
  joint_counts,
  layers_of,
  parts_of,
  specialisation,
)
from moe_jax.analysis.traces import Header, Record
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.shapes import Bool, Float, Int
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

# Checkpoints that are compared with the end, in % of the run.
EARLY = (0, 10, 20, 50)
QUARTERS = 4
# Labels besides the token id that the expert may depend on.
OTHER_LABELS = ('context', 'position', 'domain')
# Number of batches of each source, at the end and at earlier checkpoints.
_BATCHES, _EARLY_BATCHES = 10, 2
_SHUFFLES = 8


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
  model = validation_routing.evaluated_model(run, byte_models.EVAL)
  header, seed = header_of(run), run.options.seed

  def recorded(variables, step: int, num_batches: int) -> list[Record]:
    batches = validation_routing.batches(run, num_batches)
    return [
      *validation_routing.records(
        model, variables, batches, step=step, seed=seed
      )
    ]

  history = {
    step: recorded(variables, step, _EARLY_BATCHES)
    for step, variables in validation_routing.states(run, state)
  }
  last = run.programs.variables(state)
  records = recorded(last, int(state.step), _BATCHES)
  shares, over_time = information(header, records), changes(header, history)
  numbers = {}
  for layer in model.stacks.sparse_layers:
    dropped = drops(header, records, layer, model.stacks.moe_of(layer))
    measures = shares[layer] | over_time[layer] | dropped
    numbers |= {f'routing/layer_{layer}/{k}': v for k, v in measures.items()}
  return numbers


def information(
  header: Header, records: Sequence[Record]
) -> dict[int, dict[str, float]]:
  """The information in first choices, as shares of their entropy, by layer."""
  findings = specialisation(layers_of(header, records))
  names = {'token': TOKEN, 'position': POSITION, 'domain': SOURCE}
  shares = {}
  for layer in header.layers:
    fractions = {
      name: findings[label][layer].fraction for name, label in names.items()
    }
    fractions['context'] = context(records, layer).fraction
    differences = {
      f'token_less_{n}': fractions['token'] - fractions[n] for n in OTHER_LABELS
    }
    shares[layer] = fractions | differences
  return shares


def context(records: Sequence[Record], layer: int) -> Information:
  """The information of first choices on the token before a known token."""
  rng, triples = np.random.default_rng(0), []
  for record in records:
    tokens = routing_measures.real_tokens([record], rng)
    first = record.layers[layer].expert[..., 0].reshape(-1)[tokens.flat_index]
    current, previous = tokens.after, tokens.after - 1
    triples.append(
      (first[current], tokens.token[previous], tokens.token[current])
    )
  expert, previous, token = map(np.concatenate, zip(*triples, strict=True))
  return where_known(expert, previous, token, rng)


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

  def shuffled() -> Int[np.ndarray, 'pairs E']:
    permuted = np.empty_like(expert)
    permuted[grouped] = expert[
      np.lexsort((rng.random(len(condition)), condition))
    ]
    return joint_counts(pair, permuted, shape)

  table = joint_counts(pair, expert, shape)
  return information_of(table, [shuffled() for _ in range(_SHUFFLES)])


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
      step = min(steps, key=lambda step: abs(100 * step / last - share))
      early_tokens = favourites[step][layer].by_token
      same = early_tokens.argmax(1) == last_tokens.argmax(1)
      measures[f'agreement_{share}'] = float(
        np.average(same, weights=last_tokens.sum(1))
      )
    halves: dict[str, list[float]] = {'churn_early': [], 'churn_late': []}
    for step, of_layers in churn.items():
      half = 'churn_late' if 2 * step > last else 'churn_early'
      halves[half].append(of_layers[layer])
    if all(halves.values()):
      measures |= {name: float(np.mean(half)) for name, half in halves.items()}
      measures['churn_ends'] = measures['churn_early'] - measures['churn_late']
  return numbers


def drops(
  header: Header, records: Sequence[Record], layer: int, moe: MoeOptions
) -> dict[str, float]:
  """The share of choices that are dropped in each quarter of a row.

  Groups are single rows. The random order is another one in each row.
  """
  rng, reordered = np.random.default_rng(0), []
  for record in records:
    choices = record.layers[layer]
    kept = in_random_order(choices.expert, record.documents > 0, moe, rng)
    layers = {layer: choices._replace(kept=kept)}
    reordered.append(record._replace(layers=layers))
  in_order, shuffled = (
    _by_quarter(layers_of(header, series)[layer])
    for series in (records, reordered)
  )
  return {
    **{f'dropped_{i + 1}': float(share) for i, share in enumerate(in_order)},
    'dropped_later': float(in_order[-1] - in_order[0]),
    'shuffled_later': float(shuffled[-1] - shuffled[0]),
  }


def _by_quarter(layer: Layer) -> Float[np.ndarray, ' quarters']:
  part = parts_of(layer.tokens.column, layer.length, QUARTERS)
  return drop_rates(layer.expert, layer.kept, part, QUARTERS)


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
  served = routing.even_choice(
    jnp.asarray(np.take_along_axis(expert, order[..., None], 1).clip(0)),
    num_experts=moe.num_experts,
    capacity=moe.sizes.slots(T),
    mask=jnp.asarray(np.take_along_axis(real, order, 1)),
  )
  back = np.argsort(order, 1)[..., None]
  return np.take_along_axis(np.asarray(served.kept), back, 1)
