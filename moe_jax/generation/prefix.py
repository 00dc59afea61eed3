"""Checks the arguments of generation, and reads prompts into a cache.

Rows of a decoder are padded at the front, so that all rows append at the same
slot of the cache; rows of an encoder are padded at the end. Lengths are rounded
up to a few values, so that not every prompt compiles a program of its own.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict, cast

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.devices import check_room
from moe_jax.errors import InputError
from moe_jax.models import Cache, Model, decoding
from moe_jax.models.recorded import Apply, Choices, plainly
from moe_jax.shapes import Array, Bool, Int32, Leaf, is_whole

Ids = Sequence[int] | np.ndarray
_MAX = np.iinfo(np.int32).max


def check_whole(
  name: str, value: int, low: int = -_MAX, high: int = _MAX
) -> None:
  """Raises ValueError unless a value is an integer in [low, high]."""
  if not is_whole(value):
    raise InputError(f'{name}={value!r} must be an integer')
  if value < low:
    raise InputError(f'{name}={value} must be at least {low}')
  if value > high:
    raise InputError(f'{name}={value} must be at most {high}')


def check_number(name: str, value: float) -> None:
  """Raises ValueError unless a value is a finite real number, not a boolean."""
  is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
  if not is_number or not math.isfinite(value):
    raise InputError(f'{name}={value!r} must be a finite number')


def _is_list(value: Any) -> bool:
  if hasattr(value, 'ndim'):
    return value.ndim > 0
  return hasattr(value, '__len__') and not isinstance(value, str | bytes)


def _as_ids(name: str, ids: Ids, count: int, noun: str = 'token') -> np.ndarray:
  """Checked ids, int64 [N]; N may be 0.

  Args:
    name: The name of the argument, for messages.
    ids: The ids.
    count: The number of possible ids, such as the size of a vocabulary.
    noun: The noun for messages, 'token' or 'task'.

  Raises:
    ValueError: The ids are not a list of integers in [0, count).
  """
  try:
    row = np.asarray(ids)
  except ValueError:  # lists of several lengths
    row = np.empty((0, 0))
  if row.ndim != 1 or (row.size and row.dtype.kind not in 'iu'):
    raise InputError(
      f'{name}={ids!r:.60} has shape {row.shape} and type {row.dtype}; it must '
      'be a list of ids, which are integers; a tokenizer makes them of text'
    )
  sizes = 'vocab_size' if noun == 'token' else 'num_tasks'
  bad_ids = row[(row < 0) | (row >= count)]
  if bad_ids.size:
    raise InputError(f'{name}: {noun} {bad_ids[0]} not in [0, {sizes}={count})')
  return row.astype(np.int64)


class Prefix(NamedTuple):
  """The tokens before the first token that the model chooses.

  Attributes:
    tokens: int32 [B, P], the P tokens that the decoder reads.
    mask: bool [B, P], False at padding, which is at the front; True at the last
      token.
    encoder_tokens: int32 [B, S], the S tokens that the encoder reads; None for
      a decoder-only model.
    encoder_mask: bool [B, S], False at padding, which is at the end.
    task_ids: int32 [B], the task of each row; None for a model that does not
      route by task.
  """

  tokens: Leaf
  mask: Leaf
  encoder_tokens: Leaf = None
  encoder_mask: Leaf = None
  task_ids: Leaf = None


def make_prefix(
  model: Model,
  prompt: Sequence[Ids] | Ids,
  num_tokens: int,
  start_id: int | None = None,
  forced_ids: Sequence[int] = (),
  task_ids: Ids | None = None,
) -> Prefix:
  """Checks prompts and pads them.

  Args:
    model: A model as `prepare` returns it.
    prompt: Token ids, one sequence for each row, or the ids of a single row.
    num_tokens: N, the number of new tokens, including `forced_ids`.
    start_id: The first id of the input of an encoder-decoder's decoder.
    forced_ids: The ids that every row emits first.
    task_ids: The task of each row.

  Raises:
    ValueError: There is no prompt; a prompt is empty or has an unknown id; the
      start id or a task is missing or has no use; N leaves nothing to choose;
      there are not enough learned positions; or a row crosses a position at
      which rotary positions change their angles.
  """
  V = model.vocab_size
  given, rows = _rows_of(prompt), []
  for i, ids in enumerate(given):
    rows.append(_as_ids(f'prompt {i} of {len(given)}', ids, V))
    if not len(rows[i]):
      raise InputError(
        f'prompt {i} of {len(given)} has shape (0,); each needs at least one '
        'token, in one dimension'
      )
  tasks = _tasks(model, task_ids, len(rows))
  check_whole('num_tokens', num_tokens, 0)
  forced = _as_ids('forced_ids', forced_ids, V)
  if start_id is not None:
    check_whole('start_id', start_id, 0, V - 1)
  if num_tokens <= len(forced):
    raise InputError(
      f'num_tokens={num_tokens} leaves none to choose after '
      f'{len(forced)} forced_ids'
    )
  B, steps = len(rows), num_tokens - len(forced)
  check_room([(f'num_tokens={num_tokens} of {B} rows', 4 * B * num_tokens)])
  if model.has_encoder:
    if start_id is None:
      raise InputError('an encoder-decoder needs a start_id')
    longest = max(map(len, rows))
    _check_length(model, 'prompt', longest)
    _check_length(model, 'output', num_tokens)
    decoding.check_change(model, [(0, num_tokens)])
    starts = [np.array([start_id, *forced])] * B
    return Prefix(
      *padded(starts, 1 + len(forced), front=True),
      *padded(rows, _padded_length(model, longest), front=False),
      task_ids=tasks,
    )
  if start_id is not None:
    raise InputError(
      f'start_id={start_id} for a decoder-only model, which begins with its '
      'prompt'
    )
  rows = [np.append(row, forced) for row in rows]
  longest = max(map(len, rows))
  _check_length(model, 'prompt', longest + steps - 1)
  # All tokens of a prompt but the last are read at once; the last is read in
  # the first step.
  read = [(len(row) - 1, len(row) + steps - 1) for row in rows]
  decoding.check_change(model, read)
  length = _padded_length(model, longest - 1) + 1
  slots = length + steps
  cache = jax.eval_shape(lambda: model.make_cache(B, slots))
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
  check_room([(f'the cache of {B} rows of {slots} tokens', size)])
  return Prefix(*padded(rows, length, front=True), task_ids=tasks)


def _rows_of(prompt: Sequence[Ids] | Ids) -> Sequence[Ids] | np.ndarray:
  """The token ids of each row of a prompt, which may be the ids of one row.

  Raises:
    ValueError: The prompt has no rows.
  """
  if not _is_list(prompt):
    raise InputError(
      f'prompt={prompt!r:.60} must be token ids; a tokenizer makes them of text'
    )
  if not len(prompt):
    raise InputError('prompt has no rows; give at least one')
  return cast(Any, prompt if _is_list(prompt[0]) else [prompt])


def _tasks(
  model: Model, task_ids: Ids | None, count: int
) -> Int32[np.ndarray, ' B'] | None:
  """The checked task of each of `count` rows; None without routing by task.

  Tasks that are missing, unknown or of no use raise a ValueError.
  """
  if not model.stacks.task_sequences:
    if task_ids is not None:
      raise InputError(
        f'task_ids={task_ids!r:.60} for a model without a router by task'
      )
    return None
  if task_ids is None:
    raise InputError(
      f'the model routes by {model.stacks.num_tasks} tasks; give task_ids, the '
      'task of each row'
    )
  tasks = _as_ids('task_ids', task_ids, model.stacks.num_tasks, 'task')
  if len(tasks) != count:
    raise InputError(f'{len(tasks)} task_ids for {count} rows of the prompt')
  return tasks.astype(np.int32)


def _check_length(model: Model, noun: str, num_positions: int) -> None:
  longest = decoding.longest(model)
  if longest is not None and num_positions > longest:
    raise InputError(
      f'{noun} of {num_positions} positions (new tokens included) > '
      f'max_len={longest} of the learned positions'
    )


def _padded_length(model: Model, num_tokens: int) -> int:
  """The length to which rows of at most `num_tokens` tokens are padded.

  The length is rounded up, unless capacity binds, since more padding may then
  change results. If learned positions suffice, an encoder's length becomes a
  multiple of the group sizes of its layers, so that all groups are whole: only
  layers whose experts choose or mix tokens have groups in generation.
  """
  longest, length, stacks = decoding.longest(model), num_tokens, model.stacks
  longest = longest or _MAX
  if not stacks.capacity_binds:
    length = max(min(round_up(num_tokens), longest), num_tokens)
  moes = [m for i, m in enumerate(stacks.moes) if stacks.sequence_of(i)]
  group = math.lcm(*(m.group_size for m in moes if m and m.group_size > 0))
  whole = -(-length // group) * group
  return whole if whole <= longest else length


def round_up(length: int) -> int:
  """Rounds up to a multiple of 8; above 64, to one of 4 per power of two."""
  step = max(8, 2 ** max((length - 1).bit_length() - 3, 0))
  return -(-length // step) * step


def padded(
  rows: Sequence[np.ndarray], length: int, *, front: bool
) -> tuple[Int32[np.ndarray, 'B P'], Bool[np.ndarray, 'B P']]:
  """Rows padded with 0 to `length` P, and a mask that is False at padding.

  Padding is before a row if `front`, or else behind it.
  """
  tokens = np.zeros((len(rows), length), np.int32)
  mask = np.zeros(tokens.shape, bool)
  for i, row in enumerate(rows):
    columns = slice(length - len(row), None) if front else slice(len(row))
    tokens[i, columns], mask[i, columns] = row, True
  return tokens, mask


Variables = dict[str, Any]


def prepare(
  model: Model, variables: Variables, *, batch_size: int = 1, window: int = 0
) -> tuple[Model, Variables]:
  """Prepares a model and its variables for generation, unless already prepared.

  `generate` prepares a model if it is not prepared, which copies the
  parameters. To generate several times, prepare the model once and drop the
  original variables. The prepared model drops no tokens, unless an imported
  checkpoint has a capacity of its own.

  Args:
    model: The model as trained or imported; a prepared model is returned as it
      is.
    variables: The model's parameters, under 'params', and `router_state` if the
      model has such a state.
    batch_size: The number of rows, or beams, that will be generated together;
      on a CPU the fastest layout of parameters depends on it.
    window: The number of tokens, itself included, to which a token of the
      decoder attends, for texts longer than rows of training; 0 leaves the
      number to the model.

  Raises:
    ValueError: An argument has a wrong type, or the model does not generate.
  """
  if not isinstance(model, Model):
    raise InputError(
      f'model is a {type(model).__name__}; it must be a moe_jax.models.Model, '
      'as the options of a model build it'
    )
  if 'params' not in getattr(variables, 'keys', list)():
    names = sorted(variables) if isinstance(variables, dict) else variables
    raise InputError(
      f"variables have no 'params', the parameters of the model; have "
      f'{str(names)[:80]}'
    )
  check_whole('batch_size', batch_size, 1)
  check_whole('window', window, 0)
  decoding.check_generates(model)
  return model.for_decoding(variables, batch_size=batch_size, window=window)


class Ends(TypedDict, total=False):
  """The arguments that `generate` and `beam_search` have in common.

  Attributes:
    num_tokens: N, the number of new tokens at which every row ends; 64 if it is
      not given. Each N compiles a program of its own.
    start_id: The first id of the input of an encoder-decoder's decoder.
    forced_ids: The ids that every row emits first, such as that of a target
      language, whatever their probabilities.
    stop_ids: The ids each of which ends a row.
    pad_id: The id that fills up a row after its end; 0 if it is not given.
    task_ids: The task of each row, for a model that routes by task.
  """

  num_tokens: int
  start_id: int | None
  forced_ids: Sequence[int]
  stop_ids: Sequence[int]
  pad_id: int
  task_ids: Ids | None


class Start(NamedTuple):
  """The checked arguments of a generation, and the cache of its prompts.

  Attributes:
    model: The prepared model.
    variables: The variables of the model.
    cache: The cache of the prefix without each row's last token.
    last: int32 [B], the last token of each row's prefix.
    tokens: int32 [B, N], the forced tokens, and the id of padding elsewhere.
    num_forced: The number of forced tokens.
    stop_ids: int32 [n], the ids each of which ends a row.
    pad_id: The id that fills up a row after its end.
  """

  model: Model
  variables: Variables
  cache: Cache
  last: Int32[np.ndarray, ' B']
  tokens: Int32[np.ndarray, 'B N']
  num_forced: int
  stop_ids: Int32[Array, ' n']
  pad_id: int


def start(
  model: Model,
  variables: Variables,
  prompt: Sequence[Ids] | Ids,
  num_beams: int = 1,
  *,
  num_tokens: int = 64,
  start_id: int | None = None,
  forced_ids: Sequence[int] = (),
  stop_ids: Sequence[int] = (),
  pad_id: int = 0,
  task_ids: Ids | None = None,
) -> Start:
  """Checks the arguments of a generation, and reads its prompts.

  Args:
    model: The model as trained or imported, or as `prepare` returns it.
    variables: The variables of the model.
    prompt: Token ids, one sequence for each row, or the ids of a single row.
    num_beams: The number of beams of each row.
    num_tokens: This and all further arguments are those of `Ends`.

  Raises:
    ValueError: `prepare` or `make_prefix` refuses an argument, or a stop id is
      not in the vocabulary.
  """
  batch_size = num_beams * len(_rows_of(prompt))
  model, variables = prepare(model, variables, batch_size=batch_size)
  _as_ids('stop_ids', stop_ids, model.vocab_size)
  check_whole('pad_id', pad_id)
  prefix = make_prefix(
    model, prompt, num_tokens, start_id, forced_ids, task_ids
  )
  (B, P), n = prefix.tokens.shape, len(forced_ids)
  tokens = np.full((B, num_tokens), pad_id, np.int32)
  tokens[:, :n] = forced_ids
  slots = P - 1 + num_tokens - n
  cache, _ = _read_prefix(plainly, model, variables, prefix, slots)
  last, stops = prefix.tokens[:, -1], jnp.asarray(stop_ids, jnp.int32)
  return Start(model, variables, cache, last, tokens, n, stops, pad_id)


def begin_with(
  apply: Apply,
  model: Model,
  variables: Variables,
  prefix: Prefix,
  num_slots: int,
) -> tuple[Cache, list[Choices]]:
  """The cache of a prefix without each row's last token, and expert choices.

  Args:
    apply: `models.recorded.plainly`, or a function like `recorded.recording`,
      which also returns the choices of experts.
    model: A model as `prepare` returns it.
    variables: The variables of the model.
    prefix: The prefix, of P tokens in each row.
    num_slots: The number of slots of the cache: P - 1, and one for each step.

  Returns:
    The cache, and the choices of experts in each call of the model.
  """
  B, P = prefix.tokens.shape
  choices = []
  if prefix.encoder_tokens is None:
    cache = model.make_cache(B, num_slots)
    if prefix.task_ids is not None:
      cache = cache.replace(task_ids=prefix.task_ids)
    pieces = [slice(0, P - 1)] if P > 1 else []
  else:
    inputs = prefix.encoder_tokens, prefix.encoder_mask, num_slots
    cache, recorded = apply(
      model, variables, *inputs, task_ids=prefix.task_ids, method='encode'
    )
    choices.append(recorded)
    # The start token and each forced token are read in a step of their own, as
    # if the model had chosen them, since tokens that are read in one step
    # compete for slots if capacity binds.
    pieces = [slice(i, i + 1) for i in range(P - 1)]
  for piece in pieces:
    tokens, mask = prefix.tokens[:, piece], prefix.mask[:, piece]
    (_, cache), recorded = apply(
      model, variables, tokens, mask, cache, method='decode'
    )
    choices.append(recorded)
  return cache, choices


_read_prefix = jax.jit(
  begin_with, static_argnames=('apply', 'model', 'num_slots')
)
