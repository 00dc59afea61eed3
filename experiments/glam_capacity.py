"""Capacity in training, in evaluation and in generation, of a decoder.

    python -m experiments.glam_capacity --preset=quick

GLaM (https://arxiv.org/abs/2112.06905) is a decoder of which every other layer
is sparse, top-2 of 64 experts, with GShard's two slots a token. Its numbers
come from a secondary source and have no other capacity, so that the claims here
follow from reasoning: what is dropped in training is not learned, what is
dropped later is missed, and a capacity leaves less room for chance the smaller
a group is. In generation a group is what all rows read in one step.

Here: byte-level decoders of four layers, two of them sparse, top-2 of 16,
served as in GShard, first choices before second ones, second ones sent by
chance in training; they are trained with 1 or 2 slots a token, or without
drops. All are evaluated with 1 and 2 slots and without drops, in groups of
2,048 tokens, and read token by token, 32 rows at a time, with as many slots a
token in each step (2 and 4 slots an expert) and without drops, as text is
generated. The rows that are read have one document each and are not those of
the evaluation, so that generated and evaluated losses are not compared. Which
second choices find a slot depends on later tokens: models that are trained and
evaluated with slots may see a little of their future, those that generate and
those without drops see none of it.

The full preset, 4 arms and 5 seeds, was planned for 19 minutes on two idle
cores; its runs took 57 core minutes. The quick preset resolves drops, not
losses. The claims were written before any run.
"""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.study import byte_models, command, parts, routing
from experiments.study.parts import Arm, Claim, Column, Figure, Preset, Row
from experiments.study.study import Study
from moe_jax import generation
from moe_jax.data.pipeline import spread
from moe_jax.errors import InputError
from moe_jax.layers.experts import Gather
from moe_jax.models import Model
from moe_jax.models.recorded import Choices, recording
from moe_jax.routing.capacity import All, Fixed
from moe_jax.shapes import Array, Float32, Int32
from moe_jax.training.evaluate import Variables
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

EXPERTS, ROWS = 16, 32
TIGHT, WIDE, FREE = 'train 1', 'train 2', 'no drops in training'
# Slots a token, by name; 0 drops nothing.
ROOM = {'1': 1, '2': 2, 'no drops': 0}


def config(steps: int):
  """The config that the arms share."""
  config = byte_models.decoder(
    steps, num_layers=4, num_experts=EXPERTS, expert_hidden=128
  )
  config.model.moe.layers = 'every 2'
  byte_models.serve_as_gshard(config.model.moe)
  config.evals = {byte_models.EVAL: byte_models.evaluation()}
  for slots in ROOM.values():
    config.evals[f'slots_{slots}'] = _evaluation(slots)
  return config


def _evaluation(slots: int):
  if not slots:
    return byte_models.no_drops()
  capacity = {'kind': 'per_token', 'per_token': {'factor': float(slots)}}
  gather = {'kind': 'gather'}
  return byte_models.evaluation(moe={'capacity': capacity, 'dispatch': gather})


def arms(_: Preset) -> list[Arm]:
  """The dense twin, and sparse models by their capacity in training."""
  factor = 'model.moe.capacity.per_token.factor'
  return [
    byte_models.dense(),
    Arm(TIGHT, {factor: 1.0}),
    Arm(WIDE, {factor: 2.0}),
    Arm(FREE, byte_models.DROPLESS),
  ]


def measure_steps(
  run: Run, state: TrainState, slots: int, num_rows: int
) -> dict[str, float]:
  """Measures validation rows that are read token by token, all at once.

  Args:
    run: A run of a decoder, all of whose mixtures have the same options.
    state: Its last state.
    slots: Number of slots of an expert in each step; 0 gives all tokens room.
    num_rows: Number of rows, each of one document: B.

  Returns:
    loss, in nats a token; dropped, the share of choices.

  Raises:
    ValueError: There are fewer such rows.
  """
  batch = whole_rows(run, num_rows)
  model, tokens = stepping_model(run, slots), jnp.asarray(batch['tokens'])
  logits, chosen = read(model, run.programs.variables(state), tokens)
  masks = [np.asarray(layer.kept) for layer in (chosen or {}).values()]
  return {
    'loss': routing.mean_loss(logits, batch),
    'dropped': float(1 - np.mean(masks)) if masks else 0.0,
  }


def whole_rows(run: Run, num_rows: int) -> dict[str, np.ndarray]:
  """Validation rows of one document each, spread over the split.

  A model that decodes takes a row for one document.
  """
  examples = routing.spread_rows(run, 2 * num_rows)
  is_whole = (examples['segment_ids'] == 1).all(1)
  if (found := int(is_whole.sum())) < num_rows:
    raise InputError(f'num_rows={num_rows}, but {found} rows have one document')
  chosen = np.flatnonzero(is_whole)[np.array(spread(found, num_rows))]
  return {key: value[chosen] for key, value in examples.items()}


def stepping_model(run: Run, slots: int) -> Model:
  """The run's model with so many slots of an expert for the whole batch."""
  if not run.options.model.moe.num_experts:
    return routing.changed_model(run)
  return routing.changed_model(
    run,
    capacity=Fixed(slots=slots) if slots else All(),
    dispatch=Gather(),
    group_size=-1,
    # The tokens of one step are of one time, so that none sees a later one.
    allow_future_leak=True,
  )


def read(
  model: Model, variables: Variables, tokens: Int32[Array, 'B T']
) -> tuple[Float32[Array, 'B T V'], Choices]:
  """Logits at every token, and the choices of each step, token by token."""
  B, T = tokens.shape
  model, variables = generation.prepare(model, variables, batch_size=B)

  def step(cache, token):
    inputs = token[:, None], jnp.ones((B, 1), bool), cache
    output, chosen = recording(model, variables, *inputs, method='decode')
    logits, cache = output
    return cache, (logits[:, 0], chosen)

  cache = model.make_cache(B, T)
  logits, chosen = jax.lax.scan(step, cache, tokens.T)[1]
  return jnp.moveaxis(logits, 0, 1), chosen


def measure(run: Run, state: TrainState) -> dict[str, float]:
  """Measures rows that are read token by token, with each capacity.

  Returns:
    `steps/<slots a token>/<what>`: loss and dropped, see `measure_steps`.
  """
  return {
    f'steps/{slots}/{key}': value
    for slots in ROOM.values()
    for key, value in measure_steps(
      run, state, slots * ROWS // EXPERTS, ROWS
    ).items()
  }


def rows(results: parts.Results) -> list[Row]:
  """The dense twin, and each model with each capacity."""
  dense, *sparse = results
  table = [parts.row_of(dense, results[dense], [byte_models.LOSS])]
  for arm in sparse:
    for mode, key, dropped in (
      ('evaluated', 'eval/slots_', 'drop_rate'),
      ('generated', 'steps/', 'dropped'),
    ):
      for name, slots in ROOM.items():
        columns = [
          Column('loss', f'{key}{slots}/loss'),
          parts.percent('dropped', f'{key}{slots}/{dropped}'),
        ]
        row_name = f'{arm}; {mode} {name}'
        table.append(parts.row_of(row_name, results[arm], columns))
  return table


CLAIMS = {
  'of one slot a token in training, two in evaluation are better': (
    'loss: train 1; evaluated 2 < train 1; evaluated 1'
  ),
  'two slots a token are better than one, in training and evaluation': (
    'loss: train 2; evaluated 2 < train 1; evaluated 1'
  ),
  'what was dropped in training is missed where nothing is dropped': (
    'loss: train 2; evaluated no drops < train 1; evaluated no drops'
  ),
  "GShard's two slots a token lose nothing": Claim(
    'loss: train 2; evaluated 2 = no drops in training; evaluated no drops '
    'within 0.02',
    note='The bound is half of what experts are worth in such models, about '
    '0.04 nats a byte. A model with slots may see a little of the future; '
    'one that drops nothing does not.',
  ),
  'the sparse model beats its dense twin': (
    'loss: train 2; evaluated no drops < dense'
  ),
  'at two slots a token the steps of generation drop more than a batch': (
    'dropped: train 2; evaluated 2 < train 2; generated 2'
  ),
  **{
    f'{arm}: {slots} slots a token lower the quality of generation': (
      f'loss: {arm}; generated no drops < {arm}; generated {slots}'
    )
    for arm, slots in ((WIDE, 2), (WIDE, 1), (TIGHT, 1), (FREE, 2))
  },
}
STUDY = Study(
  name='glam_capacity',
  title='Capacity in training, evaluation and generation',
  source="GLaM's decoder (claims by reasoning)",
  config=config,
  arms=arms,
  rows=rows,
  presets={
    'quick': parts.trial(150, 3, why='drops have hardly cost anything'),
    'full': Preset(650, 5),
  },
  columns=[
    byte_models.LOSS,
    Column('dropped', 'eval/slots_1/drop_rate', '%', 1, bounds=parts.SHARE),
  ],
  claims=CLAIMS,
  measure=measure,
  gates={'loss: train 2; evaluated no drops < dense': ['*']},
  figure=Figure(['loss', 'dropped'], rows='slots a token'),
  remarks='"Generated" means that rows of a text are read token by token, 32 '
  'rows at a time, the tokens of a step being one group. These rows are not '
  'those of the evaluation. On 2026-11-29, when results were known, the words '
  'of the claims on quality in generation were changed, and no comparison.',
  written='2026-11-29',
)
get_config, get_items = command.entries(STUDY, __name__)
