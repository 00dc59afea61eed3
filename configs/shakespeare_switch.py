"""`shakespeare_dense` with 8 Switch experts in every other layer.

Equal to it in FLOPs per token: one expert of the dense width serves a token.

    python -m moe_jax.main --config=configs/shakespeare_switch.py \
      --workdir=runs/shakespeare_switch
"""

from configs import base, shakespeare_dense


def get_config(arg: str = ''):
  config = shakespeare_dense.get_config().unlock()
  moe = config.model.moe
  moe.num_experts = 8
  moe.num_selected = 1
  moe.layers = 'every 2'
  moe.gates = 'raw'
  moe.group_size = 768  # the batch: small groups drop more
  moe.capacity_factor = 1.25
  moe.balance_weight = 0.01
  config.evals = base.get_config().evals
  config.checkpoint.best_eval = 'train_capacity'
  return base.finish(config, arg)
