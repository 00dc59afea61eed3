"""LSTM - mixture of experts - LSTM, the language models of Shazeer et al. 2017.

https://arxiv.org/abs/1701.06538, Appendices C and D. Without an argument it is
a small model on bytes, which trains in a minute on two cores: a token chooses 2
of 4 branches and 2 of 4 experts in each. A published model is `:<model>`, such
as `:MoE-4`: `MoE-4`, `MoE-32`, `MoE-256`, `MoE-256-h` (-h: gates of two
levels), `MoE-1024-h`, `MoE-4096-h`, `MoE-34M`, `MoE-143M`, and without experts
`MoE-1-Wide`, `MoE-1-Deep`, `4xLSTM-512`, `LSTM-1024-512` and `LSTM-2048-512`,
from Table 7; `MoE-16384-h`, `MoE-65536-h` and `MoE-131072-h` from Table 8. (In
Table 8 the smaller models of two levels have more branches: 32 with 256 and
with 1024 experts, 64 with 4096.)
The cost of a model, without embedding and softmax, is printed by

    python -m moe_jax.analysis.cost --config=moe_jax:shazeer_lstm:MoE-256-h

Published: widths, experts, noisy top-4 (top-2 at each level), weights of 0.1 on
importance and load losses, dropout on every layer's output, the sigmoid after
the mixture, Adam, a rate that warms up in 1000 steps and falls as 1/sqrt(step).
Ours: the learning rate, clipping, the forget gate's bias, a softmax over all of
a vocabulary of bytes (theirs was sampled, of words), the batch and the text.

    python -m moe_jax.main --config=moe_jax:shazeer_lstm \
      --workdir=runs/shazeer_lstm
"""

from moe_jax.config import merge, unknown
from moe_jax.configs import base

# The number of experts, of 1024 hidden units each, and the number of branches
# into which they are divided; 0 branches mean one level of gates.
EXPERTS = {
  'MoE-4': (4, 0),
  'MoE-32': (32, 0),
  'MoE-256': (256, 0),
  'MoE-256-h': (256, 16),
  'MoE-1024-h': (1024, 16),
  'MoE-4096-h': (4096, 16),
  'MoE-16384-h': (16384, 128),
  'MoE-65536-h': (65536, 256),
  'MoE-131072-h': (131072, 256),
  'MoE-34M': (1024, 16),
  'MoE-143M': (256, 16),
}
# Keys of the section `model` in which a model differs from most published ones.
# The paper searched for dropout rates in steps of 0.1.
CHANGES = {
  'MoE-1024-h': dict(dropout=0.2),
  'MoE-4096-h': dict(dropout=0.2),
  'MoE-34M': dict(width=1024, dropout=0.3, moe=dict(expert=dict(hidden=2048))),
  'MoE-143M': dict(
    width=1024,
    dropout=0.4,
    lstm=dict(hidden=4096),
    moe=dict(expert=dict(hidden=8192)),
  ),
  'MoE-1-Wide': dict(moe=dict(num_experts=0)),
  'MoE-1-Deep': dict(moe=dict(num_experts=0), lstm=dict(twin_depth=4)),
  '4xLSTM-512': dict(num_layers=4, moe=dict(layers='none')),
  'LSTM-1024-512': dict(
    num_layers=1, moe=dict(layers='none'), lstm=dict(hidden=1024)
  ),
  'LSTM-2048-512': dict(
    num_layers=1, moe=dict(layers='none'), lstm=dict(hidden=2048)
  ),
}
MODELS = tuple(dict.fromkeys([*EXPERTS, *CHANGES]))


def get_config(arg: str = ''):
  if arg not in ('', base.RUNLOCAL, *MODELS):
    raise unknown('config argument', arg, ['', base.RUNLOCAL, *MODELS])
  config = base.get_config()
  config.data.seq_len = 64
  config.batch_size = 32
  config.total_steps = 1000
  m = config.model
  m.kind = 'lstm'
  m.num_layers = 3
  m.positions.kind = 'none'
  m.embedding.tie = False
  m.ffn.activation = 'relu'
  m.width = 96
  m.dropout = 0.1
  m.moe.layers = '1'
  m.moe.num_selected = 4
  m.moe.expert.hidden = 192
  m.moe.expert.dropout = 0.0
  config.optimizer.learning_rate = 3e-3
  config.optimizer.weight_decay = 0.0
  config.checkpoint.best_eval = 'valid'
  config.checkpoint.every_steps = 250
  config.evals = {'valid': base.evaluation(every_steps=250, num_batches=16)}
  config.sample.num_tokens = 200
  if arg not in MODELS:
    set_experts(m.moe, 16, branching=4)
    return base.finish(config, arg)
  return base.finish(_published(config, arg))


def set_experts(moe, num_experts: int, branching: int = 0) -> None:
  """Sets the experts, and a router with noisy gates, in a section `model.moe`.

  Args:
    moe: The section, whose `num_selected` is kept.
    num_experts: Number of experts.
    branching: Number of branches, of which a token chooses two; 0 is one level.
  """
  moe.num_experts = num_experts
  moe.group_size = -1
  moe.router.kind = 'hierarchical' if branching else 'noisy_top_k'
  if branching:
    moe.router.hierarchical.update(
      branching=branching, branches_selected=2, noisy=True
    )
  else:
    moe.router.noisy_top_k.balance_weight = 0.0
  router = moe.router[moe.router.kind]
  router.gates = 'renormalized'
  router.z_weight = 0.0
  router.importance_weight = 0.1
  router.load_weight = 0.1
  moe.capacity.kind = 'all'
  moe.dispatch.kind = 'dropless'


def _published(config, name: str):
  m = config.model
  m.width = 512
  m.moe.expert.hidden = 1024
  config.total_steps = 27_000
  config.optimizer.schedule.kind = 'inverse_sqrt'
  config.optimizer.schedule.warmup_steps = 1000
  config.optimizer.learning_rate = 1e-3
  if name in EXPERTS:
    set_experts(m.moe, *EXPERTS[name])
  return merge(config, {'model': CHANGES.get(name, {})})
