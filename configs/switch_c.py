"""Switch-C: 1571B parameters in 2048 experts a layer (arXiv:2101.03961).

Published (Table 9): 15 + 15 layers, all sparse in the encoder and in the
decoder, M=2080, F=6144, H=32, D=64, E=2048, one selected, no GEGLU. From
flaxformer's port: ReLU, a logits kernel of its own, capacity factor 1.0 and at
least 2 slots, groups of 2048 tokens (its 30 heads are not the paper's). Ours:
the mesh, the batch and the text. A batch has 128 groups of decoder tokens, one
for each device along `expert`: 256 or 512 devices take mesh.tensor=2 or 4, or a
batch_size twice or four times as large.

    python -m moe_jax.main --config=moe_jax:switch_c:runlocal \
      --workdir=runs/switch_c_local
"""

from moe_jax.configs import base, switch_base


def get_config(arg: str = ''):
  config = switch_base.get_config().unlock()
  config.mesh.expert = 128
  m = config.model
  m.num_layers = 15
  m.width = 2080
  m.attention.num_heads = 32
  m.attention.head_width = 64
  m.ffn.hidden = 6144
  m.embedding.tie = False
  m.embedding.logits_scale = 'none'
  m.remat = 'full'
  m.moe.num_experts = 2048
  m.moe.layers = 'all'
  m.moe.group_size = 2048
  m.moe.capacity.per_token.factor = 1.0
  m.moe.capacity.per_token.minimum = 2
  if arg == base.RUNLOCAL:
    m.moe.group_size = 0  # the shrunk T_enc and T_dec have no common group
  return base.finish(config, arg)
