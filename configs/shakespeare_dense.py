"""nanoGPT's CPU recipe: a dense character model of tiny Shakespeare.

L=4, H=4, M=128, T=64, B=12, 2000 steps, no dropout, no biases: the small run of
github.com/karpathy/nanoGPT, which reports 1.88 nats per character on a sample
of the last tenth of the text. Unlike in nanoGPT, the learning rate is 2e-3: at
nanoGPT's 1e-3 (--config.optimizer.learning_rate=1e-3) 2000 steps end about 0.1
nats higher. TFDS's `validation` is the first half of that last tenth; a text
file (--config.data.source.kind=files --config.data.source.files.pattern=PATH)
validates on all of it.

    python -m moe_jax.main --config=moe_jax:shakespeare_dense \
      --workdir=runs/shakespeare_dense
"""

from moe_jax.configs import base


def get_config(arg: str = ''):
  config = base.get_config()
  config.batch_size = 12
  config.total_steps = 2000
  config.log_every_steps = 50
  config.data.source.kind = 'tfds'
  config.data.source.tfds.name = 'tiny_shakespeare'
  config.data.tokenizer.kind = 'chars'
  config.data.seq_len = 64
  m = config.model
  m.num_layers = 4
  m.width = 128
  m.attention.num_heads = 4
  m.ffn.hidden = 512
  m.ffn.activation = 'gelu'
  m.norm.kind = 'layernorm'
  m.norm.epsilon = 1e-5
  m.positions.kind = 'learned'
  m.numerics.init.kind = 'gpt2'
  m.scan_layers = False
  m.moe.num_experts = 0
  o = config.optimizer
  o.learning_rate = 2e-3
  o.schedule.kind = 'cosine'
  o.schedule.warmup_steps = 100
  o.schedule.final_fraction = 0.1
  o.b2 = 0.99
  o.weight_decay = 0.1
  o.decay_rules = (('scale$', 0.0), ('', 1.0))
  o.clip_norm = 1.0
  config.checkpoint.best_eval = 'validation'
  config.evals = dict(validation=base.evaluation(every_steps=500))
  return base.finish(config, arg)
