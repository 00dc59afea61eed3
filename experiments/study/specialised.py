"""Information of first choices about tokens, in an encoder and a decoder.

Measurements of one trained run, by half, by layer and over training, for the
study `specialisation`.
"""

import string
from collections.abc import Sequence

import numpy as np

from experiments.study import byte_models, validation_routing
from moe_jax.analysis.recording import header_of
from moe_jax.analysis.routing_measures import (
  POSITION,
  SOURCE,
  TOKEN,
  entropy,
  information,
  layers_of,
  specialisation,
)
from moe_jax.analysis.traces import Header, Record
from moe_jax.shapes import Int
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

# The halves of a model, and the names of their sequences in records.
HALVES = {'encoder': 'encoder', 'decoder': ''}
# Checkpoints that are measured besides the last, in % of the run.
EARLY = (0, 20)
PUNCTUATION = tuple(string.punctuation.encode())
# Bytes by the kind of character; all other ids are a kind of their own.
KINDS = (
  tuple(string.ascii_letters.encode()),
  tuple(string.digits.encode()),
  tuple(string.whitespace.encode()),
  PUNCTUATION,
  tuple(range(128, 256)),
)
# Number of batches of each source, at the end and at earlier checkpoints.
_BATCHES, _EARLY_BATCHES = 10, 4


def layer_key(
  half: str, layer: int | str = '*', share: int | None = None
) -> str:
  """The key of measured layers: a half, a layer from 1, a share of the run.

  Args:
    half: One of `HALVES`.
    layer: Number of the layer in its half; '*' stands for all.
    share: Share of the run in %; None is its end.
  """
  before = '' if share is None else f'at_{share}/'
  return f'{before}{half}_{layer}'


def measure(run: Run, state: TrainState) -> dict[str, float]:
  """Measures a run at its end, and at early checkpoints.

  Returns:
    Numbers by name, `routing/<layer key>/<what>`; see `layer_key` and
    `layer_information`.
  """
  model = validation_routing.evaluated_model(run, byte_models.EVAL)
  header, last = header_of(run), int(state.step)
  states = dict(validation_routing.states(run, state))
  chosen = {
    share: min(states, key=lambda step: abs(100 * step / last - share))
    for share in EARLY
  }
  numbers = {}
  for share, step in {**chosen, None: last}.items():
    batches = _BATCHES if share is None else _EARLY_BATCHES
    records = validation_routing.records(
      model,
      states[step],
      validation_routing.batches(run, batches),
      step=step,
      seed=run.options.seed,
    )
    by_layer = layer_information(header, [*records])
    for half, name in HALVES.items():
      layers = [i for i, x in header.layers.items() if x.sequence == name]
      for number, layer in enumerate(layers, start=1):
        prefix = f'routing/{layer_key(half, number, share)}'
        numbers |= {f'{prefix}/{k}': v for k, v in by_layer[layer].items()}
  return numbers


def layer_information(
  header: Header, records: Sequence[Record]
) -> dict[int, dict[str, float]]:
  """Information of first choices about tokens, by layer.

  Returns:
    For each layer, by name:
    - token, kind, position, source: information of the expert about the id of
      the token, the kind of character, the place in the document, and the
      source of the text, as a share of the entropy of experts, less that of
      shuffled labels; token_less_source is a difference of them.
    - punctuation: entropy of the choices of all tokens less that of punctuation
      in nats; above 0 if punctuation goes to fewer experts.
  """
  layers = layers_of(header, records)
  labels = {'token': TOKEN, 'position': POSITION, 'source': SOURCE}
  by_label = specialisation(layers)
  by_layer = {}
  for number, layer in layers.items():
    table = layer.by_token
    measures = {
      name: by_label[label][number].fraction
      for name, label in labels.items()
      if number in by_label.get(label, ())
    }
    kinds = information(by_kind(table), np.random.default_rng(number))
    marks = entropy(table[[*PUNCTUATION]].sum(0))
    measures |= {
      'kind': kinds.fraction,
      'punctuation': entropy(table.sum(0)) - marks,
    }
    if 'source' in measures:
      measures['token_less_source'] = measures['token'] - measures['source']
    by_layer[number] = measures
  return by_layer


def by_kind(table: Int[np.ndarray, 'V E']) -> Int[np.ndarray, 'kinds E']:
  """First choices by the kind of character; the last row is of other ids."""
  of_kinds = [table[[*ids]].sum(0) for ids in KINDS]
  rest = table.sum(0) - sum(of_kinds)
  return np.stack([*of_kinds, rest]).astype(np.int64)
