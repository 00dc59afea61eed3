"""Which product of a sparse layer may be in 8-bit floats?

    python -m experiments.fp8_products --preset=quick

DeepSeek-V3 (https://arxiv.org/abs/2412.19437, section 3.3) has the products of
linear layers in e4m3, 4 bits of exponent and 3 of mantissa, in the forward and
the backward pass; a scale is shared by 128 numbers of a row of activations, and
by 128 x 128 of a kernel. Rows on their way to experts are e4m3, too, as are
gradients on theirs; what comes back from experts is bfloat16. Router, norms,
attention itself, embeddings and output head stay in higher precision. This is
its configuration as the report tells it; the report has no table by product,
and none of its numbers is printed here.

Here: a two-layer byte-level decoder, top-2 of 8 experts with SwiGLU, whose
products are gate, up and down. Unlike there, the projections of attention are
never rounded, and what is not rounded is float32. Operands are rounded and
multiplied in float32 (`study/float8.py`), so that the study is about quality
alone; a processor's own sums may have fewer bits.

First, on the weights of a trained float32 model, one product at a time is
rounded to e4m3 or e5m2, with a scale for each tensor (of a kernel, of all
experts together) or for each row, and so is one direction of the wire: dispatch
is rows to experts and gradients to experts, combine is both ways back. Second,
two arms are trained as DeepSeek-V3's configuration says, one of them with the
router in e4m3 as well. Rows are 64 or 128 wide, so that a tile of activations
is a row, and one of a kernel is a whole expert's.

The moved loss is the mean absolute change of a byte's loss, the added loss the
change of the mean, and the gradient error the norm of the change of all
parameters' gradient by the norm of the gradient, each over four validation
batches. That trained arms are alike is judged by 0.01 nats a byte, about what
five seeds resolve in `switch_table2`; it was chosen before any run.

The quick preset decides nothing. The full preset, 4 arms and 5 seeds after a
search of the learning rate, was planned for 40 core minutes; its runs took 58.
The claims were written before any run.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.study import byte_models, command, float8, parts, routing
from experiments.study.parts import Arm, Column, Figure, Preset, Row
from experiments.study.study import Study
from moe_jax.models import Model
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

EXACT, ROUTER, SAME, BATCHES = 'float32', 'router', 0.01, 4
V3, V3_ROUTER = 'float8 as in DeepSeek-V3', 'float8, router too'
AFTER, AFTER_ROUTER = (f'float32, then {name}' for name in (V3, V3_ROUTER))
# What is rounded on the weights of float32, and how, by the row's name.
CASES = {
  f'{product}, {kind}, by {scaling}': (product, float8.Rounding(kind, scaling))
  for product in (ROUTER, *float8.PRODUCTS)
  for kind in float8.FLOAT_TYPES
  for scaling in ('tensor', 'row')
}
_PRODUCTS = float8.Float8Expert().products
CASES[AFTER] = _PRODUCTS, float8.Rounding()
CASES[AFTER_ROUTER] = f'{_PRODUCTS} {ROUTER}', float8.Rounding()
MEASURES = [
  Column('moved loss', 'routing/*/moved', 'nats/byte', 5),
  Column('added loss', 'routing/*/added', 'nats/byte', 5),
  Column('gradient error', 'routing/*/error', '%', 2),
]


def config(steps: int):
  """The config of the float32 model."""
  config = byte_models.decoder(
    steps, num_experts=8, num_selected=2, expert_hidden=128, drops=False
  )
  config.model.ffn.activation = 'swiglu'
  config.model.moe.router.token_choice.gates = 'renormalized'
  return config


def arms(_: Preset) -> list[Arm]:
  """The dense twin, both float8 models, and float32, which is measured."""
  experts = {'expert.kind': 'experiments.study.float8:Float8Expert'}
  router = {
    'router.kind': 'experiments.study.float8:Float8TokenChoice',
    'router.custom': {'gates': 'renormalized'},
  }
  return [
    byte_models.dense(),
    byte_models.of_moe(V3, experts),
    byte_models.of_moe(V3_ROUTER, {**experts, **router}),
    Arm(EXACT, {}),
  ]


@functools.partial(jax.jit, static_argnames='model')
def losses_and_gradient(
  model: Model, variables: dict[str, Any], batch: routing.Batch
) -> tuple[jax.Array, Any]:
  """The part that each byte has in the loss of a batch, and its gradient."""
  shares = batch['loss_weights'] / batch['loss_weights'].sum()

  def loss(params):
    inputs = model.inputs(batch)
    outputs, _ = model.apply({**variables, 'params': params}, **inputs)
    nats = model.loss(outputs, batch).nats * shares
    return nats.sum(), nats

  gradient, nats = jax.grad(loss, has_aux=True)(variables['params'])
  return nats, gradient


def rounded(run: Run, products: str, rounding: float8.Rounding) -> Model:
  """The model of a float32 run with rounded products; see `CASES`."""
  moe, names = run.options.model.moe, products.replace(ROUTER, '')
  expert = dict(vars(moe.expert), products=names, rounding=rounding)
  changed: dict[str, Any] = {'expert': float8.Float8Expert(**expert)}
  if ROUTER in products:
    router = dict(vars(moe.router), rounding=rounding)
    changed[ROUTER] = float8.Float8TokenChoice(**router)
  return routing.changed_model(run, **changed)


def measure(run: Run, state: TrainState) -> dict[str, float]:
  """What rounding changes in a trained float32 model; see `CASES`."""
  moe, numbers = run.options.model.moe, {}
  if not moe.num_experts or isinstance(moe.expert, float8.Float8Expert):
    return {}
  batches = routing.batches(run, BATCHES)
  variables = run.programs.variables(state)
  exact = [losses_and_gradient(run.model, variables, b) for b in batches]
  for name, case in CASES.items():
    model, errors = rounded(run, *case), []
    for batch, (nats, gradient) in zip(batches, exact, strict=True):
      new, other = losses_and_gradient(model, variables, batch)
      change, difference = new - nats, optax.tree.sub(other, gradient)
      error = 100 * optax.tree.norm(difference) / optax.tree.norm(gradient)
      errors.append([jnp.abs(change).sum(), change.sum(), error])
    means = np.mean(errors, axis=0).tolist()
    numbers[name] = dict(zip(('moved', 'added', 'error'), means, strict=True))
  return routing.named(numbers)


def rows(results: parts.Results) -> list[Row]:
  """A row of each trained arm, and of each case on the float32 weights."""
  names = 'dense', V3, V3_ROUTER, EXACT
  trained = [parts.row_of(n, results[n], [byte_models.LOSS]) for n in names]
  exact = results[EXACT]
  return trained + [routing.row_at(n, exact, MEASURES, n) for n in CASES]


# Which product is said to move the loss more than which others.
_MORE = {ROUTER: ['gate', 'up', 'down'], 'down': ['gate', 'up']}
CLAIMS = {
  **{
    f'rounding {one} moves the loss more than rounding {other}': (
      f'moved loss: {one}, e4m3, by row > {other}, e4m3, by row'
    )
    for one, others in {**_MORE, 'combine': ['dispatch']}.items()
    for other in others
  },
  **{
    f'scales by row make the gradient error of {name} smaller': (
      f'gradient error: {name}, e4m3, by row < {name}, e4m3, by tensor'
    )
    for name in (ROUTER, 'gate', 'up', 'down')
  },
  **{
    f'with a scale for each tensor, e4m3 is better for gradients of {name}': (
      f'gradient error: {name}, e4m3, by tensor < {name}, e5m2, by tensor'
    )
    for name in (ROUTER, 'gate', 'up', 'down')
  },
  'rounding trained weights as DeepSeek-V3 costs': f'added loss: {AFTER} > 0',
  'rounding the router costs more': f'added loss: {AFTER_ROUTER} > {AFTER}',
  **{
    f'{name}, a model is as good as in float32': (
      f'loss: {name} = {EXACT} within {SAME}'
    )
    for name in (V3, V3_ROUTER)
  },
  'training the router in float8 costs': f'loss: {V3_ROUTER} > {V3}',
}
STUDY = Study(
  name='fp8_products',
  title='Which product of a sparse layer may be in 8-bit floats',
  source='DeepSeek-V3, section 3.3 (its configuration alone)',
  config=config,
  arms=arms,
  rows=rows,
  presets={'quick': parts.trial(100, 3), 'full': Preset(600, 5)},
  columns=[byte_models.LOSS, *MEASURES],
  claims=CLAIMS,
  measure=measure,
  rates=(1e-3, 3e-3, 1e-2, 3e-2),
  gates={f'loss: {EXACT} < dense': ['*']},
  figure=Figure(['moved loss', 'gradient error'], without=['dense', 'float*']),
  remarks='Rows with a format round one product of the trained float32 model, '
  "forward and backward. Moved loss is the mean absolute change of a byte's "
  'loss, added loss the change of the mean, and gradient error the norm of the '
  'change by the norm of the gradient. e4m3 has 4 bits of exponent, e5m2 5.',
  written='2026-12-01',
)
get_config, get_items = command.entries(STUDY, __name__)
