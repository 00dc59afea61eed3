"""Mixtral 8x7B: 46.7B parameters, 12.9B active (arXiv:2401.04088).

The widely published sizes: L=32, M=4096, H=32, 8 kv heads, D=128,
F=14336, 8 experts in every layer, 2 selected, V=32000, context 32768. Experts
drop nothing. Optimizer and data are not published; ours stand in.

    python -m moe_jax.main --config=moe_jax:mixtral_8x7b:runlocal \
      --workdir=runs/mixtral_local
"""

from moe_jax.configs import base


def get_config(arg: str = ''):
  config = base.get_config()
  config.batch_size = 512
  config.total_steps = 100_000
  config.data.seq_len = 32_768
  config.mesh.update(data=1, fsdp=-1, expert=8)
  m = config.model
  m.vocab_size = 32_000
  m.num_layers = 32
  m.width = 4096
  m.attention.num_heads = 32
  m.attention.num_kv_heads = 8
  m.attention.head_width = 128
  m.ffn.hidden = 14_336
  m.ffn.activation = 'swiglu'
  m.norm.epsilon = 1e-5
  m.positions.kind = 'rotary'
  m.positions.rotary.theta = 1e6
  m.embedding.tie = False
  m.numerics.dtype = 'bfloat16'
  m.remat = 'full'
  m.moe.num_experts = 8
  m.moe.num_selected = 2
  m.moe.layers = 'all'
  m.moe.router.kind = 'token_choice'
  m.moe.router.token_choice.gates = 'renormalized'
  m.moe.router.token_choice.z_weight = 0.0
  m.moe.capacity.kind = 'all'
  m.moe.dispatch.kind = 'dropless'
  config.optimizer.learning_rate = 3e-4
  config.optimizer.schedule.warmup_steps = 2000
  return base.finish(config, arg)
