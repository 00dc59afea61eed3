"""Switch-Base with 128 experts: 7.4B parameters (arXiv:2101.03961).

T5-Base in which every other feed-forward of the encoder and of the decoder has
experts, one selected. `:e8`, `:e16`, ... `:e256` change their number; with 16
to 256 it has the 1.1B, 2.0B, 3.8B, 7.4B and 14.7B parameters of the paper's
Table 7. Published: capacity factor 1.25 (2.0 in evaluation), balance loss 0.01,
jitter 0.01, groups of 8192 tokens, initialisation at a tenth of the variance.
ReLU with F=3072 is that of the released checkpoints; Table 9's GEGLU with
F=2048 has as many parameters and FLOPs. Ours: the mesh and the text.

    python -m moe_jax.main --config=moe_jax:switch_base:runlocal \
      --workdir=runs/switch_base_local
"""

from moe_jax.configs import base, t5_base
from moe_jax.errors import InputError

EXPERTS = {f'e{n}': n for n in (8, 16, 32, 64, 128, 256)}


def get_config(arg: str = ''):
  known_args = ['', base.RUNLOCAL, *EXPERTS]
  if arg not in known_args:
    raise InputError(f'unknown config argument {arg!r}; have {known_args}')
  config = t5_base.get_config().unlock()
  config.mesh.update(data=1, fsdp=-1, expert=8)
  m = config.model
  m.dropout = 0.0
  m.numerics.init.scale = 0.1
  m.moe.num_experts = EXPERTS.get(arg, 128)
  m.moe.num_selected = 1
  m.moe.layers = 'every 2'
  m.moe.group_size = 8192
  m.moe.router.kind = 'token_choice'
  r = m.moe.router.token_choice
  r.gates = 'raw'
  r.jitter = 0.01
  r.balance_weight = 0.01
  r.z_weight = 0.0
  m.moe.capacity.kind = 'per_token'
  m.moe.capacity.per_token.factor = 1.25
  if arg == base.RUNLOCAL:
    m.moe.group_size = 0  # the shrunk T_enc and T_dec have no common group
  return base.finish(config, arg if arg == base.RUNLOCAL else '')
