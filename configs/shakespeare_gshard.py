"""`shakespeare_dense` with GShard's top-2 of 8 experts of half the width.

Equal to it in FLOPs per token: two experts of F/2 serve a token. Unlike
GShard, slots are token-major, so that no later token can evict an earlier
one's second choice.

    python -m moe_jax.main --config=configs/shakespeare_gshard.py \
      --workdir=runs/shakespeare_gshard
"""

from configs import base, shakespeare_switch


def get_config(arg: str = ''):
  config = shakespeare_switch.get_config().unlock()
  moe = config.model.moe
  moe.num_selected = 2
  moe.hidden = 256
  moe.gates = 'renormalized'
  moe.second_policy = 'sampled'
  moe.capacity_factor = 2.0  # per token: one slot an assignment
  moe.balance_choices = 'first'
  config.evals.capacity_2 = base.evaluation(moe=dict(capacity_factor=4.0))
  return base.finish(config, arg)
