"""DeepSeek-V3: 671B parameters, 37B active (arXiv:2412.19437).

The sizes of the released config.json: L=61, M=7168, V=129280, and 128 heads of
latent attention, whose queries expand from 1536 numbers; the cache keeps
512 + 64 numbers of a token in a layer, where keys and values of all heads would
be 128 * (192 + 128). Positions follow YaRN, from 4096 to 163840 tokens. The
first three layers are dense with F=18432; all others have a shared expert, and
256 experts of F=2048 in 8 groups. A token chooses the 4 groups with the largest
sum of their two best scores, and 8 experts in them by sigmoids with a balancing
bias; its gates sum to 2.5. Experts drop nothing.

A balance loss of each sequence with a weight of 1e-4 stands beside the bias,
whose rate is that of Loss-Free Balancing. Unlike in the paper, no module (of
14B more parameters) predicts a second token. Optimizer, batch and schedule are
ours, and so are rows of 4096 tokens, whose positions are scaled for 163840.

    python -m moe_jax.main --config=moe_jax:deepseek_v3:runlocal \
      --workdir=runs/deepseek_v3_local
"""

from moe_jax.configs import base


def get_config(arg: str = ''):
  config = base.get_config()
  config.batch_size = 2048
  config.total_steps = 500_000
  config.data.seq_len = 4096
  config.mesh.update(data=1, fsdp=-1, expert=64)
  m = config.model
  m.vocab_size = 129_280
  m.num_layers = 61
  m.width = 7168
  m.attention.kind = 'latent'
  m.attention.num_heads = 128
  m.attention.query_rank = 1536
  m.attention.kv_rank = 512
  m.attention.plain_width = 128
  m.attention.rotary_width = 64
  m.attention.value_width = 128
  m.ffn.hidden = 18_432
  m.ffn.activation = 'swiglu'
  m.positions.rotary.interleaved = True
  m.positions.rotary.scaling.kind = 'yarn'
  m.positions.rotary.scaling.yarn.update(
    factor=40.0, mscale=1.0, mscale_all_dim=1.0
  )
  m.embedding.tie = False
  m.numerics.dtype = 'bfloat16'
  m.remat = 'full'
  m.moe.num_experts = 256
  m.moe.num_selected = 8
  m.moe.layers = 'last 58'
  m.moe.expert.hidden = 2048
  m.moe.shared_expert.hidden = 2048
  r = m.moe.router.token_choice
  r.gates = 'sigmoid_renormalized'
  r.gate_scale = 2.5
  r.expert_groups = 8
  r.chosen_expert_groups = 4
  r.expert_group_score = 'two_best'
  r.balance_bias_rate = 0.001
  r.balance_weight = 0.0
  r.sequence_balance_weight = 1e-4
  r.balance_scores = 'sigmoid'
  r.z_weight = 0.0
  m.moe.capacity.kind = 'all'
  m.moe.dispatch.kind = 'dropless'
  config.optimizer.learning_rate = 2e-4
  config.optimizer.schedule.warmup_steps = 2000
  return base.finish(config, arg)
