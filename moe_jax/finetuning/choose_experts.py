"""The experts that a task uses most, chosen from data, layer by layer.

Expert-specialised fine-tuning (https://arxiv.org/abs/2407.01906) chooses in
each layer the fewest experts whose shares of the use reach p. The use of an
expert is its mean gate, or the share of choices that fall on it. Unlike in the
paper, means are over all tokens of packed rows, not first over the tokens of
each sample, and a share of gates is a share of the sum of the layer's gates.
"""

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Float

from moe_jax import data
from moe_jax.config import Option, unknown
from moe_jax.devices import fetch
from moe_jax.errors import InputError
from moe_jax.finetuning.upcycling import equal_experts
from moe_jax.layers.routers.contract import Router, sown
from moe_jax.models import Model
from moe_jax.shapes import Array, Leaf
from moe_jax.training import trained
from moe_jax.training.trainable import ChosenExperts

SHARE = Option(above=0, maximum=1)
_SOWN_NAME = 'use'


# The use of each expert, [E], from a layer's routing and auxiliary outputs.
SCORES: Mapping[str, Callable[..., Array]] = {
  # The sum of the expert's gates; dropped choices have no gate.
  'gate': lambda routing, _: routing.token_gates().sum((0, 1)),
  # The number of choices of the expert, before any is dropped.
  'tokens': lambda _, aux: aux.stats.load,
}


def shares(
  model: Model,
  variables: Mapping[str, Any],
  batches: Iterable[Mapping[str, Leaf]],
  score: str = 'gate',
) -> dict[int, Float[np.ndarray, ' E']]:
  """The share of each expert in the use of all experts of its layer.

  The use of an expert is its mean gate, or its number of choices. The result is
  by the index of the sparse layer.

  Args:
    model: The model.
    variables: The variables of the model.
    batches: Batches of the task.
    score: 'gate', by the mean gate, or 'tokens', by the share of choices.

  Raises:
    ValueError: The score is unknown, the model has no sparse layer, its sparse
      layers have merged or unequally many experts, or in some layer no token
      reaches an expert.
  """
  if score not in SCORES:
    raise unknown('score', score, SCORES)
  if not model.stacks.sparse_layers:
    raise InputError('the model has no sparse layers, so no experts to choose')
  if not equal_experts(model):
    raise InputError(
      'the sparse layers have other numbers of experts than columns of their '
      'routers, or than each other, as merging and pruning leave them; experts '
      'are chosen in models with equally many'
    )
  measure = jax.jit(functools.partial(_use, model, score))
  uses = [np.stack(fetch(measure(variables, batch))) for batch in batches]
  total = np.asarray(uses, np.float64).sum(0)
  if not uses or not total.sum(1).all():
    raise InputError('no batch, or none with a token that reaches an expert')
  return {
    layer: layer_use / layer_use.sum()
    for layer, layer_use in zip(model.stacks.sparse_layers, total, strict=True)
  }


def chosen(
  shares_of: Mapping[int, Float[np.ndarray, ' E']], share: float
) -> dict[int, tuple[int, ...]]:
  """The fewest experts of each layer whose shares sum up to `share` or more.

  Experts of the largest shares are taken first; ties go to the lower index.
  `shares_of` and the result, ascending indices, are by the layer's index.

  Raises:
    ValueError: `share` is not in (0, 1].
  """
  if problem := SHARE.problem('share', share):
    raise InputError(problem)
  layers = {}
  for layer, layer_shares in shares_of.items():
    order = np.argsort(-layer_shares, kind='stable')
    # If the shares of the first experts sum up to just `share`, rounding must
    # not add one more expert.
    is_reached = np.cumsum(layer_shares[order]) >= share - 1e-9
    layers[layer] = tuple(sorted(map(int, order[: 1 + is_reached.argmax()])))
  return layers


def choose(
  workdir: str | os.PathLike[str],
  *,
  share: float,
  score: str = 'gate',
  num_batches: int = 8,
  options: data.DataOptions | None = None,
  allow: Iterable[str] = (),
) -> ChosenExperts:
  """Chooses the experts of a run that some data uses most.

  Args:
    workdir: Folder of the run.
    share: The share p of each layer's use that the chosen experts reach.
    score: 'gate', use by the mean gate, or 'tokens', by the share of choices.
    num_batches: Number of batches of the training split, as a run that begins
      with the seed 0 reads them.
    options: The options of the task's data; None takes those of the run.
    allow: Modules whose classes, named in the run's folder, may be imported.

  Raises:
    ValueError: `share` is not in (0, 1]; the folder holds no run; the data has
      other tokens or tasks than the run; the model has no sparse layers, or
      merged or unequally many experts; or no token reaches an expert.
    CheckpointError: No checkpoint is good.
  """
  run = trained.load(workdir, allow=allow)
  dataset = run.options.load_data(workdir, options)
  stream = data.train_batches(
    dataset.splits['train'], batch_size=run.options.batch_size, seed=0, start=0
  )
  batches = [next(stream) for _ in range(num_batches)]
  by_layer = shares(run.model, run.variables, batches, score)
  about = {
    'score': score,
    'share': share,
    'workdir_step': run.step,
    'data_digest': dataset.digest,
    'num_batches': num_batches,
    'shares': {
      str(i): [round(float(x), 6) for x in layer_shares]
      for i, layer_shares in by_layer.items()
    },
  }
  E = run.model.stacks.mixtures[-1].num_experts
  return ChosenExperts(E, chosen(by_layer, share), about)


def _use(model: Model, score: str, variables, batch) -> list[Array]:
  """The sum of each expert's gates, or choices, over the tokens of a batch.

  `score` is a key of `SCORES`. There is a float32 array [E] for each sparse
  layer.
  """
  measure = SCORES[score]

  def sow_use(call, args, kwargs, context):
    outputs = call(*args, **kwargs)
    if isinstance(context.module, Router) and context.method_name == '__call__':
      use = jax.lax.stop_gradient(measure(*outputs))
      context.module.sow('intermediates', _SOWN_NAME, use.astype(jnp.float32))
    return outputs

  with nn.intercept_methods(sow_use):
    _, collections = model.apply(
      variables, **model.inputs(batch), mutable=['intermediates']
    )
  layers = model.stacks.layer_trees(collections['intermediates'])
  return [sown(layers[i])[_SOWN_NAME] for i in model.stacks.sparse_layers]
