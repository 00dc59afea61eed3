"""Qwen3-30B-A3B: 30.5B parameters, 3.3B active (arXiv:2505.09388).

The sizes of the released config.json: L=48, M=2048, H=32, 4 kv heads, D=128,
F=768, 128 experts in every layer, 8 selected, V=151936, rows of 32768
tokens. Queries and keys are normed within each head, the gates of the chosen
experts sum to one, and experts drop nothing. The balance loss has the weight of
config.json. Optimizer, batch and schedule are ours.

    python -m moe_jax.main --config=moe_jax:qwen3_30b_a3b:runlocal \
      --workdir=runs/qwen3_local
"""

from moe_jax.configs import base


def get_config(arg: str = ''):
  config = base.get_config()
  config.batch_size = 512
  config.total_steps = 100_000
  config.data.seq_len = 32_768
  config.mesh.update(data=1, fsdp=-1, expert=16)
  m = config.model
  m.vocab_size = 151_936
  m.num_layers = 48
  m.width = 2048
  m.attention.num_heads = 32
  m.attention.num_kv_heads = 4
  m.attention.head_width = 128
  m.attention.qk_norm = 'head'
  m.ffn.hidden = 768
  m.ffn.activation = 'swiglu'
  m.positions.rotary.theta = 1e6
  m.embedding.tie = False
  m.numerics.dtype = 'bfloat16'
  m.remat = 'full'
  m.moe.num_experts = 128
  m.moe.num_selected = 8
  m.moe.layers = 'all'
  m.moe.layer_reduce = 'mean'
  r = m.moe.router.token_choice
  r.gates = 'renormalized'
  r.balance_weight = 0.001
  r.z_weight = 0.0
  m.moe.capacity.kind = 'all'
  m.moe.dispatch.kind = 'dropless'
  config.optimizer.learning_rate = 3e-4
  config.optimizer.schedule.warmup_steps = 2000
  return base.finish(config, arg)
