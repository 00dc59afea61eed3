"""The choices of experts for text that a model has generated.

The model reads the prompt and the new tokens once more, in the same steps as
when it generated them, so that its choices are the same.
"""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.devices import fetch
from moe_jax.generation.prefix import (
  Ids,
  Prefix,
  Variables,
  begin_with,
  make_prefix,
  padded,
)
from moe_jax.models import Model
from moe_jax.models.recorded import Apply, LayerChoices
from moe_jax.shapes import Array, Bool, Int32

Batch = dict[str, np.ndarray]


def choices(
  model: Model,
  variables: Variables,
  prompt: Sequence[Ids],
  rows: Sequence[np.ndarray],
  apply: Apply,
  *,
  start_id: int | None = None,
  task_ids: Ids | None = None,
) -> tuple[Batch, Mapping[int, LayerChoices]]:
  """The tokens that a model read in a generation, and their choices of experts.

  The last new token of a row is left out, as the model has not read it.

  Args:
    model: The model, as `prefix.prepare` returns it.
    variables: The variables of the model.
    prompt: The token ids of each row's prompt.
    rows: The new tokens of each row, with those that the caller had forced.
    apply: A function like `models.recorded.recording`, which returns the
      choices of experts, too.
    start_id: The id that an encoder-decoder's decoder reads first.
    task_ids: The task of each row.

  Returns:
    A batch as in training: `tokens`, `positions`, `segment_ids` and, in a model
    that routes by task, `task_ids`; an encoder's names begin with 'encoder_'.
    And the choices of each sparse layer by its index.
  """
  N = max(map(len, rows))
  prefix = make_prefix(model, prompt, N, start_id, task_ids=task_ids)
  tokens, mask = padded(rows, N, front=False)
  read_tokens = np.concatenate([prefix.tokens, tokens[:, :-1]], 1)
  # The step that makes a row's new token reads the token before it.
  read_mask = np.concatenate([prefix.mask[:, :-1], mask], 1)
  choices_by_layer = fetch(
    _read(model, variables, prefix, read_tokens[:, -N:], mask, apply)
  )
  batch = _batch('', read_tokens, read_mask)
  if prefix.encoder_tokens is not None:
    batch |= _batch('encoder_', prefix.encoder_tokens, prefix.encoder_mask)
  if prefix.task_ids is not None:
    for key in model.stacks.sequences:
      shape = batch[f'{key}tokens'].shape
      tasks = np.broadcast_to(prefix.task_ids[:, None], shape)
      batch[f'{key}task_ids'] = tasks
  return batch, choices_by_layer


@functools.partial(jax.jit, static_argnames=('model', 'apply'))
def _read(
  model: Model,
  variables: Variables,
  prefix: Prefix,
  tokens: Int32[Array, 'B N'],
  mask: Bool[Array, 'B N'],
  apply: Apply,
) -> dict[int, LayerChoices]:
  """The choices of experts for a prefix and N tokens, by index of the layer.

  The N tokens begin with the last of the prefix's P tokens. The choices are
  arrays [B, P - 1 + N, ...] in a decoder's layers, and [B, S, ...] in those of
  an encoder, which reads S tokens. `mask` is False at padding.
  """
  slots = prefix.tokens.shape[1] - 1 + tokens.shape[1]
  cache, choices_by_call = begin_with(apply, model, variables, prefix, slots)

  def step(cache, token_and_mask):
    token, is_real = token_and_mask
    (_, cache), recorded = apply(
      model, variables, token[:, None], is_real[:, None], cache, method='decode'
    )
    return cache, jax.tree.map(lambda x: x[:, 0], recorded)

  steps = jax.lax.scan(step, cache, (tokens.T, mask.T))[1]
  choices_by_call.append(jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), steps))
  return {
    layer: jax.tree.map(
      lambda *pieces: jnp.concatenate(pieces, 1),
      *(call[layer] for call in choices_by_call if call and layer in call),
    )
    for layer in model.stacks.sparse_layers
  }


def _batch(key: str, tokens: np.ndarray, mask: np.ndarray) -> Batch:
  positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
  return {
    f'{key}tokens': np.where(mask, tokens, 0),
    f'{key}positions': np.where(mask, positions, 0),
    f'{key}segment_ids': mask.astype(np.int32),
  }
