"""The rows of each device that choose each expert, recorded or drawn.

A batch's tokens are laid over the W devices in blocks, in their order. All
choices count, those that a capacity dropped as well, since FastMoE drops none.
"""

import pathlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.faster_moe.clusters import Cluster
from moe_jax.analysis import traces
from moe_jax.errors import InputError
from moe_jax.routing.limited_rules import limited_choice
from moe_jax.shapes import Float, Int

# Experts that are popular in draws, and the share of tokens of each: the skew
# that the paper observed among 16 experts.
HOT, SHARE = 4, 0.2
DRAWN = ('skewed', 'uniform')


class DoesNotDivide(ValueError):
  """Experts or tokens cannot be divided over the devices of a cluster."""


class Chosen(NamedTuple):
  """The choices of all tokens of a batch in one layer.

  Attributes:
    expert: The experts of each token, -1 for none, [N, K].
    logits: The logits of all experts, [N, E]; None if they are not recorded.
    num_experts: E, the number of experts.
  """

  expert: Int[np.ndarray, 'N K']
  logits: Float[np.ndarray, 'N E'] | None
  num_experts: int


class Counts(NamedTuple):
  """The rows of a series of batches, on the devices of a cluster.

  Attributes:
    counts: The number of rows of each device that choose each expert, in each
      of R batches and layers.
    gated: The same under the topology-aware gate; None where a cluster has no
      nodes, or logits are not recorded.
    rows: The number of simulated rows that each recorded row stands for.
    outgoing: The share of a device's tokens that the gate lets leave its node,
      rounded down to whole tokens; 1.0 where there is no gate.
  """

  counts: Int[np.ndarray, 'R E W']
  gated: Int[np.ndarray, 'R E W'] | None
  rows: float
  outgoing: float = 1.0


def recorded(folder: str | pathlib.Path, most: int = 0) -> Iterator[Chosen]:
  """The choices in a trace, of decoders where a model has an encoder too.

  They are those of training if it was recorded, else of the first evaluation.

  Args:
    folder: Folder of the trace.
    most: Largest number of steps, evenly spaced; 0 takes all.

  Raises:
    ValueError: There is no such trace.
  """
  trace = traces.read(folder)
  kind = 'train' if 'train' in trace.kinds else trace.kinds[0]
  steps = trace.steps_of(kind)
  if most:
    positions = np.linspace(0, len(steps) - 1, min(most, len(steps)))
    steps = {steps[round(position)] for position in positions}
  for record in trace.records(kind, steps):
    if record.sequence:
      continue
    for layer, choices in record.layers.items():
      expert, logits = (
        None if values is None else values.reshape(-1, values.shape[-1])
        for values in (choices.expert, choices.logits)
      )
      yield Chosen(expert, logits, trace.header.layers[layer].num_experts)


def about(folder: str | pathlib.Path) -> str:
  """A sentence about the run that a trace is of.

  Raises:
    ValueError: There is no such trace.
  """
  header = traces.read(folder).header
  logits = 'with' if header.has_logits else 'without'
  return (
    f'{folder}: recorded in a real run, {logits} logits; seed {header.seed}, '
    f'{header.batch_size} rows of {header.seq_len} tokens a batch, model '
    f'{header.model_digest[:12]}, data {header.data_digest[:12]} (sha256)'
  )


def drawn(
  name: str, num_experts: int, num_tokens: int, steps: int, seed: int = 0
) -> Iterator[Chosen]:
  """Choices of one expert a token, drawn from fixed shares.

  Args:
    name: 'skewed', where four experts have a fifth of all tokens each, and the
      others the rest; or 'uniform'.
    num_experts: E, the number of experts; more than four if it is skewed.
    num_tokens: N, the number of tokens of a batch.
    steps: Number of batches.
    seed: Seed of the draws, and of which experts are popular.

  Raises:
    DoesNotDivide: There are too few experts for the skew.
  """
  rng, E = np.random.default_rng(seed), num_experts
  share = np.full(E, 1 / E)
  if name == 'skewed':
    if E <= HOT:
      raise DoesNotDivide(
        f'num_experts={E} leaves none beside the {HOT} popular ones'
      )
    share[:] = (1 - HOT * SHARE) / (E - HOT)
    share[rng.permutation(E)[:HOT]] = SHARE
  for _ in range(steps):
    expert = rng.choice(E, (num_tokens, 1), p=share)
    rng.random((num_tokens, 1))  # so that stored results come out again
    yield Chosen(expert, None, E)


def counts_of(
  chosen: Iterable[Chosen],
  cluster: Cluster,
  tokens_per_device: int = 0,
  outgoing: float = 1.0,
) -> Counts:
  """Lays the choices over the devices of a cluster.

  Args:
    chosen: The choices of each batch and layer.
    cluster: The machine.
    tokens_per_device: Number of tokens that a device is to have: each recorded
      one stands for as many as that takes; 0 keeps those recorded.
    outgoing: Share of a device's tokens that the gate lets leave the node.

  Raises:
    DoesNotDivide: A batch or the experts cannot be divided over the devices.
    ValueError: There are no choices.
  """
  counts, gated = [], []
  rows = leaving = 1.0
  W, Q = cluster.num_devices, cluster.num_nodes
  for one in chosen:
    N, K = one.expert.shape
    numbers = {'num_experts': one.num_experts, 'tokens of a batch': N}
    for name, size in numbers.items():
      if size % W:
        raise DoesNotDivide(
          f'{name}={size} is not divisible by the {W} devices of {cluster.name}'
        )
    per_device = N // W
    rows = (tokens_per_device or per_device) / per_device
    counts.append(_count(one.expert, one.num_experts, W, rows))
    if Q > 1 and one.logits is not None:
      limit = int(outgoing * per_device)
      leaving = limit / per_device
      real = (one.expert >= 0).any(-1)
      logits = jnp.asarray(one.logits.reshape(W, per_device, -1), jnp.float32)
      nodes = jnp.asarray(np.arange(W) // (W // Q), jnp.int32)
      sizes = dict(num_selected=K, num_nodes=Q, limit=limit)
      mask = jnp.asarray(real.reshape(W, per_device))
      limited = _limit(logits, nodes, mask, **sizes)
      expert = np.where(real[:, None], np.asarray(limited).reshape(N, K), -1)
      gated.append(_count(expert, one.num_experts, W, rows))
  if not counts:
    raise InputError('no choices to simulate')
  all_gated = np.stack(gated) if gated else None
  return Counts(np.stack(counts), all_gated, rows, leaving)


def _count(
  expert: Int[np.ndarray, 'N K'], E: int, W: int, rows: float
) -> Int[np.ndarray, 'E W']:
  device = np.repeat(np.arange(W), expert.size // W)
  flat = expert.reshape(-1)
  counts = np.zeros((E, W), np.int64)
  np.add.at(counts, (flat[flat >= 0], device[flat >= 0]), 1)
  return np.rint(counts * rows).astype(np.int64)


_limit = jax.jit(
  limited_choice, static_argnames=('num_selected', 'num_nodes', 'limit')
)
