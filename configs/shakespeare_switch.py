"""`shakespeare_dense` with 8 Switch experts in its last two layers.

It has the FLOPs per token of the dense model: one expert serves a token.
The last layers are sparse, as in V-MoE (arXiv:2106.05974), and the capacity
factor is 1.0, with which Switch (arXiv:2101.03961, Table 1) was fastest to a
given quality: both keep the time of a step close to the dense twin's.

    python -m moe_jax.main --config=moe_jax:shakespeare_switch \
      --workdir=runs/shakespeare_switch
"""

from moe_jax.configs import base, shakespeare_dense


def get_config(arg: str = ''):
  config = shakespeare_dense.get_config().unlock()
  moe = config.model.moe
  moe.num_experts = 8
  moe.num_selected = 1
  moe.layers = 'last 2'
  moe.group_size = 768  # the batch: small groups drop more
  moe.router.kind = 'token_choice'
  moe.router.token_choice.gates = 'raw'
  moe.router.token_choice.balance_weight = 0.01
  moe.capacity.kind = 'per_token'
  moe.capacity.per_token.factor = 1.0
  config.evals = base.get_config().evals
  config.checkpoint.best_eval = 'train_capacity'
  return base.finish(config, arg)
