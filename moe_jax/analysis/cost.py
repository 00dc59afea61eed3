"""What a model costs: parameters and FLOPs per token, total and active.

    python -m moe_jax.analysis.cost --config=configs/mixtral_8x7b.py

Counted from the config and the parameters' shapes, never measured. Not here:
time, bytes moved, memory.
"""

import dataclasses
import math

import jax
import ml_collections
from absl import app, flags, logging
from flax import linen as nn
from ml_collections import config_flags

from moe_jax import command_line
from moe_jax.config import merge
from moe_jax.data import tokenizers
from moe_jax.models import Model, abstract_params, build
from moe_jax.partitioning import path_name


@dataclasses.dataclass(frozen=True)
class Cost:
  """Counts of one model.

  Attributes:
    total_params: All parameters.
    active_params: Those that one token meets: K of E experts.
    expert_params: Of all experts together.
    embedding_params: Tables that are looked up, not multiplied.
    forward_flops: Per token, two a multiply-add: active products, the router
      and full (not halved) attention over the sequence.
    router_flops: The router's part of them.
    capacity_slack: Rows that experts multiply per assignment: slots over
      K * tokens. Below 1.0 some are dropped for certain; 1.0 if dense or
      dropless.
  """

  total_params: int
  active_params: int
  expert_params: int
  embedding_params: int
  forward_flops: int
  router_flops: int
  capacity_slack: float

  @property
  def training_flops(self) -> int:
    """Per token, forward and backward: three times forward."""
    return 3 * self.forward_flops

  def describe(self) -> str:
    """Two lines for a person."""
    return (
      f'parameters: {short(self.total_params)} total, '
      f'{short(self.active_params)} active per token, '
      f'{short(self.expert_params)} in experts\n'
      f'FLOPs per token: {short(self.forward_flops)} forward, '
      f'{short(self.training_flops)} training '
      f'(router {self.router_flops / self.forward_flops:.1%}; experts '
      f'multiply {self.capacity_slack:.2f} rows per assignment)'
    )


def count(model: Model, seq_len: int) -> Cost:
  """Counts `model` at sequences of `seq_len` tokens."""
  c = model.config
  sizes = {
    path_name(path): math.prod(leaf.shape)
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      nn.meta.unbox(abstract_params(model, seq_len))
    )
  }
  total = sum(sizes.values())
  experts = sum(n for name, n in sizes.items() if '/experts/' in name)
  router, slack = 0, 1.0
  moe = c.moe
  if moe is not None:
    r = moe.router
    router = 2 * sum(n for name, n in sizes.items() if '/router/' in name)
    for name in sizes:
      if '/experts/' in name:
        sizes[name] = sizes[name] // r.num_experts * r.num_selected
    if moe.dispatch != 'dropless':
      S = moe.group_size or seq_len
      slots = r.capacity(
        group_size=S, num_experts=r.num_experts, num_selected=r.num_selected
      )
      slack = slots * r.num_experts / (S * r.num_selected)
  active = sum(sizes.values())
  lookup = sum(n for name, n in sizes.items() if name.endswith('embedding'))
  vectors = sum(n for name, n in sizes.items() if _is_vector(name))
  e = c.embedding
  logits = 0 if not e.tie_embeddings else e.vocab_size * e.width
  attention = 0
  for _, stack in c.stacks:
    a = stack.block.attention
    layers = len(stack.sparse) * (1 + (stack.block.cross_attention is not None))
    attention += 4 * layers * seq_len * a.num_heads * a.head_width
  products = 2 * (active - lookup - vectors + logits)
  return Cost(
    total_params=total,
    active_params=active,
    expert_params=experts,
    embedding_params=lookup,
    forward_flops=products + attention,
    router_flops=router,
    capacity_slack=slack,
  )


def short(n: float | int) -> str:
  """46702792704 -> '46.7B'."""
  for unit, size in (('T', 1e12), ('B', 1e9), ('M', 1e6), ('k', 1e3)):
    if n >= size:
      return f'{n / size:.3g}{unit}'
  return f'{n:.0f}'


def _is_vector(name: str) -> bool:
  """Norm scales, biases and relative-position tables: nothing multiplied."""
  last = name.rsplit('/', 1)[-1]
  return last in ('scale', 'bias', 'table') or last.startswith('b_')


def with_own_vocabulary(
  config: ml_collections.ConfigDict,
) -> ml_collections.ConfigDict:
  """The config with the size of a vocabulary that needs no data: bytes'.

  Raises:
    ValueError: The vocabulary's size depends on the data, and is not given.
  """
  if config.model.vocab_size:
    return config
  if config.data.tokenizer != 'bytes':
    raise ValueError(
      f'data.tokenizer={config.data.tokenizer!r} has a vocabulary of the '
      "data's; give its size: --config.model.vocab_size=..."
    )
  return merge(config, {'model': {'vocab_size': tokenizers.Bytes.vocab_size}})


def main(argv: list[str]) -> None:
  """Prints what the flag's config costs."""
  del argv
  logging.set_verbosity(logging.WARNING)
  try:
    config = with_own_vocabulary(_CONFIG.value)
    print(count(build(config), config.data.seq_len).describe())
  except ValueError as error:
    command_line.fail(str(error))


if __name__ == '__main__':
  _CONFIG = config_flags.DEFINE_config_file('config', None, 'A config file.')
  flags.mark_flag_as_required('config')
  app.run(main, flags_parser=command_line.parse)
