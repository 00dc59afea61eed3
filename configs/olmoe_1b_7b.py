"""OLMoE-1B-7B: 6.9B parameters, 1.3B active (arXiv:2409.02060).

The sizes of the released config.json: L=16, M=2048, H=16, D=128, F=1024, 64
experts in every layer, 8 selected, V=50304, rows of 4096 tokens. Queries and
keys are normed over all heads together, gates are raw probabilities, and
experts drop nothing. The balance loss has the weight of config.json. Optimizer,
batch and schedule are ours.

    python -m moe_jax.main --config=moe_jax:olmoe_1b_7b:runlocal \
      --workdir=runs/olmoe_local
"""

from moe_jax.configs import base


def get_config(arg: str = ''):
  config = base.get_config()
  config.batch_size = 1024
  config.total_steps = 100_000
  config.data.seq_len = 4096
  config.mesh.update(data=1, fsdp=-1, expert=8)
  m = config.model
  m.vocab_size = 50_304
  m.num_layers = 16
  m.width = 2048
  m.attention.num_heads = 16
  m.attention.qk_norm = 'all'
  m.attention.qk_norm_epsilon = 1e-5
  m.ffn.hidden = 1024
  m.ffn.activation = 'swiglu'
  m.norm.epsilon = 1e-5
  m.embedding.tie = False
  m.numerics.dtype = 'bfloat16'
  m.remat = 'full'
  m.moe.num_experts = 64
  m.moe.num_selected = 8
  m.moe.layers = 'all'
  m.moe.layer_reduce = 'mean'
  m.moe.router.token_choice.z_weight = 0.0
  m.moe.capacity.kind = 'all'
  m.moe.dispatch.kind = 'dropless'
  config.optimizer.learning_rate = 4e-4
  config.optimizer.schedule.warmup_steps = 2000
  return base.finish(config, arg)
