"""Whether a model can decode, and the layout in which its stacks decode.

The layout changes no result. In training the parameters of layers are stacked,
and one loop over layers takes a slice for each. A decoding step reads all
parameters for each token, and XLA's CPU compiler would copy every slice first
(`kernels/cpu.py`), so that in decoding each layer has arrays of its own.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn

from moe_jax.errors import InputError
from moe_jax.kernels import cpu
from moe_jax.layers.experts import Dropless, FeedForwardExpert, few_tokens
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.routers.contract import ROUTER_STATE
from moe_jax.models.base import Model
from moe_jax.models.description import Stacks, subtree, with_subtree
from moe_jax.models.pattern import period_name, segments
from moe_jax.models.stack import StackConfig
from moe_jax.models.trees import variables as as_variables
from moe_jax.routing.capacity import All


def check_generates(model: Model) -> None:
  """Raises ValueError where a model cannot generate token by token.

  Encoders are not checked, as they read all their tokens at once.
  """
  if type(model).for_decoding is Model.for_decoding:
    raise InputError(
      f'{type(model).__name__} does not generate, as it defines no for_decoding'
    )
  for stack in model.stacks:
    for layer in stack.layers if stack.causal else ():
      check_decodes(layer.moe)


def check_decodes(moe: MoeOptions | None) -> None:
  """Raises ValueError if a layer with experts cannot run token by token.

  None stands for a dense layer, which always can.
  """
  if moe is not None and (reason := moe.causality.undecodable):
    raise InputError(reason)


def longest(model: Model) -> int | None:
  """The most tokens that a row can have; None where there is no bound."""
  return model.embedding.positions.table_len or None


def check_change(model: Model, read: Sequence[tuple[int, int]]) -> None:
  """Checks that a generation would not have to change keys in its cache.

  Some rotary positions turn all keys of a row by other angles once the row is
  longer than `original_len`. The keys in a cache stay as they are, so no
  generation may begin within that length and end beyond it.

  Args:
    model: The model.
    read: For each row, the number of tokens that it reads at once (a prompt
      without its last token), and the number that it reads in all.

  Raises:
    ValueError: A row reads at most `original_len` tokens at once, and more in
      all.
  """
  border = model.embedding.positions.scaling.changes_at
  for i, (first, total) in enumerate(read):
    if border is not None and first <= border < total:
      raise InputError(
        f'row {i} of {len(read)} reads {total} tokens, {first} of them at once,'
        f' and crosses original_len={border} of the rotary positions, beyond '
        'which the keys in its cache would turn otherwise; let it read at most '
        f'{border} (prompt and new tokens, less 1), or more than {border} at '
        'once (a prompt less its last token)'
      )


def window_beyond(model: Model, seq_len: int) -> int:
  """The window for text that is longer than the rows of training.

  Where positions are distances, or there are none, text may be of any length: a
  token then sees as many tokens as the last token of a row in training.

  Args:
    model: The model.
    seq_len: The length of the rows of training.

  Returns:
    A number of tokens; 0, for no window, in a model whose positions are added
    to embedded tokens, and in a model that is no decoder of blocks.
  """
  is_decoder = len(model.stacks) == len(model.stacks.blocks) == 1
  return seq_len if is_decoder and not model.embedding.positions.added else 0


def stacks_for_decoding(
  stacks: Stacks,
  variables: Mapping[str, Any],
  batch_size: int,
  platform: str,
  window: int,
) -> tuple[list[StackConfig], dict[str, Any]]:
  """Stacks of blocks whose layers have arrays of their own, and the variables.

  On a CPU, each expert has arrays of its own, too, if a stack has few experts
  and a step chooses few of them; see `layers/experts/few_tokens.py`. An
  encoder's experts that choose tokens do so as in training. A router whose
  draws depend on the shape of its input draws other experts step by step than
  for whole rows.

  Args:
    stacks: The stacks as trained or imported.
    variables: Their parameters and `router_state`.
    batch_size: The number of rows that take a step together.
    platform: The platform of decoding; '': JAX's default backend.
    window: The most tokens that a decoder's token sees, itself included; 0: as
      in the stacks.

  Raises:
    ValueError: A stack is causal, and its router cannot route single tokens.
  """
  params = dict(nn.meta.unbox(variables['params']))
  state = dict(variables.get(ROUTER_STATE, {}))
  on_cpu = (platform or jax.default_backend()) == 'cpu'
  configs = []
  for stack in stacks:
    config = _config_for_decoding(stack.blocks, window)
    stack_params = _unstacked(config, subtree(params, stack.path))
    stack_state = _unstacked(config, subtree(state, stack.path))
    if on_cpu and config.experts is not None:
      config, stack_params = _for_few_tokens(config, stack_params, batch_size)
    configs.append(dataclasses.replace(config, stacked=False))
    params = with_subtree(params, stack.path, stack_params)
    if stack_state:
      state = with_subtree(state, stack.path, stack_state)
  return configs, as_variables(params, state)


def _config_for_decoding(stack, window: int) -> StackConfig:
  """The configuration of a stack for decoding, with layers still stacked.

  `window` is the most tokens that a token of a causal stack sees; 0 sets no
  window beside the stack's own. Raises ValueError if the stack cannot decode.
  """
  block = stack.block
  # Prompts can have any length, which not every implementation supports.
  attention = dataclasses.replace(block.attention, implementation='auto')
  if window and block.causal:
    windows = tuple(min(window, w or window) for w in stack.windows)
    stack = dataclasses.replace(stack, windows=windows)
    window = min(window, attention.window or window)
    attention = dataclasses.replace(attention, window=window)
  moe = block.moe
  if stack.experts is not None:
    if block.causal:
      check_decodes(moe)
    moe = serving_all(moe, causal=block.causal)
  block = dataclasses.replace(block, attention=attention, moe=moe)
  return dataclasses.replace(stack, block=block, remat='none')


def _unstacked(c: StackConfig, tree: Mapping[str, Any]) -> dict[str, Any]:
  """A collection of the stack's variables, each period with its own arrays.

  `tree` is the collection, in which the periods of a segment are stacked.
  Slices of stacked parameters would be copies, which take too long for a
  decoding step.
  """
  tree = dict(tree)
  for segment in segments(c.kinds):
    stacked = tree.pop(segment.name, None)
    if stacked is None:  # a collection that only sparse layers have
      continue
    for i in range(segment.repeats):
      period = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
      tree[period_name(segment, i)] = period
  return tree


def serving_all(moe: MoeOptions, causal: bool) -> MoeOptions:
  """The options of a sparse layer with room for all tokens.

  The options stay as they are where the capacity is part of an imported
  checkpoint and can bind, and where experts choose tokens. Groups of a fixed
  number of tokens are removed, since that number need not divide a prompt; no
  imported checkpoint has such groups.

  Args:
    moe: The options of the layer.
    causal: Whether the layer is run token by token.
  """
  single = causal and moe.group_size == 0
  if not moe.causality.room_in_generation:
    return moe
  if moe.group_size <= 0 and moe.capacity.keeps_in_generation(single):
    return moe
  dispatch = Dropless()
  if any(moe.expert.problems_with(dispatch)):
    dispatch = moe.dispatch
  return dataclasses.replace(
    moe, capacity=All(), dispatch=dispatch, group_size=0
  )


def _for_few_tokens(stack, params, rows):
  """A stack and its parameters, in the CPU's layout for steps of `rows` tokens.

  The stack is a `StackConfig` with experts. Both are returned as they are if no
  such layout would be faster.
  """
  moe = stack.experts
  plain = type(moe.expert).experts is FeedForwardExpert.experts
  if not (plain and isinstance(moe.dispatch, Dropless)):
    return stack, params
  expert_counts = [layer.num_retained for layer in stack.moes if layer]
  distinct_rows = rows
  if 'task_ids' in moe.router.reads:  # all rows of a task choose alike
    distinct_rows = min(rows, stack.block.shared.num_tasks)
  if cpu.most_are_chosen(distinct_rows, moe.num_selected, max(expert_counts)):
    dispatch_class = few_tokens.Batched
  elif sum(expert_counts) > cpu.MOST_UNROLLED:
    return stack, params
  else:
    dispatch_class, params = few_tokens.Unrolled, few_tokens.unrolled(params)
  dispatch = dispatch_class(
    moe.dispatch.backend, moe.dispatch.exchange, moe.dispatch.shadowing
  )
  moe = dataclasses.replace(moe, dispatch=dispatch)
  block = dataclasses.replace(stack.block, moe=moe)
  return dataclasses.replace(stack, block=block), params
