"""Routed experts as inference servers return them, in and out of records.

    rollout = rollouts.read_vllm(prompt, answer, prompt_rows, answer_rows)
    record = rollouts.to_record(model, batch, [rollout])
    batch = replay.imposed(model, batch, record)

A server samples an answer, and says which experts its routers chose for each
token that it read. A reader for each server makes a `Rollout` of that, and
`to_record` the record of a batch, which `analysis.replay` imposes on training.
`from_record` and the writers go the other way.

A token without choices is left to the router of the training model: always the
last one, which no server has read; those before `start`; and those whose row
the caller, or vLLM for a cached prefix, filled with -1.
"""

import base64
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from moe_jax.analysis.traces import Record
from moe_jax.errors import InputError, writing
from moe_jax.models import Model
from moe_jax.models.recorded import LayerChoices
from moe_jax.routing.given_choice_rule import NO_CHOICE, OPEN


class Rollout(NamedTuple):
  """The tokens of one prompt and its answer, and their experts.

  Attributes:
    tokens: int32 [T], the token ids.
    expert: int32 [T, L, K], the chosen experts; `OPEN` in all K places where
      the server gave none. L counts all layers of the model, or those that have
      experts; experts of dense layers have no meaning.
  """

  tokens: np.ndarray
  expert: np.ndarray


def read_numpy(tokens: ArrayLike, rows: ArrayLike, start: int = 0) -> Rollout:
  """Reads plain rows of experts [N, L, K], one for each token from `start` on.

  That a vLLM of 0.32 returns base64 of a `.npy` file with such an array is
  inferred from the helper that its documentation has for arrays. Rows of
  several turns of a chat are concatenated first.

  Args:
    tokens: The T token ids of the prompt and the answer.
    rows: The experts; -1 in a whole row of K leaves it to the router.
    start: The number of tokens that have no row, such as those of earlier turns
      whose rows were not sent again.

  Raises:
    ValueError: The rows do not reach the last token, or the one before it.
  """
  tokens, rows = np.asarray(tokens, np.int32), np.asarray(rows)
  if rows.ndim != 3 or not np.issubdtype(rows.dtype, np.integer):
    raise InputError(
      f'routed experts of shape {rows.shape} and type {rows.dtype}; integers '
      '[tokens, layers, K] are needed; a server that has lost them sends null'
    )
  T, N = len(tokens), len(rows)
  if start < 0 or start + N not in (T - 1, T):
    raise InputError(
      f'{N} rows of experts from token {start} on, of {T} tokens; a row is '
      'needed for each token to the last, which may lack one; rows of '
      f'{NO_CHOICE} leave a token to the router'
    )
  expert = np.full((T, *rows.shape[1:]), OPEN, np.int32)
  expert[start : start + N] = rows
  expert[(expert == NO_CHOICE).all(-1)] = OPEN
  return Rollout(tokens, expert)


def read_sglang(
  model: Model, tokens: ArrayLike, text: str, start: int = 0
) -> Rollout:
  """Reads SGLang's `routed_experts`: base64 of int32 [T - 1 - start, L, K].

  Checked in sources of 2026 (0.5.11 and later) and in the text of PR #17434:
  the array is flat, L counts all layers of the model, K leaves out shared
  experts, and the last token has no row. That experts of dense layers are the
  zeros of a buffer is inferred; they are not read.

  Args:
    model: The model, whose numbers of layers and choices are the server's.
    tokens: The T token ids of the prompt and the answer.
    text: `meta_info['routed_experts']`, or of a choice of a completion.
    start: The request's `routed_experts_start_len`; a cached prefix needs none,
      as the server keeps its experts.

  Raises:
    ValueError: The text is no base64, or its length is not that of the tokens.
  """
  try:
    flat = np.frombuffer(base64.b64decode(text, validate=True), '<i4')
  except ValueError as error:
    raise InputError(f'routed_experts is no base64 of int32: {error}') from None
  L, K = model.stacks.num_layers, _num_selected(model)
  if flat.size % (L * K):
    raise InputError(f'{flat.size} experts are no rows of L={L} times K={K}')
  return read_numpy(tokens, flat.reshape(-1, L, K), start)


def read_vllm(
  prompt: ArrayLike, answer: ArrayLike, prompt_rows: ArrayLike, rows: ArrayLike
) -> Rollout:
  """Reads vLLM 0.21: int16 arrays or lists [tokens, L, K], in two parts.

  Checked in the documentation of 0.21.0: L counts layers with experts alone,
  and positions of a cached prefix are -1. That the last token of an answer has
  no row is inferred from readers of that version; if it has one, it is used.
  Before 0.21 (PR #28284, checked in source) an array of int32 was one for both,
  and counted all layers; `read_numpy` takes it.

  Args:
    prompt: The prompt's token ids.
    answer: The token ids of one completion.
    prompt_rows: The response's `prompt_routed_experts`.
    rows: The completion's `routed_experts`; None for an answer of one token.

  Raises:
    ValueError: A part has rows for other tokens than its own, or none.
  """
  first, N = np.asarray(prompt_rows), len(np.asarray(prompt))
  second = first[:0] if rows is None else np.asarray(rows)
  if first.ndim != 3 or len(first) != N or first.shape[1:] != second.shape[1:]:
    raise InputError(
      f'experts of shape {first.shape} for {N} tokens of a prompt, and '
      f'{second.shape} for its answer; [tokens, layers, K] are needed'
    )
  tokens = np.concatenate([np.asarray(prompt), np.asarray(answer)])
  return read_numpy(tokens, np.concatenate([first, second]))


def read_tunix(
  tokens: ArrayLike, mask: ArrayLike, experts: ArrayLike
) -> list[Rollout]:
  """Reads a padded batch of tunix: experts [B, L, T, K] of tokens [B, T].

  That order of dimensions is inferred from a note on tunix's sampler of 2026-08
  and not checked. Checked in the source of tpu-inference, PR #2343: its outputs
  are rows [tokens, L, K] of layers with experts, which `read_numpy` takes; so
  it does each row of tunix's training batches, [B, T, L, K] in its tests. What
  stands in the row of a last token is unknown, and left to the router.

  Args:
    tokens: The token ids, padded on any side.
    mask: Whether each token is real, [B, T].
    experts: The experts of all tokens; those of padding are ignored.

  Raises:
    ValueError: The experts are of other rows or tokens.
  """
  ids, real, experts = map(np.asarray, (tokens, mask, experts))
  if experts.ndim != 4 or experts.shape[::2] != ids.shape:
    raise InputError(
      f'experts of shape {experts.shape} for tokens of shape {ids.shape}; '
      '[batch, layers, length, K] is needed'
    )
  rows = experts.swapaxes(1, 2)
  places = [np.flatnonzero(of_row) for of_row in real]
  return [
    read_numpy(row_ids[at], of_row[at[:-1]])
    for row_ids, of_row, at in zip(ids, rows, places)
    if at.size
  ]


def to_record(
  model: Model, batch: Mapping[str, Any], rollouts: Sequence[Rollout]
) -> Record:
  """The record of a batch whose documents are rollouts, for `replay.imposed`.

  The documents of the batch, row by row, are the rollouts in their order, or
  beginnings of them, as inputs mostly lack the last token. Padding may stand
  anywhere. Gates are 0, as servers give none. Every choice is recorded as
  served; a model whose experts have a capacity drops those past it all the
  same, so that capacity 'all' goes with rollouts.

  Args:
    model: The model, whose tokens choose experts.
    batch: Arrays `tokens`, `segment_ids` and `positions`, [B, T].
    rollouts: A rollout for each document.

  Raises:
    ValueError: A document has other tokens than its rollout, the experts have
      other layers or another K than the model, or an expert does not exist or
      is chosen twice; the message names the row and the position.
  """
  tokens, documents, positions = (
    np.asarray(batch[key]) for key in ('tokens', 'segment_ids', 'positions')
  )
  K, places = _num_selected(model), [*_documents(documents)]
  if len(places) != len(rollouts):
    raise InputError(
      f'{len(rollouts)} rollouts for {len(places)} documents of the batch'
    )
  layers = model.stacks.sparse_layers
  expert = np.full((*tokens.shape, len(layers), K), NO_CHOICE, np.int32)
  for (row, at), rollout in zip(places, rollouts):
    _check_tokens(tokens, rollout.tokens, row, at)
    chosen = _of_sparse_layers(model, rollout, K)[: len(at)]
    _check_experts(model, chosen, row, at)
    expert[row, at] = chosen
  choices = {
    layer: LayerChoices(x, np.zeros(x.shape, np.float32), x >= 0)
    for layer, x in zip(layers, np.moveaxis(expert, 2, 0))
  }
  return Record('rollout', 0, 0, tokens, positions, documents, choices)


def from_record(
  model: Model, record: Record, tokens: Sequence[ArrayLike] | None = None
) -> list[Rollout]:
  """The rollouts of a record's documents, with experts of the sparse layers.

  Args:
    model: The model that made the record.
    record: The record.
    tokens: The token ids of each document, which may have more than the record
      at their end, such as the last one, which was not read. Default: those of
      the record.

  Raises:
    ValueError: A document has other tokens than those given for it, or a choice
      was dropped, which no server's format can say.
  """
  _num_selected(model)
  layers = record.layers.values()
  expert = np.stack([layer.expert for layer in layers], 2)
  kept = np.stack([layer.kept for layer in layers], 2) | (expert == OPEN)
  rollouts = []
  for i, (row, at) in enumerate(_documents(record.documents)):
    if not kept[row, at].all():
      n, layer, _ = np.argwhere(~kept[row, at])[0]
      raise InputError(
        f'row {row}, position {at[n]}, layer {[*record.layers][layer]}: a '
        'choice was not served, which a rollout cannot say'
      )
    ids = np.asarray(record.tokens[row, at] if tokens is None else tokens[i])
    _check_tokens(record.tokens, ids, row, at)
    of_all = np.full((len(ids), *expert.shape[2:]), OPEN, np.int32)
    of_all[: len(at)] = expert[row, at]
    rollouts.append(Rollout(ids.astype(np.int32), of_all))
  return rollouts


def write_sglang(model: Model, rollout: Rollout) -> str:
  """The text that `read_sglang` reads, from the first token on.

  Layers without experts have zeros; -1 stands for a token without choices.
  """
  own = _of_sparse_layers(model, rollout, _num_selected(model))
  T, _, K = own.shape
  expert = np.zeros((T - 1, model.stacks.num_layers, K), '<i4')
  expert[:, model.stacks.sparse_layers] = np.maximum(own[:-1], NO_CHOICE)
  return base64.b64encode(expert.tobytes()).decode('ascii')


def write_vllm(
  rollout: Rollout, prompt_length: int
) -> tuple[np.ndarray, np.ndarray]:
  """The two arrays of experts, int16, that `read_vllm` reads.

  -1 stands for a token without choices; the last one has no row.
  """
  expert = np.maximum(rollout.expert[:-1], NO_CHOICE).astype(np.int16)
  return expert[:prompt_length], expert[prompt_length:]


def write_tunix(
  rollouts: Sequence[Rollout],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The tokens, mask and experts that `read_tunix` reads, padded at the end."""
  shape = len(rollouts), max(len(ids) for ids, _ in rollouts)
  tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
  _, L, K = rollouts[0].expert.shape
  experts = np.full((*shape, L, K), NO_CHOICE, np.int32)
  for i, (ids, expert) in enumerate(rollouts):
    tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
    experts[i, : len(ids)] = np.maximum(expert, NO_CHOICE)
  return tokens, mask, experts.swapaxes(1, 2)


def check_new(path: str | pathlib.Path, model: Model) -> None:
  """Raises ValueError unless `save` may write a model's choices to a path."""
  _num_selected(model)
  if model.stacks.capacity_binds:
    raise InputError('experts can be full; a rollout cannot say what they drop')
  if pathlib.Path(path).expanduser().exists():
    raise InputError(f'{path} exists already; give a new file')


def save(path: str | pathlib.Path, rollouts: Sequence[Rollout]) -> None:
  """Writes rollouts as a NumPy file, with arrays for each row i.

  They are `tokens_i`, int32 [T], and `experts_i`, int32 [T - 1, L, K]: what
  `read_numpy` takes. `load` reads all of them.

  Raises:
    OSError: The file cannot be written.
  """
  arrays = {}
  for i, (tokens, expert) in enumerate(rollouts):
    arrays[f'tokens_{i}'] = tokens
    arrays[f'experts_{i}'] = np.maximum(expert[:-1], NO_CHOICE)
  path = pathlib.Path(path).expanduser()
  path.parent.mkdir(parents=True, exist_ok=True)
  with writing(path), path.open('wb') as file:
    np.savez(file, allow_pickle=False, **arrays)


def load(path: str | pathlib.Path) -> list[Rollout]:
  """Reads the rollouts of a file that `save` wrote."""
  with np.load(pathlib.Path(path).expanduser(), allow_pickle=False) as file:
    return [
      read_numpy(file[f'tokens_{i}'], file[f'experts_{i}'])
      for i in range(len(file.files) // 2)
    ]


def _documents(documents: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
  """Yields the row and the positions of each document, row by row."""
  for row, numbers in enumerate(documents):
    for number in dict.fromkeys(numbers[numbers > 0].tolist()):
      yield row, np.flatnonzero(numbers == number)


def _num_selected(model: Model) -> int:
  """K, which is the same in all sparse layers of a model that servers run.

  Raises ValueError if there is no such number.
  """
  mixtures = model.stacks.mixtures
  numbers = {moe.num_selected for moe in mixtures}
  if (
    model.has_encoder
    or len(numbers) != 1
    or any(moe.router.by_expert for moe in mixtures)
  ):
    raise InputError(
      'rollouts are of decoders whose tokens choose K experts, the same number '
      f'in all sparse layers; this {type(model).__name__} has K in {[*numbers]}'
    )
  return numbers.pop()


def _of_sparse_layers(model: Model, rollout: Rollout, K: int) -> np.ndarray:
  """The experts [T, L, K] of the model's sparse layers, without dense ones."""
  _, L, given = rollout.expert.shape
  num_layers, sparse = model.stacks.num_layers, model.stacks.sparse_layers
  if L not in (num_layers, len(sparse)) or given != K:
    raise InputError(
      f'experts of {L} layers and {given} choices; the model has {K} choices '
      f'in the layers {sparse} of {num_layers}'
    )
  return rollout.expert[:, sparse] if len(sparse) < L else rollout.expert


def _check_tokens(
  tokens: np.ndarray, ids: np.ndarray, row: int, at: np.ndarray
) -> None:
  """Raises ValueError unless a rollout begins with a document's tokens.

  Args:
    tokens: The tokens [B, T] of a batch.
    ids: The tokens of the rollout.
    row: The row of the document.
    at: The positions of its tokens in the row.
  """
  for n, own in enumerate(tokens[row, at]):
    there = ids[n] if n < len(ids) else 'the end of its rollout'
    if there != own:
      place = f'row {row}, position {at[n]}'
      raise InputError(f'{place}: token {own} here, {there} there')


def _check_experts(
  model: Model, expert: np.ndarray, row: int, at: np.ndarray
) -> None:
  """Raises ValueError unless a token has K different experts, or is open.

  Args:
    model: The model.
    expert: The experts [N, L, K] of the sparse layers.
    row: The row of the batch.
    at: The positions of the N tokens in the row.
  """
  sizes = np.array([moe.num_experts for moe in model.stacks.mixtures])
  in_range = (expert >= 0) & (expert < sizes[:, None])
  ordered = np.sort(expert, axis=-1)
  good = in_range.all(-1) & (np.diff(ordered, axis=-1) > 0).all(-1)
  good |= (expert == OPEN).all(-1)
  if not good.all():
    n, i = np.argwhere(~good)[0]
    layer = model.stacks.sparse_layers[i]
    raise InputError(
      f'row {row}, position {at[n]}, layer {layer}: experts '
      f'{expert[n, i].tolist()}; different ones in [0, {sizes[i]}) are needed'
    )
