"""The first run: a byte-level Switch model of Python's own standard library.

It has 8 experts in every other layer, and trains for about two minutes on two
cores; nothing is downloaded.

    python -m moe_jax.main --config=moe_jax:tiny_switch --workdir=runs/tiny
"""

from moe_jax.configs import base


def get_config(arg: str = ''):
  config = base.get_config()
  config.batch_size = 16
  config.total_steps = 800
  config.data.seq_len = 128
  m = config.model
  m.num_layers = 4
  m.width = 128
  m.ffn.hidden = 512
  m.scan_layers = False
  m.moe.num_experts = 8
  m.moe.num_selected = 1
  m.moe.group_size = 256
  m.moe.router.token_choice.jitter = 0.01
  config.optimizer.learning_rate = 3e-3
  config.log_every_steps = 10
  config.checkpoint.every_steps = 400
  config.sample.prompt = 'def '
  for entry in config.evals.values():
    entry.every_steps = 400
    entry.num_batches = 8
  return base.finish(config, arg)
