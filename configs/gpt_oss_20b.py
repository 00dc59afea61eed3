"""gpt-oss-20b: 20.9B parameters, 3.6B active (arXiv:2508.10925).

The sizes of the released config.json: L=24, M=2880, H=64, 8 kv heads, D=64,
F=2880, 32 experts in every layer, 4 selected, V=201088. Every second layer,
from the first, sees 128 tokens; each head has a sink; positions follow YaRN,
from 4096 to 131072 tokens. All products have biases, the router's too, and the
SwiGLU is clamped. The gates of the chosen experts sum to one, and experts drop
nothing. Optimizer, data, batch and schedule are not published, nor is the
weight of a balance loss in training; ours stand in. Training rows have 4096
tokens, whose positions are scaled for 131072.

    python -m moe_jax.main --config=moe_jax:gpt_oss_20b:runlocal \
      --workdir=runs/gpt_oss_local
"""

from moe_jax.configs import base


def get_config(arg: str = ''):
  config = base.get_config()
  config.batch_size = 1024
  config.total_steps = 100_000
  config.data.seq_len = 4096
  config.mesh.update(data=1, fsdp=-1, expert=8)
  m = config.model
  m.vocab_size = 201_088
  m.num_layers = 24
  m.width = 2880
  a = m.attention
  a.num_heads = 64
  a.num_kv_heads = 8
  a.head_width = 64
  a.window = 128
  a.full_layers = 'every 2'
  a.sinks = True
  a.biases = 'all'
  m.ffn.hidden = 2880
  m.ffn.activation = 'clamped_swiglu'
  m.norm.epsilon = 1e-5
  m.positions.rotary.theta = 150_000.0
  m.positions.rotary.scaling.kind = 'yarn'
  m.positions.rotary.scaling.yarn.update(factor=32.0, truncate=False)
  m.embedding.tie = False
  m.numerics.dtype = 'bfloat16'
  m.remat = 'full'
  m.moe.num_experts = 32
  m.moe.num_selected = 4
  m.moe.layers = 'all'
  m.moe.layer_reduce = 'mean'
  m.moe.expert.bias = 'all'
  r = m.moe.router.token_choice
  r.gates = 'renormalized'
  r.use_bias = True
  r.z_weight = 0.0
  m.moe.capacity.kind = 'all'
  m.moe.dispatch.kind = 'dropless'
  config.optimizer.learning_rate = 3e-4
  config.optimizer.schedule.warmup_steps = 2000
  return base.finish(config, arg)
