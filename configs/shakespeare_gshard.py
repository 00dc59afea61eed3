"""`shakespeare_dense` with GShard's top-2 of 8 experts of half the width.

It has the FLOPs per token of the dense model: two experts of F/2 serve a token.
Unlike in GShard, slots are token-major, so that no later token can evict an
earlier token's second choice.

    python -m moe_jax.main --config=moe_jax:shakespeare_gshard \
      --workdir=runs/shakespeare_gshard
"""

from moe_jax.configs import base, shakespeare_switch


def get_config(arg: str = ''):
  config = shakespeare_switch.get_config().unlock()
  moe = config.model.moe
  moe.num_selected = 2
  moe.expert.hidden = 256
  moe.router.token_choice.gates = 'renormalized'
  moe.router.token_choice.second_policy = 'sampled'
  moe.router.token_choice.balance_choices = 'first'
  moe.capacity.per_token.factor = 2.0  # a slot for each choice of a token
  config.evals.capacity_2 = base.evaluation(
    moe=dict(capacity=dict(kind='per_token', per_token=dict(factor=4.0)))
  )
  return base.finish(config, arg)
