"""T5-Base: 223M parameters, an encoder-decoder without experts.

T5 1.0 (arXiv:1910.10683) as published: 12 + 12 layers, M=768, F=3072, H=12,
D=64, V=32128, ReLU, RMSNorm, no biases, relative positions in 32 buckets up to
128, scores that are not scaled, tied embeddings of standard deviation 1 with
logits over sqrt(M), dropout 0.1, spans of 3 tokens, 15 % of 512 tokens in all,
cut out, a million tokens a batch, Adafactor at 1 / sqrt(step) from step 10,000
on. Ours: a rate that rises linearly until step 10,000, where T5 has the rate of
that step from the start; rows of 128 targets, not 114, which the routing groups
of sparse siblings divide; the text of the data.

    python -m moe_jax.main --config=moe_jax:t5_base:runlocal \
      --workdir=runs/t5_local
"""

from moe_jax.configs import base


def get_config(arg: str = ''):
  config = base.get_config()
  config.batch_size = 2048
  config.total_steps = 1_000_000
  config.logits_z_weight = 1e-4
  config.data.task.kind = 'span_corruption'
  config.data.seq_len = 512
  config.data.target_len = 128
  m = config.model
  m.kind = 'encoder_decoder'
  m.vocab_size = 32_128
  m.num_layers = 12
  m.width = 768
  m.attention.num_heads = 12
  m.attention.head_width = 64
  m.attention.scale = 'none'
  m.ffn.hidden = 3072
  m.ffn.activation = 'relu'
  m.positions.kind = 'relative'
  m.embedding.tie = True
  m.embedding.logits_scale = 'inverse_sqrt_width'
  m.dropout = 0.1
  m.numerics.dtype = 'bfloat16'
  m.numerics.init.embedding_std = 1.0
  m.moe.num_experts = 0
  m.moe.layers = 'none'
  o = config.optimizer
  o.kind = 'adafactor'
  o.learning_rate = 0.01
  o.schedule.kind = 'inverse_sqrt'
  o.schedule.warmup_steps = 10_000
  o.b1 = 0.0
  o.clip_norm = 0.0  # Adafactor clips each update
  o.weight_decay = 0.0
  return base.finish(config, arg)
