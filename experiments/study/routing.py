"""Choices of experts of a trained run, at its end and at its checkpoints.

Batches are those of the validation split, an equal number of each source of a
mixture. Routers draw as in training: a random one draws its choices anew for
each batch, and ST-MoE's which second choices are sent.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
import optax

from experiments.study import byte_models, parts
from experiments.study.parts import Arm, Column, Result, Row
from moe_jax import data
from moe_jax.analysis import routing_measures
from moe_jax.analysis.recording import header_of, records_of
from moe_jax.analysis.routing_measures import Layer, Layers, layers_of
from moe_jax.analysis.traces import Record
from moe_jax.data.pipeline import spread
from moe_jax.layers.routers.contract import NOISE
from moe_jax.models import Model
from moe_jax.models.recorded import Choices, recording
from moe_jax.shapes import Int, Leaf
from moe_jax.training import trained
from moe_jax.training.evaluate import Losses, Variables
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

Batch = dict[str, np.ndarray]
# Labels of tokens, of `routing_measures.specialisation`, by name of a measure.
LABELS = dict.fromkeys(('domain', 'source'), routing_measures.SOURCE) | {
  'token': routing_measures.TOKEN,
  'position': routing_measures.POSITION,
}
# The halves of an encoder-decoder, and the names of their sequences in records.
HALVES = {'encoder': 'encoder', 'decoder': ''}


def states(run: Run, state: TrainState) -> Iterator[tuple[int, Variables]]:
  """The variables before training, at each kept checkpoint, and at the end.

  Args:
    run: A run that has ended.
    state: Its last state.

  Yields:
    The number of optimizer steps before the variables, and the variables.
  """
  last = int(state.step)
  yield 0, run.programs.variables(run.programs.init_state())
  for step in run.checkpoints.steps():
    if 0 < step < last:
      restored = trained.restore_variables(
        run.workdir, run.model, run.options.sharding.rules, step=step
      )
      yield step, restored.state
  yield last, run.programs.variables(state)


def nearest(steps: Sequence[int], share: int) -> int:
  """The step that is nearest to a share, in per cent, of the last step."""
  return min(steps, key=lambda step: abs(100 * step / max(steps) - share))


def batches(run: Run, num_batches: int, mixed: bool = False) -> list[Batch]:
  """Validation batches, as many of each source of a mixture.

  Args:
    run: The run.
    num_batches: Number of batches of each source.
    mixed: Whether sources take turns from row to row, as in training; otherwise
      each batch is of one source.
  """
  datasets = run.dataset.parts or {'': run.dataset}
  sizes = dict(batch_size=run.options.batch_size, num_batches=num_batches)
  of_one_source: list[Batch] = []
  for dataset in datasets.values():
    split = dataset.splits['validation']
    of_one_source += data.eval_batches(split, **sizes)
  if not mixed:
    return of_one_source
  rows = jax.tree.map(lambda *leaves: np.concatenate(leaves), *of_one_source)
  order = np.arange(len(rows['tokens'])).reshape(len(datasets), -1).T.ravel()
  return [
    jax.tree.map(lambda x, part=part: x[part], rows)
    for part in np.split(order, len(of_one_source))
  ]


def spread_rows(run: Run, count: int) -> Batch:
  """Returns rows of the validation split, evenly spaced over it."""
  rows = run.dataset.splits['validation']
  return rows.take(np.array(spread(len(rows), count)))


def mean_loss(logits: jax.Array, batch: Mapping[str, Leaf]) -> float:
  """The loss of a batch in nats a token, from its logits [B, T, V]."""
  targets, weights = batch['targets'], batch['loss_weights']
  nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return float((nats * weights).sum() / weights.sum())


def evaluation_of(run: Run, name: str = byte_models.EVAL) -> Losses:
  """An entry of `config.evals`, which may have another capacity than training.

  The entry is an evaluation over batches.
  """
  measures = {entry.name: entry.measure for entry in run.evaluations}
  return cast(Losses, measures[name])


def changed_model(run: Run, **moe: Any) -> Model:
  """The model of a run, with other options of its mixtures."""
  options = run.options.filled(run.dataset.vocab_size)
  changed = dataclasses.replace(options.model.moe, **moe)
  model = dataclasses.replace(options.model, moe=changed)
  return dataclasses.replace(options, model=model).build()


def records(
  run: Run, step: int, variables: Variables, batches: Sequence[Batch]
) -> list[Record]:
  """The records of batches, as a trace of the evaluation `main` has them.

  Args:
    run: The run.
    step: Number of optimizer steps before the variables.
    variables: Variables of the run's model.
    batches: The batches.
  """
  model = evaluation_of(run).model
  key = jax.random.fold_in(jax.random.key(run.options.seed), step)
  recorded: list[Record] = []
  for number, batch in enumerate(batches):
    noise = {NOISE: jax.random.fold_in(key, number)}
    chosen = jax.device_get(choices(model, variables, batch, noise))
    recorded += records_of(model, 'validation', step, number, batch, chosen)
  return recorded


def last_records(
  run: Run, state: TrainState, num_batches: int, mixed: bool = False
) -> list[Record]:
  """The records of validation batches at the end of a run; see `batches`."""
  variables = run.programs.variables(state)
  inputs = batches(run, num_batches, mixed)
  return records(run, int(state.step), variables, inputs)


def last_layers(
  run: Run, state: TrainState, num_batches: int, mixed: bool = False
) -> Layers:
  """The choices of each sparse layer in `last_records`, by the layer's number.

  A dense model has none.
  """
  recorded = last_records(run, state, num_batches, mixed)
  return layers_of(header_of(run), recorded) if recorded else {}


@functools.partial(jax.jit, static_argnames=('model', 'train', 'logits'))
def choices(
  model: Model,
  variables: Variables,
  batch: Mapping[str, Leaf],
  rngs: Mapping[str, jax.Array],
  train: bool = True,
  logits: bool = False,
) -> Choices:
  """The experts that the tokens of a batch choose in each sparse layer.

  Args:
    model: The model.
    variables: Its variables.
    batch: The batch.
    rngs: Keys of what is drawn, by name, as `model.apply` takes them.
    train: Whether routers have the noise of training.
    logits: Whether the routers' logits are recorded as well, in float32.
  """
  inputs = model.inputs(batch) | {'train': train, 'rngs': rngs}
  what = {'logits': logits, 'dtype': 'float32'}
  return recording(model, variables, **what, **inputs)[1]


def fractions(layers: Layers, *names: str) -> dict[int, dict[str, float]]:
  """Information of first choices on labels, as shares of the experts' entropy.

  Args:
    layers: The choices of each sparse layer.
    *names: Names of measures in `LABELS`.

  Returns:
    The net information about each label as a share, by layer and measure.
  """
  found = routing_measures.specialisation(layers)
  return {i: {n: found[LABELS[n]][i].fraction for n in names} for i in layers}


def loads(layer: Layer, num_tokens: int) -> Int[np.ndarray, 'parts E']:
  """The load of a layer in each part of the text, before any choice is dropped.

  Args:
    layer: The choices of the layer.
    num_tokens: Number of tokens of a part, such as a row or a batch, with its
      padding.
  """
  part = layer.tokens.flat_index // num_tokens
  shape = int(part.max()) + 1, layer.info.num_experts
  count = routing_measures.joint_counts
  return np.sum([count(part, x, shape) for x in layer.expert.T], 0)


def top_2_and_controls(hidden: int, **options: str) -> list[Arm]:
  """Top-2 with and without a balance loss, and routers that learn nothing.

  Args:
    hidden: Twice the hidden width of an expert.
    **options: Options of the routers that learn.
  """
  router = {f'router.token_choice.{key}': x for key, x in options.items()}
  no_loss = {'router.token_choice.balance_weight': 0.0}
  raw = {'router.token_choice.gates': 'raw'}
  changes = {
    'top-2': router,
    'top-2, no balance loss': router | no_loss,
    'hash of token': raw | {'router.kind': 'hash'},
    'random': raw | {'router.kind': 'random'},
  }
  return [byte_models.top_k(n, 2, hidden, moe) for n, moe in changes.items()]


def columns(measures: Mapping[str, str]) -> list[Column]:
  """Columns of measured shares, in per cent of any sign.

  Args:
    measures: What is measured, the last part of a number's name, by column.
  """
  return [
    parts.percent(name, f'routing/*/{what}', bounds=parts.ANY)
    for name, what in measures.items()
  ]


def row_at(
  name: str, runs: Sequence[Result], columns: Sequence[Column], layer_key: str
) -> Row:
  """The row of the measurements of one layer, or of several.

  A column that a run has no number for is left out.

  Args:
    name: The name of the row.
    runs: The results of an arm.
    columns: Columns; the key 'routing/*/<what>' is one of a measurement.
    layer_key: Text that replaces the `*`, such as 'layer_1'.
  """
  of_layer = [
    dataclasses.replace(column, key=column.key.replace('*', layer_key))
    for column in columns
  ]
  return parts.row_of(name, runs, of_layer)


def named(values: Mapping[int | str, Mapping[str, float]]) -> dict[str, float]:
  """Measures by layer and what is measured, as a run's numbers.

  The measure 'domain' of the layer 1, or of 'layer_1', becomes
  'routing/layer_1/domain'.
  """
  return {
    f'routing/{"layer_" * isinstance(layer, int)}{layer}/{what}': number
    for layer, of_layer in values.items()
    for what, number in of_layer.items()
  }


def by_half(layers: Layers) -> dict[str, int]:
  """Numbers of the sparse layers of an encoder-decoder, by name.

  Layers are named after their half and counted in it from 1: 'encoder_1'.
  """
  names = {}
  for half, sequence in HALVES.items():
    of_half = [i for i, x in layers.items() if x.info.sequence == sequence]
    names |= {f'{half}_{n}': layer for n, layer in enumerate(of_half, start=1)}
  return names
