"""LSTM - mixture of experts - LSTM, the language models of Shazeer et al. 2017.

https://arxiv.org/abs/1701.06538, Appendices C and D. Without an argument a
small one on bytes: 16 experts in 4 branches, two of each selected, one minute
on two cores. With `:<model>` a published one: `MoE-4`, `MoE-32`, `MoE-256`,
`MoE-256-h` (-h: of two levels), `MoE-1024-h`, `MoE-4096-h`, `MoE-34M`,
`MoE-143M`, and those without experts, `MoE-1-Wide`, `MoE-1-Deep`,
`4xLSTM-512`, `LSTM-1024-512` and `LSTM-2048-512`, of Table 7;
`MoE-16384-h`, `MoE-65536-h` and `MoE-131072-h` of Table 8. (Table 8 has the
smaller ones of two levels with more branches: 32 of 256 and of 1024 experts, 64
of 4096.) What they cost, embedding and softmax apart:

    python -m moe_jax.analysis.cost --config=configs/shazeer_lstm.py:MoE-256-h

Published: widths, experts, noisy top-4 (top-2 at each level), weights of 0.1 on
importance and load, dropout on every layer's output, the sigmoid after the
mixture, Adam, 1000 steps of warm-up and the inverse square root after them.
Ours: the learning rate, clipping, the forget gate's bias, a softmax over all of
a vocabulary of bytes (theirs was sampled, of words), the batch and the text.

    python -m moe_jax.main --config=configs/shazeer_lstm.py \
      --workdir=runs/shazeer_lstm
"""

from configs import base

# Of the models with experts: (experts, branches), of 1024 hidden units each.
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
}
# Of the others, what they change. Dropout was searched for in steps of 0.1.
OTHERS = {
  'MoE-1-Wide': dict(moe=dict(num_experts=0)),
  'MoE-1-Deep': dict(moe=dict(num_experts=0), lstm=dict(twin_depth=4)),
  '4xLSTM-512': dict(num_layers=4, moe=dict(layers='none')),
  'LSTM-1024-512': dict(
    num_layers=1, moe=dict(layers='none'), lstm=dict(hidden=1024)
  ),
  'LSTM-2048-512': dict(
    num_layers=1, moe=dict(layers='none'), lstm=dict(hidden=2048)
  ),
  'MoE-34M': dict(
    width=1024,
    dropout=0.3,
    moe=dict(num_experts=1024, branching=16, hidden=2048),
  ),
  'MoE-143M': dict(
    width=1024,
    dropout=0.4,
    lstm=dict(hidden=4096),
    moe=dict(num_experts=256, branching=16, hidden=8192),
  ),
}
MODELS = (*EXPERTS, *OTHERS)


def get_config(arg: str = ''):
  if arg not in ('', base.RUNLOCAL, *MODELS):
    known = ['', base.RUNLOCAL, *MODELS]
    raise ValueError(f'unknown config argument {arg!r}; have {known}')
  config = base.get_config()
  config.data.seq_len = 64
  config.batch_size = 32
  config.total_steps = 1000
  m = config.model
  m.kind = 'lstm'
  m.num_layers = 3
  m.positions = 'none'
  m.tie_embeddings = False
  m.activation = 'relu'
  m.width = 96
  m.dropout = 0.1
  m.moe.layers = '1'
  m.moe.num_experts = 16
  m.moe.branching = 4
  m.moe.branches_selected = 2
  m.moe.num_selected = 4
  m.moe.hidden = 192
  m.moe.expert_dropout = 0.0
  m.moe.router = 'noisy_top_k'
  m.moe.gates = 'renormalized'
  m.moe.group_size = -1
  m.moe.capacity_rule = 'all'
  m.moe.dispatch = 'dropless'
  m.moe.balance_weight = 0.0
  m.moe.z_weight = 0.0
  m.moe.importance_weight = 0.1
  m.moe.load_weight = 0.1
  config.optimizer.learning_rate = 3e-3
  config.optimizer.weight_decay = 0.0
  config.checkpoint.best_eval = 'valid'
  config.checkpoint.every_steps = 250
  config.evals = {'valid': base.evaluation(every_steps=250, num_batches=16)}
  config.sample.num_tokens = 200
  if arg in MODELS:
    _published(config, arg)
  return base.finish(config, arg if arg == base.RUNLOCAL else '')


def _published(config, name: str) -> None:
  m = config.model
  m.width = 512
  m.moe.hidden = 1024
  m.moe.branching = 0
  m.moe.branches_selected = 1
  config.total_steps = 27_000
  config.optimizer.schedule = 'inverse_sqrt'
  config.optimizer.warmup_steps = 1000
  config.optimizer.learning_rate = 1e-3
  if name in EXPERTS:
    m.moe.num_experts, m.moe.branching = EXPERTS[name]
    m.dropout = 0.2 if name in ('MoE-1024-h', 'MoE-4096-h') else 0.1
  for key, value in OTHERS.get(name, {}).items():
    if isinstance(value, dict):
      m[key].update(value)
    else:
      m[key] = value
  if m.moe.branching:
    m.moe.branches_selected = 2
