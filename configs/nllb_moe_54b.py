"""NLLB-200 MoE: 54.5B parameters, translation (arXiv:2207.04672).

Published, in fairseq's `examples/nllb`: 24 + 24 layers, M=2048, F=8192, H=16,
128 experts in every fourth layer of the encoder and of the decoder, two
selected and both served, gates renormalised after dropping, capacity factor
2.0 and room for all in evaluation, expert output masking 0.2, balance loss 0.01
of first choices, dropout 0.3, groups of 4096 tokens (a GPU's), a million tokens
a batch, sequences of 512, Adam at 2e-3 / sqrt(step / 8000), no clipping, no
decay, 300,000 steps. From the released checkpoints as transformers reads them:
V=256206, LayerNorm, biases everywhere, sinusoidal positions from 2 on,
embeddings times sqrt(M), tied logits.

Unlike the published code, the decoder's slots are token-major, so that nothing
leaks; attention weights (dropout 0.1 there) and hidden values (none there) have
the dropout rate of all others; labels are not smoothed (0.1 there); the
languages have no curriculum. Ours: the mesh, the initialisation and the text.

    python -m moe_jax.main --config=moe_jax:nllb_moe_54b:runlocal \
      --workdir=runs/nllb_moe_local
"""

from moe_jax.configs import base


def get_config(arg: str = ''):
  config = base.get_config()
  config.batch_size = 2048
  config.total_steps = 300_000
  config.data.task.kind = 'seq2seq'
  config.data.source.kind = 'django_gettext'
  config.data.seq_len = 512
  config.data.target_len = 512
  config.mesh.update(data=1, fsdp=-1, expert=128)
  m = config.model
  m.kind = 'encoder_decoder'
  m.vocab_size = 256_206
  m.num_layers = 24
  m.width = 2048
  m.attention.num_heads = 16
  m.ffn.hidden = 8192
  m.ffn.activation = 'relu'
  m.norm.kind = 'layernorm'
  m.norm.epsilon = 1e-5
  m.positions.kind = 'sinusoidal'
  m.positions.sinusoidal.offset = 2
  m.use_bias = True
  m.embedding.tie = True
  m.embedding.scale = 'sqrt_width'
  m.dropout = 0.3
  m.numerics.dtype = 'bfloat16'
  m.numerics.init.embedding_std = 2048**-0.5
  m.remat = 'full'
  m.moe.num_experts = 128
  m.moe.num_selected = 2
  m.moe.layers = 'every 4'
  m.moe.output_masking = 0.2
  m.moe.group_size = 4096
  m.moe.router.kind = 'token_choice'
  r = m.moe.router.token_choice
  r.gates = 'renormalized_after_drop'
  r.second_policy = 'all'
  r.balance_choices = 'first'
  r.balance_weight = 0.01
  r.z_weight = 0.0
  m.moe.capacity.kind = 'per_token'
  m.moe.capacity.per_token.factor = 2.0
  m.encoder.overrides = dict(
    moe=dict(router=dict(token_choice=dict(slot_priority='choice_major')))
  )
  o = config.optimizer
  o.learning_rate = 2e-3
  o.schedule.kind = 'inverse_sqrt'
  o.schedule.warmup_steps = 8000
  o.epsilon = 1e-6
  o.clip_norm = 0.0
  o.weight_decay = 0.0
  if arg == base.RUNLOCAL:
    m.moe.group_size = 0  # the shrunk T_enc and T_dec have no common group
  return base.finish(config, arg)
