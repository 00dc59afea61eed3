"""Sums over the tokens of a batch, and the row of metrics made of the sums."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from moe_jax.devices import fetch
from moe_jax.errors import InputError
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.routers import ROUTERS
from moe_jax.routing.stats import MoeAux, drop_rate, load_summary
from moe_jax.shapes import Array, Bool

Batch = dict[str, Array]


class LossSums(NamedTuple):
  """Sums over the tokens of a batch; `add` merges the sums of two batches.

  Attributes:
    cross_entropy: float32 [], sum of nats times loss weights.
    weight: float32 [], sum of loss weights.
    logits_z: float32 [], sum of squared logsumexps of logits times weights.
    aux: Losses and statistics of the layers' routers, every leaf [L, ...].
    choices: The choices of experts, one by one and not summed, where the step
      records them; see `moe_jax.models.recorded.Choices`.
  """

  cross_entropy: Array
  weight: Array
  logits_z: Array
  aux: MoeAux
  choices: Any = None


class StepMetrics(NamedTuple):
  """Metrics of one optimizer step.

  Attributes:
    loss: float32 [], the loss that was minimised.
    sums: Sums over the batch.
    grad_norm: float32 [], the norm of the gradient before clipping.
    learning_rate: float32 [], the learning rate before the factors by parameter
      of `optimizer.rate_rules`.
    finite: bool [N], whether each floating-point leaf of the state after the
      step, but for the optimizer's state, is finite, in the order of
      `moe_jax.runs.finite.names`.
  """

  loss: Array
  sums: LossSums
  grad_norm: Array
  learning_rate: Array
  finite: Bool[Array, ' N']


def add(a: LossSums, b: LossSums) -> LossSums:
  """Merges the sums of two batches."""
  return jax.tree.map(lambda x, y: x + y, a, b)


# The losses that every row has; a row has other losses where they are not 0.
_ALWAYS_WRITTEN = ('balance_loss', 'z_loss', 'importance_loss', 'load_loss')


def host(sums: LossSums) -> LossSums:
  """The sums as numpy float64, which can be added without losing small counts.

  Every process has to call this.
  """
  return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), fetch(sums))


def sparse_layers(sums: LossSums) -> list[int]:
  """Indices, from 0, of the layers with a router."""
  return [int(i) for i in np.flatnonzero(sums.aux.stats.tokens)]


def summarize(
  sums: LossSums, moes: Sequence[MoeOptions | None]
) -> dict[str, Any]:
  """A row of metrics: `loss`, `drop_rate`, and each router's `layer_<i>/...`.

  The loss is in nats per token. The drop rate is the fraction of choices of
  experts that were dropped, averaged over sparse layers; `load` is the fraction
  of all choices that fall on each expert, before drops. With
  `moe.force_balance` a row has `forced_balance`, which is 1.

  Args:
    sums: Sums as `host` gives them.
    moes: The options of each layer's mixture of experts, None for a dense
      layer; they say how many experts and choices the layer has.
  """
  row = {'loss': float(sums.cross_entropy / max(sums.weight, 1e-9))}
  layers = {i: layer_summary(sums, i, moes) for i in sparse_layers(sums)}
  if layers:
    drops = [layer['drop_rate'] for layer in layers.values()]
    row['drop_rate'] = float(np.mean(drops))
  if any(moe is not None and moe.forced for moe in moes):
    row['forced_balance'] = 1.0
  for i, layer in layers.items():
    row |= {f'layer_{i}/{key}': value for key, value in layer.items()}
  return row


def layer_summary(
  sums: LossSums, layer: int, moes: Sequence[MoeOptions | None]
) -> dict[str, Any]:
  """The metrics, by name, of the router of layer `layer`, counted from 0.

  They are `drop_rate`, `entropy` and `router_logit_rms`, the losses per token,
  the lists `load` and `kept_load`, numbers made of `load`, such as
  `load_max_over_mean`, rates by the rank k of a choice, such as
  `drop_rate_choice_<k>`, and those that `exchange_summary` returns.

  `sums` are those that `host` gives; `moes` are the options of each layer's
  mixture of experts, None for a dense layer.

  Raises:
    ValueError: A user's own router chose experts that the layer lacks.
  """
  aux = jax.tree.map(lambda leaf: leaf[layer], sums.aux)
  moe = cast(MoeOptions, moes[layer])
  # Layers of an encoder and a decoder may differ in E and K. Statistics have
  # the largest E and K of all layers, filled up with zeros, which are cut off.
  E, K = moe.num_experts, moe.num_selected
  stats = aux.stats._replace(
    load=aux.stats.load[:E],
    kept_load=aux.stats.kept_load[:E],
    overflowed=aux.stats.overflowed[:K],
    unsent=aux.stats.unsent[:K],
  )
  tokens, K = stats.tokens, len(stats.overflowed)
  if not moe.router.by_expert:
    counted = stats.load.sum()
    # In float32 a device adds counts beyond 2^24 with errors.
    if not np.isclose(counted, tokens * K, rtol=1e-5):
      raise InputError(
        f'layer {layer}: {counted:.0f} of the {tokens * K:.0f} choices that '
        f'the router {ROUTERS.name_of(moe.router)!r} made are of the experts 0 '
        f'to {len(stats.load) - 1}, which the layer has'
      )
  by_rank, overall = drop_rate(stats)
  values = {
    'drop_rate': float(overall),
    **load_summary(np.asarray(stats.load)),
    'entropy': float(stats.entropy / tokens),
    'router_logit_rms': float(np.sqrt(stats.logit_square / tokens)),
  }
  if K > 1:
    for k in range(K):
      values[f'drop_rate_choice_{k + 1}'] = float(by_rank[k])
      values[f'unsent_rate_choice_{k + 1}'] = float(stats.unsent[k] / tokens)
  values |= exchange_summary(aux)
  values |= dict.fromkeys(_ALWAYS_WRITTEN, 0.0)
  values |= {
    name: float(loss / tokens) for name, loss in aux.losses.items() if loss
  }
  # Six digits resolve a millionth; more would double the metrics file.
  values['load'] = np.round(stats.load / (tokens * K), 6).tolist()
  values['kept_load'] = np.round(stats.kept_load / (tokens * K), 6).tolist()
  return values


def exchange_summary(aux: MoeAux) -> dict[str, float]:
  """The metrics of a layer's exchange between devices; {} on one device.

  Three metrics are shares of the choices that were served: `away_share`, those
  whose expert is on another device; `sent_share`, those whose token was sent to
  that device, which are fewer where experts are sent instead; and
  `exchange_overflow`, those for whose token the exchange had no room.
  `shadowed_experts` is the mean number of experts that were sent to all
  devices.

  Args:
    aux: The sums of one layer, as `host` gives them.
  """
  exchange, served = aux.exchange, float(aux.stats.kept_load.sum())
  if not exchange.choices or not served:
    return {}
  return {
    'away_share': float(exchange.away / served),
    'sent_share': float(exchange.sent / served),
    'shadowed_experts': float(exchange.shadowed / exchange.choices),
    'exchange_overflow': float(exchange.overflow / served),
  }
