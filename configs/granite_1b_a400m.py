"""Granite 3.0 1B-A400M: 1.3B parameters, 400M active (ibm-granite, 2024).

The sizes of the released config.json: L=24, M=1024, H=16, 8 kv heads, D=64,
F=512, 32 experts in every layer, 8 selected, V=49152, rows of 4096 tokens, one
table for embeddings and logits. Four multipliers: embeddings times 12, scores
times 1 / 64, the output of each attention and feed-forward times 0.22, logits
divided by 6. The gates of the chosen experts sum to one, and experts drop
nothing. The balance loss has the weight of config.json. Optimizer, batch and
schedule are ours.

    python -m moe_jax.main --config=moe_jax:granite_1b_a400m:runlocal \
      --workdir=runs/granite_local
"""

from moe_jax.configs import base


def get_config(arg: str = ''):
  config = base.get_config()
  config.batch_size = 1024
  config.total_steps = 100_000
  config.data.seq_len = 4096
  config.mesh.update(data=1, fsdp=-1, expert=4)
  m = config.model
  m.vocab_size = 49_152
  m.num_layers = 24
  m.width = 1024
  m.residual_multiplier = 0.22
  m.attention.num_heads = 16
  m.attention.num_kv_heads = 8
  m.attention.scale = 'fixed'
  m.attention.fixed_scale = 0.015625
  m.ffn.hidden = 512
  m.ffn.activation = 'swiglu'
  m.embedding.multiplier = 12.0
  m.embedding.logits_divisor = 6.0
  m.numerics.dtype = 'bfloat16'
  m.remat = 'full'
  m.moe.num_experts = 32
  m.moe.num_selected = 8
  m.moe.layers = 'all'
  m.moe.layer_reduce = 'mean'
  r = m.moe.router.token_choice
  r.gates = 'renormalized'
  r.balance_weight = 0.001
  r.z_weight = 0.0
  m.moe.capacity.kind = 'all'
  m.moe.dispatch.kind = 'dropless'
  config.optimizer.learning_rate = 4e-4
  config.optimizer.schedule.warmup_steps = 2000
  return base.finish(config, arg)
