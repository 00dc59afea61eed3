"""Choices of experts of a trained run, at its end and at its checkpoints.

Batches are those of the validation split, an equal number of each source of a
mixture. Routers draw as in training: a random one draws its choices anew for
each batch, and ST-MoE's which second choices are sent.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
import optax

from experiments.study.parts import Column, Result, Row, row_of
from moe_jax import data
from moe_jax.analysis.recording import records_of
from moe_jax.analysis.traces import Header, Record
from moe_jax.data.pipeline import spread
from moe_jax.errors import InputError
from moe_jax.layers.routers.contract import NOISE
from moe_jax.models import Model
from moe_jax.models.recorded import Choices, recording
from moe_jax.shapes import Leaf
from moe_jax.training import trained
from moe_jax.training.evaluate import Losses, Variables
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

Batch = dict[str, np.ndarray]
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


def batches(run: Run, num_batches: int) -> list[Batch]:
  """Validation batches, each of one source.

  Args:
    run: The run.
    num_batches: Number of batches of each source.
  """
  datasets = run.dataset.parts or {'': run.dataset}
  return [
    batch
    for dataset in datasets.values()
    for batch in data.eval_batches(
      dataset.splits['validation'],
      batch_size=run.options.batch_size,
      num_batches=num_batches,
    )
  ]


def spread_rows(run: Run, count: int) -> Batch:
  """Returns rows of the validation split, evenly spaced over it."""
  rows = run.dataset.splits['validation']
  return rows.take(np.array(spread(len(rows), count)))


def mean_loss(logits: jax.Array, batch: Mapping[str, Leaf]) -> float:
  """The loss of a batch in nats a token, from its logits [B, T, V]."""
  nats = optax.softmax_cross_entropy_with_integer_labels(
    logits, batch['targets']
  )
  weights = batch['loss_weights']
  return float((nats * weights).sum() / weights.sum())


def in_turn(batches: Sequence[Batch], num_sources: int) -> list[Batch]:
  """The rows of batches of one source each, in batches of all sources.

  Args:
    batches: Equally many batches of each source, source by source.
    num_sources: Number of sources, which take turns from row to row, as in a
      batch of training.
  """
  rows = jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)
  order = np.arange(len(rows['tokens'])).reshape(num_sources, -1).T.ravel()
  return [
    jax.tree.map(lambda x, part=part: x[part], rows)
    for part in np.split(order, len(batches))
  ]


def evaluation_of(run: Run, name: str) -> Losses:
  """An entry of `config.evals`, which may have another capacity than training.

  Raises:
    ValueError: The entry is not one over batches.
  """
  measure = {e.name: e.measure for e in run.evaluations}[name]
  if not isinstance(measure, Losses):
    raise InputError(f'evals.{name} is not an evaluation over batches')
  return measure


def evaluated_model(run: Run, name: str) -> Model:
  """The model of an entry of `config.evals`; see `evaluation_of`."""
  return evaluation_of(run, name).model


def last_records(
  run: Run, state: TrainState, name: str, num_batches: int, mixed: bool = False
) -> Iterator[Record]:
  """The records of a trained run, with the model of an evaluation.

  Args:
    run: The run.
    state: Its last state.
    name: Name of an entry of `config.evals`.
    num_batches: Number of validation batches of each source.
    mixed: Whether sources take turns from row to row, as in training; otherwise
      each batch is of one source.
  """
  inputs = batches(run, num_batches)
  if mixed:
    inputs = in_turn(inputs, len(run.dataset.parts or {'': run.dataset}))
  yield from records(
    evaluated_model(run, name),
    run.programs.variables(state),
    inputs,
    step=int(state.step),
    seed=run.options.seed,
  )


def records(
  model: Model,
  variables: Variables,
  batches: Sequence[Batch],
  *,
  step: int,
  seed: int,
) -> Iterator[Record]:
  """The records of batches, as a trace of an evaluation has them.

  Args:
    model: The model, with the capacity that is recorded.
    variables: Its variables.
    batches: The batches.
    step: Number of optimizer steps before the variables.
    seed: Seed of the draws of a random router.
  """
  key = jax.random.fold_in(jax.random.key(seed), step)
  for number, batch in enumerate(batches):
    noise = {NOISE: jax.random.fold_in(key, number)}
    chosen = choices(model, variables, batch, noise)
    yield from records_of(
      model, 'validation', step, number, batch, jax.device_get(chosen)
    )


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
  return recording(
    model,
    variables,
    logits=logits,
    dtype='float32',
    **model.inputs(batch),
    train=train,
    rngs=rngs,
  )[1]


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
    dataclasses.replace(
      column, key=column.key.replace('routing/*', f'routing/{layer_key}')
    )
    for column in columns
  ]
  return row_of(name, runs, of_layer)


def named(measures: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
  """Measures by layer and what is measured, as a run's numbers.

  The measure 'domain' of 'layer_1' becomes 'routing/layer_1/domain'.
  """
  return {
    f'routing/{layer}/{what}': number
    for layer, of_layer in measures.items()
    for what, number in of_layer.items()
  }


def layers_by_half(header: Header) -> dict[str, int]:
  """Numbers of the sparse layers of an encoder-decoder, by name.

  Layers are named after their half and counted in it from 1: 'encoder_1'.
  """
  names = {}
  for half, sequence in HALVES.items():
    layers = [i for i, x in header.layers.items() if x.sequence == sequence]
    names |= {f'{half}_{n}': layer for n, layer in enumerate(layers, start=1)}
  return names
