"""OpenMoE-8B/32E (arXiv:2402.01739): ST-MoE's layout as a decoder.

Published, in the released `openmoe_8b_config.json` and its PyTorch and
flaxformer code: L=24, M=2048, F=8192, H=24, D=128, V=256384, logits with a
kernel of their own, scores that are not scaled, rotary positions, sequences of
2048; 32 experts in every sixth layer, two selected, gates that are raw
probabilities, capacity factor 1.25 per token (2.0 in evaluation), at least 4
slots; after each sparse layer a dense feed-forward with its own norm and
residual (`extra_ffn`). The hidden values of a feed-forward are a SwiGLU times a
third product, (x W1 * silu(x W2)) * (x W3). The weight 0.02 of the balance loss
is flaxformer's 0.01, whose shares of choices sum to two and not to one. Losses
are averaged over layers.

The model has 11.9B parameters, as have the released checkpoints, which take 23
GB in bfloat16; the published name says "8B". Unlike in the published code,
slots are token-major: those of the published code are choice-major, and leak.
Nor does the loss have the two terms of the checkpoint's config.json for output
logits: labels are not smoothed (0.001 there), and there is no z-loss of the
logits (0.01 there; --config.logits_z_weight=0.01 adds it). The mesh, the batch
and the schedule are ours.

    python -m moe_jax.main --config=moe_jax:openmoe_8b:runlocal \
      --workdir=runs/openmoe_local
"""

from moe_jax.configs import base


def get_config(arg: str = ''):
  config = base.get_config()
  config.batch_size = 2048
  config.total_steps = 250_000
  config.data.seq_len = 2048
  config.mesh.update(data=1, fsdp=-1, expert=32)
  m = config.model
  m.vocab_size = 256_384
  m.num_layers = 24
  m.width = 2048
  m.attention.num_heads = 24
  m.attention.head_width = 128
  m.attention.scale = 'none'
  m.ffn.hidden = 8192
  m.ffn.activation = 'doubly_gated_swiglu'
  m.positions.kind = 'rotary'
  m.embedding.tie = False
  m.numerics.dtype = 'bfloat16'
  m.numerics.init.scale = 0.1
  m.numerics.init.embedding_std = 1.0
  m.remat = 'full'
  m.moe.num_experts = 32
  m.moe.num_selected = 2
  m.moe.layers = 'every 6'
  m.moe.extra_ffn = True
  m.moe.layer_reduce = 'mean'
  m.moe.router.kind = 'token_choice'
  r = m.moe.router.token_choice
  r.gates = 'raw'
  r.second_policy = 'all'
  r.balance_choices = 'all'
  r.balance_weight = 0.02
  r.z_weight = 1e-4
  m.moe.capacity.kind = 'per_token'
  m.moe.capacity.per_token.factor = 1.25
  m.moe.capacity.per_token.minimum = 4
  config.evals.published_capacity = base.evaluation(
    moe=dict(capacity=dict(kind='per_token', per_token=dict(factor=2.0)))
  )
  o = config.optimizer
  o.kind = 'adafactor'
  o.learning_rate = 0.01
  o.schedule.kind = 'inverse_sqrt'
  o.schedule.warmup_steps = 10_000
  o.b1 = 0.0
  o.weight_decay = 0.0
  return base.finish(config, arg)
