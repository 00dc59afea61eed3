"""Names of tensors that many of transformers' decoders share.

Every function returns a part of an architecture's table (`mapping.Names`).
"""

from moe_jax.interop.mapping import Name

Table = dict[str, tuple[Name, ...]]

# The embedding, the head and the norm before it.
ENDS: Table = {
  'embedding': (Name('model.embed_tokens.weight', 'V M'),),
  'w_logits': (Name('lm_head.weight', 'V M -> M V'),),
  'final_norm/scale': (Name('model.norm.weight', 'M'),),
}


def layer(path: str, *names: Name) -> Table:
  """A parameter of a layer, whose names begin behind the layer's."""
  return {
    f'layer/{path}': tuple(
      name._replace(template=f'model.layers.{{layer}}.{name.template}')
      for name in names
    )
  }


def weight(path: str, module: str, form: str) -> Table:
  """The weight of a module of a layer."""
  return layer(path, Name(f'{module}.weight', form))


# The norms before attention and before feed-forwards.
NORMS: Table = {
  **weight('attention_norm/scale', 'input_layernorm', 'M'),
  **weight('ffn_norm/scale', 'post_attention_layernorm', 'M'),
}
# Norms, and the projections of attention.
BLOCK: Table = {
  **NORMS,
  **weight('attention/w_query', 'self_attn.q_proj', '(H D) M -> M H D'),
  **weight('attention/w_key', 'self_attn.k_proj', '(N D) M -> M N D'),
  **weight('attention/w_value', 'self_attn.v_proj', '(N D) M -> M N D'),
  **weight('attention/w_out', 'self_attn.o_proj', 'M (H D) -> H D M'),
  **layer('attention/b_query', Name('self_attn.q_proj.bias', '(H D) -> H D')),
  **layer('attention/b_key', Name('self_attn.k_proj.bias', '(N D) -> N D')),
  **layer('attention/b_value', Name('self_attn.v_proj.bias', '(N D) -> N D')),
  **layer('attention/b_out', Name('self_attn.o_proj.bias', 'M')),
}


def gated_ffn(path: str, module: str) -> Table:
  """The weights of a gated feed-forward."""
  return {
    **weight(f'{path}/w_gate', f'{module}.gate_proj', 'F M -> M F'),
    **weight(f'{path}/w_in', f'{module}.up_proj', 'F M -> M F'),
    **weight(f'{path}/w_out', f'{module}.down_proj', 'M F -> F M'),
  }


def experts(
  module: str = 'mlp.experts',
  gate: str = 'gate_proj',
  up: str = 'up_proj',
  down: str = 'down_proj',
) -> Table:
  """Gated experts, each with tensors of its own in files that are written.

  Files may also have the tensors that transformers has in memory, in which
  experts are stacked and gate and up are one tensor, or the names of those
  tensors for each expert.

  Args:
    module: The name of the experts in files.
    gate: The name of an expert's gate in files; `up` and `down` likewise.
  """

  def names(
    projection: str, form: str, fused: str, fused_form: str
  ) -> list[Name]:
    paths = dict.fromkeys((module, 'mlp.experts'))
    return [
      *(Name(f'{path}.{{expert}}.{projection}.weight', form) for path in paths),
      Name(f'mlp.experts.{fused}', fused_form),
    ]

  gate_up = 'gate_up_proj'
  return {
    **layer(
      'moe/experts/w_gate',
      *names(gate, 'F M -> M F', gate_up, 'E (0/2 F) M -> E M F'),
    ),
    **layer(
      'moe/experts/w_in',
      *names(up, 'F M -> M F', gate_up, 'E (1/2 F) M -> E M F'),
    ),
    **layer(
      'moe/experts/w_out',
      *names(down, 'M F -> F M', 'down_proj', 'E M F -> E F M'),
    ),
  }
