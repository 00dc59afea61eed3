"""DeepSeekMoE-16B: 16.4B parameters, 2.8B active (arXiv:2401.06066).

The sizes of the released config.json: L=28, M=2048, H=16, D=128, V=102400, rows
of 4096 tokens. The first layer is dense with F=10944; all others have 64
experts of F=1408, of which six are selected, and two shared experts, here one
of twice the width. Gates are raw probabilities, and experts drop nothing. The
balance loss has the weight of config.json, and, as config.json says, each
sequence has its own loss. Optimizer, batch and schedule are ours.

    python -m moe_jax.main --config=moe_jax:deepseek_moe_16b:runlocal \
      --workdir=runs/deepseek_moe_local
"""

from moe_jax.configs import base


def get_config(arg: str = ''):
  config = base.get_config()
  config.batch_size = 1024
  config.total_steps = 100_000
  config.data.seq_len = 4096
  config.mesh.update(data=1, fsdp=-1, expert=8)
  m = config.model
  m.vocab_size = 102_400
  m.num_layers = 28
  m.width = 2048
  m.attention.num_heads = 16
  m.ffn.hidden = 10_944
  m.ffn.activation = 'swiglu'
  m.embedding.tie = False
  m.numerics.dtype = 'bfloat16'
  m.remat = 'full'
  m.moe.num_experts = 64
  m.moe.num_selected = 6
  m.moe.layers = 'last 27'
  m.moe.expert.hidden = 1408
  m.moe.shared_expert.hidden = 2 * 1408
  r = m.moe.router.token_choice
  r.balance_weight = 0.0
  r.sequence_balance_weight = 0.001
  r.z_weight = 0.0
  m.moe.capacity.kind = 'all'
  m.moe.dispatch.kind = 'dropless'
  config.optimizer.learning_rate = 4e-4
  config.optimizer.schedule.warmup_steps = 2000
  return base.finish(config, arg)
