"""Arms that train with FasterMoE's topology-aware gate, and what they measure.

What the gate costs in quality is measured, on a small model; the time that it
saves where links between nodes are slow can only be simulated, which is not
here. In FasterMoE's Table 3 a loss of 4.0 takes 13,000 iterations of 1,609 ms
without the gate and 15,300 of 1,471 ms with it, which is longer in all.

Where some tokens may leave, a later token can take an earlier one's place, so
that losses under a limit are not those of a model that generates; `FREE` is the
loss of the same parameters without a limit, which is.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.study import byte_models
from experiments.study.parts import Arm, Claim, Column
from moe_jax import data, routing
from moe_jax.layers.routers.contract import LOGITS, ROUTING, sown
from moe_jax.training.setup import Run
from moe_jax.training.step import TrainState

# Shares of tokens that may leave their node; 0.14 is FastMoE's.
SHARES = (1.0, 0.5, 0.14, 0.0)
_ROUTER = 'model.moe.router.topology'
# The evaluation of the same parameters in which every token may leave.
_FREE = 'no_limit'
_BATCHES = 20
FREE, AWAY, KEPT = 'loss, no limit', 'leave', 'kept at home'
COLUMNS = [
  byte_models.LOSS,
  Column(FREE, f'eval/{_FREE}/loss', 'nats/byte'),
  Column(AWAY, 'gate/leaving', '%', 1, lambda share: 100 * share),
  Column(KEPT, 'gate/kept_at_home', '%', 1, lambda share: 100 * share),
]


def name_of(share: float) -> str:
  """The name of the arm in which that share of tokens may leave."""
  return f'gate, {share:g}'


def config(steps: int):
  """The config of the arms: top-2 of 16 experts on two nodes.

  The paper's cluster of 16 devices has two nodes, too; of devices the gate
  knows no more than their nodes. A group, which is limited by itself, is a
  sequence of 64 tokens.
  """
  config = byte_models.decoder(
    steps, num_layers=2, num_experts=16, num_selected=2
  )
  moe = config.model.moe
  moe.group_size = 0
  moe.expert.hidden = 128
  byte_models.drop_nothing(moe)
  moe.allow_future_leak = True
  moe.router.kind = 'topology'
  moe.router.topology.update(gates='renormalized', devices=4, per_node=2)
  free = {'kind': 'token_choice', 'token_choice': {'gates': 'renormalized'}}
  config.evals = {
    byte_models.EVAL: byte_models.evaluation(),
    _FREE: byte_models.evaluation(moe={'router': free}),
  }
  return config


def arms() -> list[Arm]:
  """The gate with each of `SHARES`."""
  share = f'{_ROUTER}.outgoing_fraction'
  return [Arm(name_of(s), {share: s}, 'published', s) for s in SHARES]


CLAIMS = [
  Claim(
    'a limit of 0.14 costs quality after equally many steps',
    f'loss: {name_of(0.14)} > {name_of(1.0)}',
    [
      f'fastermoe2022/table3/FasterMoE {name} the gate/iterations'
      for name in ('with', 'without')
    ],
    'The paper counts thousands of iterations to a loss; here models are '
    'trained for real.',
  ),
  Claim(
    'to stay on a node costs more than a limit of 0.14',
    f'loss: {name_of(0.0)} > {name_of(0.14)}',
  ),
  Claim(
    'a limit of 0.5 costs less than one of 0.14',
    f'loss: {name_of(0.5)} < {name_of(0.14)}',
  ),
]


@functools.cache
def _counter(model):
  """A compiled function of variables and a batch: `_who_leaves`, summed."""

  @jax.jit
  def counts(variables, batch):
    _, collections = model.apply(
      variables, **model.inputs(batch), mutable=['intermediates']
    )
    layers = model.stacks.layer_trees(collections['intermediates'])
    real = batch['segment_ids'] != 0  # a group is a sequence
    kept = [sown(layers[i]) for i in model.stacks.sparse_layers]
    return sum(_who_leaves(model.stacks.moe.router, one, real) for one in kept)

  return counts


def _who_leaves(router, kept, real):
  """Numbers of tokens, of those that want to leave their node, and that do."""
  logits, index = kept[LOGITS], kept[ROUTING].expert_index
  node = router.nodes(len(real))[:, None, None]
  per_node = logits.shape[-1] // router.num_nodes

  def leaving(index):
    return ((index // per_node != node).any(-1) & real).sum()

  wanted = routing.choose(logits, index.shape[-1])
  return jnp.stack([real.sum(), leaving(wanted), leaving(index)])


def shares(run: Run, state: TrainState) -> dict[str, float]:
  """Shares of the tokens of validation batches, the mean of all layers.

  Returns:
    Numbers by name:
    - gate/wanting: share of tokens that want an expert of another node.
    - gate/leaving: share of tokens that have one.
    - gate/kept_at_home: share of tokens that want one and have none.
  """
  counter, put = _counter(run.model), run.programs.put
  total = np.zeros(3)
  for batch in data.eval_batches(
    run.dataset.splits['validation'],
    batch_size=run.options.batch_size,
    num_batches=_BATCHES,
    share=put.rows,
  ):
    total += np.array(counter(run.programs.variables(state), put.local(batch)))
  _, wanting, leaving = total / total[0]
  return {
    'gate/wanting': float(wanting),
    'gate/leaving': float(leaving),
    'gate/kept_at_home': float(wanting - leaving),
  }
