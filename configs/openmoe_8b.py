"""OpenMoE-8B/32E (arXiv:2402.01739): ST-MoE's layout as a decoder.

L=24, M=2048, F=8192, H=24 of 128, 32 experts in every sixth layer with a
dense feed-forward after each, 2 selected, SwiGLU, rotary positions, a
vocabulary of 256K, sequences of 2048. Batch and schedule are ours. Slots are
token-major: unlike the published code, which is choice-major, nothing leaks.
The capacity factor is ST-MoE's 1.25 per token: with two choices a token, 0.625
slots an assignment.

    python -m moe_jax.main --config=configs/openmoe_8b.py:runlocal \
      --workdir=runs/openmoe_local
"""

from configs import base


def get_config(arg: str = ''):
  config = base.get_config()
  config.batch_size = 2048
  config.total_steps = 250_000
  config.data.seq_len = 2048
  config.mesh = dict(data=1, fsdp=-1, expert=32, tensor=1)
  m = config.model
  m.vocab_size = 256_384
  m.num_layers = 24
  m.width = 2048
  m.num_heads = 24
  m.head_width = 128
  m.hidden = 8192
  m.activation = 'swiglu'
  m.positions = 'rotary'
  m.dtype = 'bfloat16'
  m.remat = 'full'
  m.init.scale = 0.1
  m.moe.num_experts = 32
  m.moe.num_selected = 2
  m.moe.layers = 'every 6'
  m.moe.extra_ffn = True
  m.moe.gates = 'renormalized'
  m.moe.second_policy = 'threshold'
  m.moe.capacity_factor = 1.25
  m.moe.balance_choices = 'first'
  m.moe.balance_weight = 0.01
  m.moe.z_weight = 1e-4
  o = config.optimizer
  o.name = 'adafactor'
  o.learning_rate = 0.01
  o.schedule = 'inverse_sqrt'
  o.warmup_steps = 10_000
  o.b1 = 0.0
  o.weight_decay = 0.0
  return base.finish(config, arg)
