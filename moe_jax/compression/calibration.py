"""Calibration: the tokens of some batches that reach the experts of a model.

Pruning and merging rank experts by statistics of these tokens, and GPTQ rounds
kernels for them. As inputs of kernels, special tokens do not count, as in QMoE
(https://arxiv.org/abs/2310.16795): their representations are large, and the
experts' outputs for them do not matter.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Float

from moe_jax import data
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.devices import fetch
from moe_jax.errors import InputError
from moe_jax.layers.experts import SCOPE, Gather
from moe_jax.layers.moe import in_groups
from moe_jax.models import Model
from moe_jax.models.expert_arrays import Arrays, SparseLayer, sparse_layers
from moe_jax.models.trees import unflatten
from moe_jax.routing import AnyRouting, Routing, even_choice
from moe_jax.shapes import Array, Leaf
from moe_jax.training.trained import Loaded

# The most tokens that an expert keeps, as a multiple of the experts' mean.
MOST_TOKENS = 4
# The number of rows (inputs) of experts is rounded up to a multiple of this
# number, so that few programs are compiled.
_ROWS_STEP = 64
_SOWN_NAME = 'reached'


class RoutedTokens(flax.struct.PyTreeNode):
  """The tokens that reach a sparse layer, and where its router sends them.

  Attributes:
    x: float [G, S, M], the inputs of the experts, in the dtype of products.
    routing: The routing of the G groups of S tokens.
  """

  x: Array
  routing: AnyRouting


def batches(
  run: Loaded, num_batches: int, options: data.DataOptions | None = None
) -> list[dict[str, Any]]:
  """Batches of the training split, as a run of seed 0 reads them at its start.

  Validation and test splits are not read, so that measures on them stay honest.

  Args:
    run: The run; the batches have its batch size.
    num_batches: The number of batches, at least 1.
    options: The options of the data; None takes those of the run.

  Raises:
    ValueError: `num_batches` is below 1, or the tokens or tasks of the data
      are not those that the run was trained on.
  """
  if num_batches < 1:
    raise InputError(f'num_batches={num_batches} must be at least 1')
  dataset = run.options.load_data(run.folder, options)
  stream = data.train_batches(
    dataset.splits['train'], batch_size=run.options.batch_size, seed=0, start=0
  )
  return [next(stream) for _ in range(num_batches)]


@functools.partial(jax.jit, static_argnames='model')
def capture(
  model: Model, variables: Mapping[str, Any], batch: Mapping[str, Leaf]
) -> dict[int, RoutedTokens]:
  """The tokens that reach each sparse layer of a model, by the layer's index.

  Dropout and noise are off.
  """

  def sow_tokens(call, args, kwargs, context):
    module = context.module
    if module.name == SCOPE and context.method_name == '__call__':
      tokens = RoutedTokens(*args[:2])
      module.sow('intermediates', _SOWN_NAME, tokens)
    return call(*args, **kwargs)

  with nn.intercept_methods(sow_tokens):
    _, collections = model.apply(
      variables, **model.inputs(batch), mutable=['intermediates']
    )
  layers = model.stacks.layer_trees(collections['intermediates'])
  return {
    i: layers[i]['moe'][SCOPE][_SOWN_NAME][0]
    for i in model.stacks.sparse_layers
  }


class Rows(NamedTuple):
  """The inputs of the kernels of some experts.

  Attributes:
    x: float [E, R, M], in each expert's R rows the inputs of its tokens, and
      then zeros.
    filled: bool [E, R], whether the row is that of a token.
  """

  x: Leaf
  filled: Leaf


def counted(
  batch: Mapping[str, np.ndarray], prefix: str, tokenizer: Tokenizer | None
) -> np.ndarray:
  """Whether each token of a sequence counts in calibration, bool [B, T].

  Padding and special tokens do not count, nor do tokens of a decoder whose next
  token is a sentinel, which stands for a masked span.

  Args:
    batch: A batch.
    prefix: The prefix of the sequence's keys in the batch, '' for a decoder's.
    tokenizer: The tokenizer of the batch; with None no token is special.
  """
  is_counted = np.asarray(batch[f'{prefix}segment_ids']) > 0
  if tokenizer is None:
    return is_counted
  t = tokenizer
  special = {*t.eos_ids, t.bos_id, t.pad_id, t.start_id, t.forced_bos_id}
  special = [*(special - {None}), *t.sentinel_ids]
  is_counted &= ~np.isin(batch[f'{prefix}tokens'], special)
  if not prefix and 'targets' in batch:
    is_counted &= ~np.isin(batch['targets'], t.sentinel_ids)
  return is_counted


class ExpertTokens:
  """The tokens that reach the experts of a layer, over all batches.

  Attributes:
    without_tokens: The indices of the experts that no counted token reaches.
    num_experts: E, the number of experts.
  """

  def __init__(
    self, batches: Sequence[RoutedTokens], masks: Sequence[np.ndarray]
  ):
    """Sorts the tokens that count by the experts that serve them.

    An expert keeps only its first tokens, if it serves more than `MOST_TOKENS`
    times as many as an expert does on average.

    Args:
      batches: The tokens of each batch with their routing.
      masks: For each batch, whether a token counts, bool [B, T].
    """
    M = batches[0].x.shape[-1]
    self._x = np.concatenate([np.asarray(b.x).reshape(-1, M) for b in batches])
    is_chosen = np.concatenate(
      [_chosen(b, mask) for b, mask in zip(batches, masks, strict=True)]
    )  # [N, E]
    max_tokens = -(-MOST_TOKENS * is_chosen.sum() // is_chosen.shape[1])
    self._tokens = [np.flatnonzero(x)[:max_tokens] for x in is_chosen.T]
    self.num_experts = len(self._tokens)
    self.without_tokens = [e for e, t in enumerate(self._tokens) if not t.size]
    longest = max(tokens.size for tokens in self._tokens)
    self._num_rows = max(-(-longest // _ROWS_STEP), 1) * _ROWS_STEP

  def rows(self, experts: slice) -> Rows:
    """The inputs of the kernels of a slice of the experts."""
    tokens = self._tokens[experts]
    shape = len(tokens), self._num_rows
    x = np.zeros((*shape, self._x.shape[1]), self._x.dtype)
    filled = np.zeros(shape, bool)
    for e, indices in enumerate(tokens):
      x[e, : indices.size] = self._x[indices]
      filled[e, : indices.size] = True
    return Rows(x, filled)


def _chosen(routed_tokens: RoutedTokens, mask: np.ndarray) -> np.ndarray:
  """Whether each token counts and is served by each expert, bool [N, E].

  The N tokens are those of all groups; `mask`, bool [B, T], says which count.
  """
  gates = np.asarray(routed_tokens.routing.token_gates())
  is_counted = np.asarray(in_groups(jnp.asarray(mask), gates.shape[1]))
  return ((gates != 0) & is_counted[..., None]).reshape(-1, gates.shape[-1])


class Usage(NamedTuple):
  """Sums over the calibration tokens that reach the experts of one layer.

  Attributes:
    tokens: The number of tokens that reach some expert.
    choices: float64 [E], the number of choices that each expert serves.
    gate: float64 [E], the sum of the gates of these choices.
    gated_norm: float64 [E], the sum of gate times norm of the expert's output,
      over the choices that the expert serves.
    output: float64 [E, M], the sum of each expert's outputs over all `tokens`,
      also over tokens that do not choose the expert.
  """

  tokens: Leaf
  choices: Leaf
  gate: Leaf
  gated_norm: Leaf
  output: Leaf

  @property
  def unused(self) -> list[int]:
    """The indices of the experts that no calibration token reaches."""
    return np.flatnonzero(self.choices == 0).tolist()

  @property
  def mean_output(self) -> Float[np.ndarray, 'E M']:
    """The mean output of each expert over the tokens of the layer."""
    return self.output / max(float(self.tokens), 1.0)


# The scores [E] by which experts are ranked; an unused expert has the score 0.
SCORES: Mapping[str, Callable[[Usage], np.ndarray]] = {
  # The share of choices that falls on each expert, as in M-SMoE.
  'usage': lambda usage: usage.choices / max(float(usage.choices.sum()), 1.0),
  # The mean gate over the tokens of the layer.
  'gate': lambda usage: usage.gate / max(float(usage.tokens), 1.0),
  # The mean of gate times norm of the expert's output over the tokens that it
  # serves, https://arxiv.org/abs/2510.13999.
  'reap': lambda usage: usage.gated_norm / np.maximum(usage.choices, 1.0),
}


def measure(
  model: Model,
  variables: Mapping[str, Any],
  batches: Iterable[Mapping[str, Leaf]],
) -> dict[int, Usage]:
  """The statistics of the experts of each sparse layer, by layer index.

  Args:
    model: A model of blocks, whose tokens choose experts.
    variables: The variables of the model.
    batches: Batches of calibration data.

  Raises:
    ValueError: Experts choose tokens, or there is no batch.
  """
  for layer in model.stacks.sparse_layers:
    if model.stacks.moe_of(layer).router.by_expert:
      raise InputError(
        f'the experts of layer {layer} choose tokens, so that all are used '
        'equally'
      )
  sums = [fetch(_measure(model, variables, batch)) for batch in batches]
  if not sums:
    raise InputError('there are no batches of calibration data')
  return jax.tree.map(lambda *x: np.sum(x, 0, np.float64), *sums)


@functools.partial(jax.jit, static_argnames='model')
def _measure(
  model: Model, variables: Mapping[str, Any], batch: Mapping[str, Leaf]
) -> dict[int, Usage]:
  tokens = capture(model, variables, batch)
  layers = sparse_layers(model, variables)
  return {
    number: _layer_usage(_expert_function(layer), layer.experts, tokens[number])
    for number, layer in layers.items()
  }


def _layer_usage(
  apply: Callable[[Arrays, Array], Array], experts: Arrays, tokens: RoutedTokens
) -> Usage:
  routing = cast(Routing, tokens.routing)
  is_kept = routing.kept.reshape(-1, routing.kept.shape[-1])  # [N, K]
  index = routing.expert_index.reshape(is_kept.shape)
  gate = routing.token_gates().reshape(len(is_kept), -1)  # [N, E]
  is_served = is_kept.any(-1)

  def sums_of(numbered_params):
    e, params = numbered_params
    y = apply(params, tokens.x).astype(jnp.float32).reshape(len(is_kept), -1)
    y = jnp.where(is_served[:, None], y, 0.0)
    return y.sum(0), (gate[:, e] * jnp.linalg.norm(y, axis=-1)).sum()

  E = routing.num_experts
  output, gated_norm = jax.lax.map(sums_of, (jnp.arange(E), experts))
  served = is_kept[..., None] & jax.nn.one_hot(index, E, dtype=bool)
  return Usage(
    tokens=is_served.sum(),
    choices=served.sum((0, 1)),
    gate=gate.sum(0),
    gated_norm=gated_norm,
    output=output,
  )


def _expert_function(layer: SparseLayer) -> Callable[[Arrays, Array], Array]:
  """The function from one expert's parameters, by path, and x to its outputs.

  x and the outputs are [G, S, M]; every token is served with a gate of 1.
  """
  module = layer.moe.expert.experts(Gather(), layer.shared)

  def apply_expert(params: Arrays, x: Float[Array, 'G S M']) -> Array:
    G, S, _ = x.shape
    index = jnp.zeros((G, S, 1), jnp.int32)
    to_one = even_choice(index, num_experts=1, capacity=S)
    tree = unflatten(
      {p[p.index(SCOPE) + 1 :]: array[None] for p, array in params.items()}
    )
    return module.apply({'params': tree}, x, to_one)[0]

  return apply_expert
