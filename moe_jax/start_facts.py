"""Lines on what a run takes and is: its steps, data, model and devices.

A run prints them at its start, and `--dry_run` instead of it.
"""

from collections.abc import Iterator
from typing import cast

import jax
from jax.sharding import Mesh

from moe_jax import models
from moe_jax.analysis import cost, roofline, run_cost
from moe_jax.kernels import grouped_products
from moe_jax.layers.experts import DISPATCHES, Dispatch, Dropless
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.routers import ROUTERS
from moe_jax.layers.shared import Numerics
from moe_jax.training import chosen_experts
from moe_jax.training.optimizer import is_names
from moe_jax.training.parameter_rules import is_role
from moe_jax.training.programs import Programs
from moe_jax.training.run_options import RunOptions
from moe_jax.training.setup import Run

LEAK = (
  'moe.allow_future_leak=True: later tokens can change earlier outputs; losses '
  'are not those of a causal model'
)


def warnings(model: models.Model) -> list[str]:
  """Warnings on a model that every result has to give."""
  texts = [LEAK] if model.leaks_future else []
  return texts + [model.forced_balance] * bool(model.forced_balance)


def cost_line(options: RunOptions, model: models.Model, mesh: Mesh) -> str:
  """A line on what a run takes; matrix products of a device are timed for it.

  Args:
    options: The options of the run, after `filled`.
    model: The model of the run.
    mesh: The mesh of the run.
  """
  total_cost = run_cost.run_cost(options, model)
  if not total_cost.flops:
    return f'run: {total_cost.describe()}'
  dtype = getattr(options.model, 'numerics', Numerics()).dtype
  rate, _ = roofline.product_rate(dtype)
  rate *= roofline.num_processors(list(mesh.devices.flat))
  return f'run: {total_cost.describe()}; {total_cost.time(rate)}'


def facts(run: Run) -> Iterator[str]:
  """Lines on the data, the model and the devices of a run."""
  yield run.dataset.describe()
  lengths = run.options.data.seq_len, run.options.data.target_len
  yield cost.count(run.model, *lengths).describe()
  if run.model.moe is not None:
    yield _experts(run, run.model.moe)
    for text in warnings(run.model):
      yield f'WARNING: {text}'
  yield from trained_lines(run.options, run.programs)
  yield from optimizer_lines(run.options, run.programs)
  yield devices_line(run.mesh)


def devices_line(mesh: Mesh) -> str:
  """A line on the devices of a mesh."""
  return f'devices: {roofline.describe_mesh(mesh)}'


def trained_lines(options: RunOptions, programs: Programs) -> Iterator[str]:
  """A line on the parameters that train, if not all do."""
  params, trained = programs.abstract_state.params, programs.trained
  if trained.expression == 'all' and not trained.masks:
    return
  count = trained.count(trained.part(params))
  file = options.trained_experts
  total = sum(leaf.size for leaf in jax.tree.leaves(params))
  subset, lora = f'trainable={options.trainable!r}', options.lora
  if lora.rank:
    subset = f'adapters of rank {lora.rank} on {lora.parts!r}'
  if file:
    subset += f', {chosen_experts.read(file).describe()}'
  yield (
    f'{subset}: {count:,} of {total:,} parameters train ({count / total:.1%}); '
    'the others keep their values'
  )


def optimizer_lines(options: RunOptions, programs: Programs) -> Iterator[str]:
  """Lines on what the optimizer makes of the parameters that train."""
  trained, trees = programs.trained, programs.adapters.trees
  yield from options.optimizer.facts(
    trained.part(trees.shapes),
    trained.part(programs.adapters.matrix_axes, is_leaf=is_names),
    trained.part(trees.roles, is_leaf=is_role),
  )


def _experts(run: Run, moe: MoeOptions) -> str:
  return (
    f'sparse layers {list(run.model.sparse_layers)}: {_counts(run)} experts,'
    f' {moe.num_selected} selected, router {ROUTERS.name_of(moe.router)!r}, '
    f'dispatch {_dispatch(run, moe.dispatch)}'
  )


def _counts(run: Run) -> str:
  """The number of experts of all sparse layers, or that of each."""
  moes = [moe for moe in run.model.moes if moe is not None]
  counts = [moe.num_retained for moe in moes]
  return str(counts[0] if len(set(counts)) == 1 else counts)


def _dispatch(run: Run, dispatch: Dispatch) -> str:
  name = repr(DISPATCHES.name_of(dispatch))
  if dispatch.by_slot:
    return name
  platform = run.mesh.devices.flat[0].platform
  platform = 'cuda' if platform == 'gpu' else platform
  products = grouped_products.describe(
    cast(Dropless, dispatch).backend, platform
  )
  return f'{name} (grouped products: {products})'
