"""Arms that train with FasterMoE's topology-aware gate, and what they measure.

What the gate costs in quality is measured, on a small model; the time that it
saves where links between nodes are slow can only be simulated, which is not
here. In FasterMoE's Table 3 a loss of 4.0 takes 13,000 iterations of 1,609 ms
without the gate and 15,300 of 1,471 ms with it, which is longer in all.

Where some tokens may leave, a later token can take an earlier one's place, so
that losses under a limit are not those of a model that generates; `FREE` is the
loss of the same parameters without a limit, which is.
"""

import numpy as np

from experiments.study import byte_models
from experiments.study import routing as study_routing
from experiments.study.parts import ANY, Arm, Claim, Column, percent
from moe_jax import routing
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
  percent(AWAY, 'gate/leaving', bounds=ANY),
  percent(KEPT, 'gate/kept_at_home', bounds=ANY),
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
    steps, num_experts=16, num_selected=2, expert_hidden=128, drops=False
  )
  moe = config.model.moe
  moe.update(group_size=0, allow_future_leak=True)
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


CLAIMS = {
  'a limit of 0.14 costs quality after equally many steps': Claim(
    f'loss: {name_of(0.14)} > {name_of(1.0)}',
    [
      f'fastermoe2022/table3/FasterMoE {name} the gate/iterations'
      for name in ('with', 'without')
    ],
    'The paper counts thousands of iterations to a loss; here models are '
    'trained for real.',
  ),
  'to stay on a node costs more than a limit of 0.14': (
    f'loss: {name_of(0.0)} > {name_of(0.14)}'
  ),
  'a limit of 0.5 costs less than one of 0.14': (
    f'loss: {name_of(0.5)} < {name_of(0.14)}'
  ),
}


def shares(run: Run, state: TrainState) -> dict[str, float]:
  """Shares of the tokens of validation batches, the mean of all layers.

  Returns:
    Numbers by name:
    - gate/wanting: share of tokens that want an expert of another node.
    - gate/leaving: share of tokens that have one.
    - gate/kept_at_home: share of tokens that want one and have none.
  """
  moe, totals = run.model.stacks.moe, np.zeros(3)
  experts_of_node = moe.num_experts // moe.router.num_nodes
  variables = run.programs.variables(state)
  for batch in study_routing.batches(run, _BATCHES):
    real = batch['segment_ids'] > 0
    # A group is a sequence.
    home = np.asarray(moe.router.nodes(len(real)))[:, None, None]
    layers = study_routing.choices(
      run.model, variables, batch, {}, train=False, logits=True
    )
    for layer in (layers or {}).values():
      wanted = routing.choose(layer.logits, moe.num_selected)
      wanting, leaving = (
        (np.asarray(index) // experts_of_node != home).any(-1)[real].sum()
        for index in (wanted, layer.expert)
      )
      totals += real.sum(), wanting, leaving
  _, wanting, leaving = totals / totals[0]
  return {
    'gate/wanting': float(wanting),
    'gate/leaving': float(leaving),
    'gate/kept_at_home': float(wanting - leaving),
  }
