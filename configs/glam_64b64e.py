"""GLaM 64B/64E: 1.2T parameters, 96.6B active (arXiv:2112.06905).

L=64, M=8192, F=32768, H=128, D=128, 64 experts in every other layer, 2
selected, V=256K, sequences of 1024, a million tokens a batch. The published
numbers of parameters result if experts are GELU without a gate, dense layers
are gated, and positions are relative.

GShard's slots are choice-major: a later token's first choice evicts an
earlier token's second, so outputs leak the future wherever capacity binds.
That is what was published, hence `allow_future_leak`. The text of the one-shot
questions is ours: docstrings.

    python -m moe_jax.main --config=moe_jax:glam_64b64e:runlocal \
      --workdir=runs/glam_local
"""

from moe_jax.configs import base


def get_config(arg: str = ''):
  config = base.get_config()
  config.batch_size = 1024
  config.total_steps = 600_000
  config.data.seq_len = 1024
  config.mesh.update(data=1, fsdp=-1, expert=64)
  m = config.model
  m.vocab_size = 256_000
  m.num_layers = 64
  m.width = 8192
  m.attention.num_heads = 128
  m.attention.head_width = 128
  m.ffn.hidden = 32_768
  m.ffn.activation = 'geglu'
  m.positions.kind = 'relative'
  m.numerics.dtype = 'bfloat16'
  m.remat = 'full'
  m.moe.num_experts = 64
  m.moe.num_selected = 2
  m.moe.layers = 'every 2'
  m.moe.expert.activation = 'gelu_tanh'
  m.moe.router.kind = 'token_choice'
  r = m.moe.router.token_choice
  r.gates = 'renormalized'
  r.slot_priority = 'choice_major'
  r.second_policy = 'sampled'
  r.balance_choices = 'first'
  r.balance_weight = 0.01
  r.z_weight = 0.0
  m.moe.capacity.kind = 'per_token'
  m.moe.capacity.per_token.factor = 2.0
  m.moe.allow_future_leak = True
  o = config.optimizer
  o.kind = 'adafactor'
  o.learning_rate = 0.01
  o.schedule.kind = 'inverse_sqrt'
  o.schedule.warmup_steps = 10_000
  o.b1 = 0.0
  o.weight_decay = 0.0
  config.evals.one_shot = base.choice_evaluation(num_shots=1)
  return base.finish(config, arg)
