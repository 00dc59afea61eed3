"""DeepSeek-V2-Lite: 15.7B parameters, 2.4B active (arXiv:2405.04434).

The sizes of the released config.json: L=27, M=2048, V=102400, and 16 heads of
latent attention, each with a part of 128 without positions and a part of 64
with them. The cache keeps 512 + 64 numbers of a token in a layer, where keys
and values of all heads would be 16 * (192 + 128). Positions follow YaRN, from
4096 to 163840 tokens. The first layer is dense with F=10944; all others have 64
experts of F=1408, of which six are selected, and two shared experts, here one
of twice the width. Gates are raw probabilities, and experts drop nothing. The
balance loss has the weight of config.json, and, as config.json says, each
sequence has its own loss. Optimizer, batch and schedule are ours, and so are
training rows of 4096 tokens, whose positions are scaled for 163840.

    python -m moe_jax.main --config=moe_jax:deepseek_v2_lite:runlocal \
      --workdir=runs/deepseek_v2_local
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
  m.num_layers = 27
  m.width = 2048
  m.attention.kind = 'latent'
  m.attention.num_heads = 16
  m.attention.kv_rank = 512
  m.attention.plain_width = 128
  m.attention.rotary_width = 64
  m.attention.value_width = 128
  m.ffn.hidden = 10_944
  m.ffn.activation = 'swiglu'
  m.positions.rotary.interleaved = True
  m.positions.rotary.scaling.kind = 'yarn'
  m.positions.rotary.scaling.yarn.update(
    factor=40.0, mscale=0.707, mscale_all_dim=0.707
  )
  m.embedding.tie = False
  m.numerics.dtype = 'bfloat16'
  m.remat = 'full'
  m.moe.num_experts = 64
  m.moe.num_selected = 6
  m.moe.layers = 'last 26'
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
