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
leaks; the dropout of attention weights (0.1 there) and of hidden values (none)
is the one rate; labels are not smoothed (0.1); the languages have no
curriculum. Ours: the mesh, the initialisation and the text.

    python -m moe_jax.main --config=configs/nllb_moe_54b.py:runlocal \
      --workdir=runs/nllb_moe_local
"""

from configs import base


def get_config(arg: str = ''):
  config = base.get_config()
  config.batch_size = 2048
  config.total_steps = 300_000
  config.data.task = 'seq2seq'
  config.data.source = 'django_gettext'
  config.data.seq_len = 512
  config.data.target_len = 512
  config.mesh = dict(data=1, fsdp=-1, expert=128, tensor=1)
  m = config.model
  m.kind = 'encoder_decoder'
  m.vocab_size = 256_206
  m.num_layers = 24
  m.num_encoder_layers = 24
  m.width = 2048
  m.num_heads = 16
  m.hidden = 8192
  m.activation = 'relu'
  m.norm = 'layernorm'
  m.norm_epsilon = 1e-5
  m.positions = 'sinusoidal'
  m.position_offset = 2
  m.use_bias = True
  m.tie_embeddings = True
  m.embedding_scale = 'sqrt_width'
  m.dropout = 0.3
  m.dtype = 'bfloat16'
  m.remat = 'full'
  m.init.embedding_std = 2048**-0.5
  m.moe.num_experts = 128
  m.moe.num_selected = 2
  m.moe.layers = 'every 4'
  m.moe.gates = 'renormalized_after_drop'
  m.moe.encoder_slot_priority = 'choice_major'
  m.moe.second_policy = 'all'
  m.moe.output_masking = 0.2
  m.moe.group_size = 4096
  m.moe.capacity_rule = 'per_token'
  m.moe.capacity_factor = 2.0
  m.moe.balance_choices = 'first'
  m.moe.balance_weight = 0.01
  m.moe.z_weight = 0.0
  o = config.optimizer
  o.learning_rate = 2e-3
  o.schedule = 'inverse_sqrt'
  o.warmup_steps = 8000
  o.epsilon = 1e-6
  o.clip_norm = 0.0
  o.weight_decay = 0.0
  if arg == base.RUNLOCAL:
    m.moe.group_size = 0  # what is left of T_enc and T_dec has no common group
  return base.finish(config, arg)
