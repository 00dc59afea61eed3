"""Pruning of experts: those of the highest scores stay.

    python -m moe_jax.compression prune --run=runs/tiny --output=runs/half \
      --experts=4 --score=reap --router=shrunk --batches=8

The score is the usage, the mean gate, or REAP's mean of gate times norm of
output (https://arxiv.org/abs/2510.13999). An expert that no calibration token
reaches has the score 0 and goes first; ties go to the lower number.

A router either keeps the columns of experts that are gone, which are never
chosen, so that gates stay those of the softmax over all; or it loses them. What
tokens do that choose no expert that is gone:

- With columns masked, or with gates that sum to one over the chosen experts,
  or with gates that are each a sigmoid, nothing changes.
- With raw gates and a shrunk router, the softmax is over the experts that stay:
  a gate g becomes g / (1 - p), where p is the sum of the probabilities of the
  experts that are gone. So the layer's output y becomes y / (1 - p).
- Where a token chooses groups of experts first, a shrunk router forms as many
  groups anew, of the columns that it still has. Unless the old groups keep as
  many experts each, tokens choose otherwise, and the command says so.
"""

import argparse
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from moe_jax import command_line
from moe_jax.compression.calibration import capture
from moe_jax.compression.fewer import (
  SHRUNK,
  Calibrated,
  SmallerLayer,
  only,
  smaller,
)
from moe_jax.compression.fewer_command import (
  add_arguments,
  closing_lines,
  read,
  report_lines,
  write,
)
from moe_jax.compression.usage import SCORES
from moe_jax.layers.routers.contract import ROUTER_STATE
from moe_jax.layers.routers.sizes import Sizes
from moe_jax.models import Model
from moe_jax.models.expert_arrays import SparseLayer, sparse_layers
from moe_jax.options import default_of, fields_of
from moe_jax.routing.capacity import All
from moe_jax.shapes import Array, Leaf

ROUTERS = ('masked', SHRUNK)


def prune(
  original: Calibrated, counts: Mapping[int, int], *, score: str = 'reap'
) -> dict[int, SmallerLayer]:
  """The layers of a run with the experts of the highest scores, by number.

  Args:
    original: The run with the statistics of its experts.
    counts: The number of experts that stay in each sparse layer.
    score: One of `usage.SCORES`.
  """
  new_layers = {}
  for n, layer in original.layers.items():
    order = np.argsort(-SCORES[score](original.usage[n]), kind='stable')
    new_layers[n] = only(layer, sorted(order[: counts[n]].tolist()))
  return new_layers


def probabilities(
  layer: SparseLayer, x: Float[Array, 'G S M']
) -> Float[Array, 'G S E']:
  """The softmax over all columns of a layer's router, for each token.

  They are the router's gates if gates are raw, without a factor, and a token
  chooses every column.
  """
  options: Any = layer.moe.router
  changes: dict[str, Any] = {'gates': 'raw', 'second_policy': 'all'}
  if hasattr(options, 'gate_scale'):
    changes['gate_scale'] = 1.0
  threshold = default_of(fields_of(type(options))['second_threshold'])
  router = dataclasses.replace(options, second_threshold=threshold, **changes)
  E = layer.moe.num_experts
  module = router.module(Sizes(E, E, All()), layer.shared)
  params = {path[-1]: array for path, array in layer.columns.items()}
  mask = jnp.ones(x.shape[:2], bool)
  # All columns are chosen, whatever a balancing bias is: it begins as zeros.
  (routing, _), _ = module.apply(
    {'params': params}, x, mask, mutable=[ROUTER_STATE]
  )
  return routing.token_gates()


class Growth(NamedTuple):
  """The change of raw gates where a router shrinks.

  Attributes:
    token_share: The share of tokens that choose no expert that is gone.
    growth: The mean of 1 / (1 - p) - 1 over these tokens.
  """

  token_share: float
  growth: float


def growth(
  original: Calibrated, new_layers: Mapping[int, SmallerLayer]
) -> dict[int, Growth]:
  """The growth of raw gates on the calibration data, by layer.

  The layers are those that lose experts and whose gates are a softmax over all
  logits, of routers that read the token alone and not its sentence or task.
  """
  rows = tuple(
    (n, layer.row)
    for n, layer in new_layers.items()
    if layer.num_experts < len(layer.row)
    and getattr(original.layers[n].moe.router, 'gates', '') == 'raw'
    and not original.layers[n].moe.router.needs_ids
  )
  sums = [
    _growth(original.run.model, original.run.variables, batch, rows)
    for batch in original.batches
    if rows
  ]
  growths = {}
  for n, _ in rows:
    tokens, intact, total = np.sum([np.asarray(s[n]) for s in sums], axis=0)
    growths[n] = Growth(intact / max(tokens, 1), total / max(intact, 1))
  return growths


@functools.partial(jax.jit, static_argnames=('model', 'rows'))
def _growth(
  model: Model,
  variables: Mapping[str, Any],
  batch: Mapping[str, Leaf],
  rows: tuple[tuple[int, tuple[int, ...]], ...],
) -> dict[int, Float[Array, ' 3']]:
  tokens = capture(model, variables, batch)
  layers = sparse_layers(model, variables['params'])
  sums = {}
  for n, row in rows:
    routing, is_gone = tokens[n].routing, jnp.array(row) < 0  # [E]
    p = jnp.where(is_gone, probabilities(layers[n], tokens[n].x), 0.0).sum(-1)
    is_served = routing.kept.any(-1)
    lost_choices = is_gone[routing.expert_index] & routing.kept
    is_intact = is_served & ~lost_choices.any(-1)
    growth_sum = jnp.where(is_intact, p / (1 - p), 0.0).sum()
    sums[n] = jnp.stack([is_served.sum(), is_intact.sum(), growth_sum])
  return sums


def add(commands: Any) -> None:
  """Adds the command to a parser's commands."""
  parser = commands.add_parser(
    'prune',
    help='removes the least useful experts',
    **command_line.about(__doc__),
  )
  parser.set_defaults(run=_run)
  add_arguments(parser, ROUTERS, SHRUNK)
  parser.add_argument(
    '--score',
    choices=[*SCORES],
    default='reap',
    help='the share of choices, the mean gate over all tokens, or the mean of '
    'gate times norm of output over the tokens of an expert',
  )


def _run(options: argparse.Namespace, overrides: list[str]) -> str:
  original, counts = read(options, overrides, options.score)
  new_layers = prune(original, counts, score=options.score)
  model, variables = smaller(original.run, new_layers, options.router)
  folder = write(original, options.output, model, variables)
  lines = report_lines(
    original, variables['params'], new_layers, options.router
  )
  for n, layer in new_layers.items():
    lost = [e for e, index in enumerate(layer.row) if index < 0]
    lines.append(f'layer {n}: without experts {lost}')
  if options.router == SHRUNK:
    lines += [
      f'layer {n}: raw gates become those of a softmax over what stays; '
      f'{change.token_share:.1%} of tokens choose no expert that is gone, and '
      f'their outputs grow by 1 / (1 - p) - 1 = {change.growth:.2%} in the '
      'mean, p being the probability of what is gone'
      for n, change in growth(original, new_layers).items()
    ]
  return '\n'.join([*lines, closing_lines(folder, original)])
