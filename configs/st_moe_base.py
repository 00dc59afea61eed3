"""ST-MoE-Base: T5 1.1's layout with 16 experts a sparse layer.

ST-MoE's recipe (arXiv:2202.08906) at flaxformer's size Base: 12 + 12 layers,
M=768, F=2048, H=12, D=64, V=32128. Published: GEGLU, untied embeddings, experts
in every fourth layer of the encoder and of the decoder with a dense
feed-forward after each, two selected, the second with probability gate / 0.2,
capacity factor 1.25 (2.0 in evaluation), balance loss 0.01 of first choices,
router z-loss 1e-3 (flaxformer's Base has 1e-4), logits z-loss 1e-4, groups of
4096 tokens, initialisation at a tenth of the variance. `:large` is ST-MoE-L,
4.1B parameters. Unlike the published code, whose slots are choice-major
everywhere, the decoder's are token-major, so that nothing leaks. Ours: the
mesh, the batch and the text.

    python -m moe_jax.main --config=moe_jax:st_moe_base:runlocal \
      --workdir=runs/st_moe_base_local
"""

from moe_jax.configs import base, t5_base
from moe_jax.errors import InputError

LARGE = 'large'


def get_config(arg: str = ''):
  known_args = ['', base.RUNLOCAL, LARGE]
  if arg not in known_args:
    raise InputError(f'unknown config argument {arg!r}; have {known_args}')
  config = t5_base.get_config().unlock()
  config.mesh.update(data=1, fsdp=-1, expert=16)
  m = config.model
  m.ffn.hidden = 2048
  m.ffn.activation = 'geglu'
  m.embedding.tie = False
  m.embedding.logits_scale = 'none'
  m.dropout = 0.0
  m.numerics.init.scale = 0.1
  m.moe.num_experts = 16
  m.moe.num_selected = 2
  m.moe.layers = 'every 4'
  m.moe.extra_ffn = True
  m.moe.group_size = 4096
  m.moe.router.kind = 'token_choice'
  r = m.moe.router.token_choice
  r.gates = 'renormalized'
  r.second_policy = 'threshold'
  r.second_threshold = 0.2
  r.balance_choices = 'first'
  r.balance_weight = 0.01
  r.z_weight = 1e-3
  m.moe.capacity.kind = 'per_token'
  m.moe.capacity.per_token.factor = 1.25
  m.encoder.overrides = dict(
    moe=dict(router=dict(token_choice=dict(slot_priority='choice_major')))
  )
  config.evals.published_capacity = base.evaluation(
    moe=dict(capacity=dict(kind='per_token', per_token=dict(factor=2.0)))
  )
  if arg == LARGE:
    m.num_layers = 24
    m.width = 1024
    m.attention.num_heads = 16
    m.ffn.hidden = 2816
    m.moe.num_experts = 32
  if arg == base.RUNLOCAL:
    m.moe.group_size = 0  # the shrunk T_enc and T_dec have no common group
  return base.finish(config, arg if arg == base.RUNLOCAL else '')
