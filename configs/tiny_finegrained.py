"""Fine-grained experts on the text of `tiny_switch`, at equal FLOPs a token.

A sparse layer has 64 experts, and a shared one for all tokens. A token chooses
six by sigmoids; a bias that balances loads takes the place of a balance loss,
and the gates sum to 2.5, as in DeepSeek-V3. Experts drop nothing.

The hidden layer of `tiny_switch`'s expert has a width of 512. Here it is cut
into eighths: six chosen experts of 64 and a shared one of 128 have 6 * 64 + 128
= 512, so that a token takes as many products. The 64 experts have as many
parameters as the 8 of `tiny_switch`. Parameters of the shared expert are added,
and the FLOPs of a router for 56 more experts, 1.5 % of all. The count of FLOPs
leaves out the slots of `tiny_switch` that stay empty.

    python -m moe_jax.main --config=moe_jax:tiny_finegrained \
      --workdir=runs/finegrained
"""

from moe_jax.configs import base, tiny_switch


def get_config(arg: str = ''):
  config = tiny_switch.get_config()
  moe = config.model.moe
  moe.num_experts = 64
  moe.num_selected = 6
  moe.expert.hidden = 64
  moe.shared_expert.hidden = 128
  r = moe.router.token_choice
  r.gates = 'sigmoid_renormalized'
  r.gate_scale = 2.5
  r.jitter = 0.0
  r.balance_bias_rate = 0.01
  r.balance_weight = 0.0
  r.z_weight = 0.0
  moe.capacity.kind = 'all'
  moe.dispatch.kind = 'dropless'
  return base.finish(config, arg)
