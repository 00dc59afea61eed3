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
  Fewer,
  only,
  smaller,
)
from moe_jax.compression.fewer_command import (
  add_arguments,
  described,
  read,
  write,
  written_to,
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
  before: Calibrated, counts: Mapping[int, int], *, score: str = 'reap'
) -> dict[int, Fewer]:
  """The layers of a run with the experts of the highest scores, by number.

  Args:
    before: The run, measured.
    counts: The number of experts that stay in each sparse layer.
    score: One of `usage.SCORES`.
  """
  left = {}
  for n, layer in before.layers.items():
    order = np.argsort(-SCORES[score](before.usage[n]), kind='stable')
    left[n] = only(layer, sorted(order[: counts[n]].tolist()))
  return left


def probabilities(
  layer: SparseLayer, x: Float[Array, 'G S M']
) -> Float[Array, 'G S E']:
  """The softmax over all columns of a layer's router, for each token.

  It is what the router's gates are if they are raw and a token chooses every
  column.
  """
  old: Any = layer.moe.router
  raw = {'gates': 'raw', 'second_policy': 'all'}
  usual = default_of(fields_of(type(old))['second_threshold'])
  router = dataclasses.replace(old, second_threshold=usual, **raw)
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
    kept: The share of tokens that choose no expert that is gone.
    growth: The mean of 1 / (1 - p) - 1 over these tokens.
  """

  kept: float
  growth: float


def growth(before: Calibrated, left: Mapping[int, Fewer]) -> dict[int, Growth]:
  """The growth of raw gates on the calibration data, by layer.

  It is for layers that lose experts and whose gates are a softmax over all
  logits, of routers that read the token alone and not its sentence or task.
  """
  wanted = tuple(
    (n, fewer.row)
    for n, fewer in left.items()
    if fewer.num_experts < len(fewer.row)
    and getattr(before.layers[n].moe.router, 'gates', '') == 'raw'
    and not before.layers[n].moe.router.needs_ids
  )
  sums = [
    _growth(before.run.model, before.run.variables, batch, wanted)
    for batch in before.batches
    if wanted
  ]
  found = {}
  for n, _ in wanted:
    tokens, kept, grown = np.sum([np.asarray(own[n]) for own in sums], axis=0)
    found[n] = Growth(kept / max(tokens, 1), grown / max(kept, 1))
  return found


@functools.partial(jax.jit, static_argnames=('model', 'wanted'))
def _growth(
  model: Model,
  variables: Mapping[str, Any],
  batch: Mapping[str, Leaf],
  wanted: tuple[tuple[int, tuple[int, ...]], ...],
) -> dict[int, Float[Array, ' 3']]:
  reached = capture(model, variables, batch)
  layers = sparse_layers(model, variables['params'])
  sums = {}
  for n, row in wanted:
    routing, gone = reached[n].routing, jnp.array(row) < 0  # [E]
    p = jnp.where(gone, probabilities(layers[n], reached[n].x), 0.0).sum(-1)
    seen = routing.kept.any(-1)
    kept = seen & ~(gone[routing.expert_index] & routing.kept).any(-1)
    grown = jnp.where(kept, p / (1 - p), 0.0).sum()
    sums[n] = jnp.stack([seen.sum(), kept.sum(), grown])
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
  before, counts = read(options, overrides, options.score)
  left = prune(before, counts, score=options.score)
  model, variables = smaller(before.run, left, options.router)
  folder = write(before, options.output, model, variables)
  lines = described(before, variables['params'], left)
  for n, fewer in left.items():
    gone = [e for e, to in enumerate(fewer.row) if to < 0]
    lines.append(f'layer {n}: without experts {gone}')
  if options.router == SHRUNK:
    lines += [
      f'layer {n}: raw gates become those of a softmax over what stays; '
      f'{own.kept:.1%} of tokens choose no expert that is gone, and their '
      f'outputs grow by 1 / (1 - p) - 1 = {own.growth:.2%} in the mean, p '
      'being the probability of what is gone'
      for n, own in growth(before, left).items()
    ]
  return '\n'.join([*lines, written_to(folder, before)])
