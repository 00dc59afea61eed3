"""Takes out the part of a model that one task uses, without any change to it.

https://arxiv.org/abs/2110.03742. All tokens of a task have the same K experts
and gates in a layer that routes by task, and g1 FFN1(x) + g2 FFN2(x) is one
feed-forward of width 2F: the experts' first kernels side by side, their last
ones times their gates on top of each other. So each such layer becomes its own
dense twin. Layers of other routers stay as they are, with their balancing bias
if they have one.

    python -m moe_jax.compression extract --run=runs/multilingual --task=de \
      --output=runs/german
"""

import argparse
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard, cast

import jax
import jax.numpy as jnp

from moe_jax.compression import whole_run
from moe_jax.compression.whole_run import bytes_in_memory
from moe_jax.config import unknown
from moe_jax.errors import InputError
from moe_jax.layers.experts import SCOPE, FeedForwardExpert
from moe_jax.layers.moe_options import MoeOptions
from moe_jax.layers.retained import Retained
from moe_jax.layers.routers import ROUTERS, TokenInfo
from moe_jax.layers.shared import Shared
from moe_jax.models import ModelOptions, code_trees
from moe_jax.models.description import subtree, with_subtree
from moe_jax.models.expert_arrays import with_moes
from moe_jax.models.layer_options import LayerOptions
from moe_jax.shapes import Array, Float32, Int32, Leaf
from moe_jax.training.trained import Loaded

Params = dict[str, Any]


class Extracted(NamedTuple):
  """The model of one task.

  Attributes:
    options: The options of the model.
    params: The parameters of the model.
    layers: Indices of the layers that became dense, an encoder's first.
  """

  options: ModelOptions
  params: Params
  layers: tuple[int, ...]


def extract(
  options: ModelOptions, params: Mapping[str, Any], task: int
) -> Extracted:
  """The model of one task: layers that route by task keep its experts alone.

  Without noise and without dropped tokens, the logits of the task's tokens are
  those of the whole model, but for rounding.

  Args:
    options: The options of the whole model, vocabulary and tasks filled in.
    params: The parameters of the whole model.
    task: The index of the task.

  Raises:
    ValueError: No layer routes by task; in a layer that does, experts are no
      feed-forwards, or there are merged or shared experts or another number of
      them than in other layers; or kernels are quantised.
  """
  code_trees.check_plain(options, 'the model')
  model = options.build()
  if not options.routes_by_task:
    routers = {ROUTERS.name_of(moe.router) for moe in model.stacks.mixtures}
    raise InputError(
      'the model has no router by task, so no task has a part of its own; its '
      f'routers: {sorted(routers) or "none, as it is dense"}'
    )
  new_params = dict(params)
  for stack in model.stacks:
    path, blocks = stack.path, stack.blocks
    if blocks is None or not _routes_by_task(moe := blocks.experts):
      continue
    shared, part = blocks.block.shared, subtree(new_params, path)
    part = _with_dense_layers(part, moe, shared, task)
    new_params = with_subtree(new_params, path, part)
  moes = enumerate(model.stacks.moes)
  layers = tuple(i for i, moe in moes if _routes_by_task(moe))
  without_tasks = dataclasses.replace(cast(Any, options), num_tasks=0)
  new_options = with_moes(without_tasks, _extracted_moe)
  return Extracted(new_options, new_params, layers)


def _routes_by_task(moe: MoeOptions | None) -> TypeGuard[MoeOptions]:
  return moe is not None and 'task_ids' in moe.router.reads


def _with_dense_layers(
  stack: Params, moe: MoeOptions, shared: Shared, task: int
) -> Params:
  """A stack's parameters with a dense layer in place of each sparse one.

  Args:
    stack: The parameters of an encoder or decoder, in which layers are stacked.
    moe: The options of its sparse layers, which route by task.
    shared: The settings that all layers of the model share.
    task: The index of the task.

  Raises:
    ValueError: Experts are no feed-forwards, shared, merged or of uneven
      numbers; or the router's choices depend on more than the task.
  """
  if not isinstance(moe.expert, FeedForwardExpert):
    raise InputError(
      f'experts of {type(moe.expert).__name__} cannot become one dense '
      'feed-forward; only feed-forward experts can'
    )
  if moe.shared_expert.hidden:
    raise InputError(
      f'moe.shared_expert.hidden={moe.shared_expert.hidden}: layers by task '
      'with a shared expert are not extracted'
    )
  if moe.retained != Retained():
    raise InputError(
      'layers by task have merged experts or uneven numbers of experts '
      f'({moe.retained}); extract from the run before it was merged or pruned'
    )

  def dense(layers: Params) -> Params:
    """The parameters [L, ...] of L dense layers, from those of sparse ones."""
    choice = functools.partial(choice_of_task, moe, shared, task=task)
    index, gate = jax.vmap(choice)(layers)  # [L, S, K]
    if (index != index[:, :1]).any() or (gate != gate[:, :1]).any():
      raise InputError(
        f'{type(moe.router).__name__} gives no experts for a whole task: it '
        'sends tokens of one task to others, or with other gates'
      )
    gate = gate * (1.0 - moe.output_masking)
    return jax.vmap(as_one)(layers[SCOPE], index[:, 0], gate[:, 0])

  def converted(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
      return tree
    if 'moe' not in tree:
      return {name: converted(subtree) for name, subtree in tree.items()}
    rest = {name: subtree for name, subtree in tree.items() if name != 'moe'}
    # `tree['moe']` has stacked layers, those at one place of the pattern.
    return {**rest, 'ffn': dense(tree['moe'])}

  return converted(stack)


def choice_of_task(
  moe: MoeOptions, shared: Shared, params: Mapping[str, Any], task: int
) -> tuple[Int32[Array, 'S K'], Float32[Array, 'S K']]:
  """The indices and gates of a task's experts, for S random tokens.

  All tokens have the same, if the router reads only tasks. Noise is off.

  Args:
    moe: The options of the layer.
    shared: The settings that all layers of the model share.
    params: The parameters of the layer, a single one.
    task: The index of the task.
  """
  router = moe.router.module(moe.sizes, shared, 'router')
  x = jax.random.normal(
    jax.random.key(0), (1, 8, params[SCOPE]['w_in'].shape[1])
  )
  ids = jnp.full(x.shape[:2], task)
  info = TokenInfo(ids, ids, ids, ids, ids).only(moe.router.reads)
  mask = jnp.ones(ids.shape, bool)
  chosen, _ = router.apply(
    {'params': params['router']}, x, mask, token_info=info
  )
  return chosen.expert_index[0], chosen.gate[0]


def as_one(
  experts: Mapping[str, Leaf],
  index: Int32[Array, ' K'],
  gate: Float32[Array, ' K'],
) -> Params:
  """The parameters of a feed-forward of width K*F that sums K experts.

  Args:
    experts: The parameters of E feed-forwards, [E, ...] each, by name: 'w_in',
      'w_out' and, where experts have them, gates and biases.
    index: The indices of the K experts.
    gate: The weight of each of the K experts in the sum.
  """
  # The parameters of the K chosen experts, [K, ...] each.
  chosen_experts = {name: array[index] for name, array in experts.items()}
  K, M, F = chosen_experts['w_in'].shape
  dense = {}
  for name, array in chosen_experts.items():
    if name in ('w_out', 'b_out'):  # parameters that the gate multiplies
      scaled = gate.reshape(-1, *[1] * (array.ndim - 1)) * array
      scaled = scaled.sum(0) if name == 'b_out' else scaled.reshape(K * F, M)
      dense[name] = scaled.astype(array.dtype)
    elif array.ndim == 3:
      dense[name] = array.swapaxes(0, 1).reshape(M, K * F)
    else:
      dense[name] = array.reshape(K * F)
  return dense


def _extracted_moe(_: int, half: LayerOptions) -> MoeOptions:
  """The options of a stack's mixture of experts, made dense if routed by task.

  `with_moes` calls this with the index of the stack's first layer, which is not
  used, and with `half`, the options of the encoder's or decoder's layers.
  """
  moe = half.moe
  if not half.routes_by_task:
    return moe
  return MoeOptions(
    num_experts=0,
    num_selected=moe.num_selected,
    layers=moe.layers,
    extra_ffn=moe.extra_ffn,
    expert=moe.expert,
  )


def of_run(run: Loaded, task: str) -> Extracted:
  """The model of one task of a run, by the task's name.

  Raises:
    ValueError: The run has no such task or no router by task, or its experts
      cannot become a dense feed-forward.
  """
  tasks = run.options.data.tasks
  if run.options.model.routes_by_task and task not in tasks:
    raise unknown('task', task, tasks)
  number = tasks.index(task) if task in tasks else 0
  return extract(run.options.model, run.variables['params'], number)


def describe(run: Loaded, extracted: Extracted) -> str:
  """Lines on the experts kept, and on parameters and bytes before and after."""
  lines = []
  for layer in extracted.layers:
    moe = run.model.stacks.moe_of(layer)
    lines.append(
      f'layer {layer}: {moe.num_selected} of {moe.num_experts} experts kept, a '
      f'dense feed-forward of width {moe.twin().ffn.hidden}'
    )
  versions = run.variables['params'], extracted.params
  counts = [sum(x.size for x in jax.tree.leaves(params)) for params in versions]
  sizes = [bytes_in_memory(params) for params in versions]
  lines.append(
    f'{counts[0]:,} parameters of {sizes[0]:,} bytes became {counts[1]:,} of '
    f'{sizes[1]:,} ({sizes[0] / sizes[1]:.2f} times fewer bytes)'
  )
  return '\n'.join(lines)


def add(commands: Any) -> None:
  """Adds the command `extract` to the commands of a parser."""
  text = 'writes the part of a model with routers by task that one task uses'
  command = whole_run.command(commands, 'extract', _command, text, __doc__)
  text = 'name of the task, a source of data.mixture'
  command.add_argument('--task', required=True, help=text)


def _command(options: argparse.Namespace, _: list[str]) -> str:
  run = whole_run.read(
    options.folder, step=options.step, allow=options.allow_module
  )
  model = of_run(run, options.task)
  folder = whole_run.write(run, options.output, model.params, model.options)
  return f'{describe(run, model)}\n{folder} has the model of {options.task!r}'
