"""Makes prompts, lengths, special ids and tasks that fit a trained run."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_jax.config import unknown
from moe_jax.data import DataOptions, TaskOptions
from moe_jax.data.tokenizers import Extended, Tokenizer
from moe_jax.errors import InputError
from moe_jax.models import Model, decoding
from moe_jax.runs import workdir as workdir_lib
from moe_jax.shapes import Int


def is_imported(workdir: str | os.PathLike[str]) -> bool:
  """Whether a run's model began as a checkpoint of Hugging Face."""
  return (pathlib.Path(workdir).expanduser() / workdir_lib.IMPORTED).is_dir()


def encode(
  task: TaskOptions,
  tokenizer: Tokenizer,
  text: str,
  *,
  imported: bool = False,
  **arguments: Any,
) -> np.ndarray:
  """The ids of a prompt, int32 [N], in the form that the model was trained on.

  Only an imported model was trained on inputs with the special tokens that a
  tokenizer puts around inputs. A language model that was not imported was
  trained on documents, all other models on inputs that end as their task says.

  Args:
    task: The run's task.
    tokenizer: The run's tokenizer.
    text: The prompt.
    imported: Whether the model began as a checkpoint of Hugging Face.
    **arguments: Arguments of `Tokenizer.encode_inputs`; if any is given, inputs
      have the special tokens that the tokenizer adds.
  """
  if not task.makes_examples and not imported:
    return tokenizer.encode(text)
  if isinstance(tokenizer, Extended) and not imported and not arguments:
    return tokenizer.encode_inputs(text, added=False)
  return tokenizer.encode_inputs(text, **arguments)


def decode(tokenizer: Tokenizer, ids: Int[np.ndarray, ' N']) -> str:
  """The text of new tokens; ids that the tokenizer lacks are left out."""
  return tokenizer.decode(ids[ids < tokenizer.vocab_size])


def window(data: DataOptions, model: Model, *, imported: bool = False) -> int:
  """The argument `window` of `prepare` for texts longer than training rows.

  The window is as long as a training row; 0, for no window, in a model that
  adds positions to embedded tokens or is no decoder of blocks, and in an
  imported model, whose training rows have an unknown length.
  """
  return 0 if imported else decoding.window_beyond(model, data.seq_len)


def fit(
  model: Model, prompt: np.ndarray, num_tokens: int
) -> tuple[np.ndarray, int]:
  """A prompt and a number of new tokens for which learned positions suffice.

  New tokens have priority, but a prompt keeps as many of its last tokens as
  fill half of the positions. In an encoder-decoder, encoder and decoder each
  have all positions, and a prompt that is too long loses its end.
  """
  num_positions = decoding.longest(model)
  if num_positions is None:
    return prompt, num_tokens
  if model.has_encoder:
    return prompt[:num_positions], min(num_tokens, num_positions)
  prompt_len = max(num_positions // 2, num_positions - num_tokens + 1, 1)
  prompt = prompt[-prompt_len:]
  return prompt, min(num_tokens, num_positions - len(prompt) + 1)


def special_ids(model: Model, tokenizer: Tokenizer) -> dict[str, Any]:
  """The arguments of `generate` that a tokenizer decides.

  They are `stop_ids`, `pad_id` if there is such an id and, for an
  encoder-decoder, `start_id` and `forced_ids` if there are any.

  Raises:
    ValueError: The model is an encoder-decoder, and the tokenizer has no id
      with which a decoder starts.
  """
  ids: dict[str, Any] = {'stop_ids': tokenizer.eos_ids}
  if tokenizer.pad_id is not None:
    ids['pad_id'] = tokenizer.pad_id
  if model.has_encoder:
    if tokenizer.start_id is None:
      raise InputError(
        f'tokenizer {tokenizer.identity} has no id that starts a decoder'
      )
    ids['start_id'] = tokenizer.start_id
    if tokenizer.forced_bos_id is not None:
      ids['forced_ids'] = (tokenizer.forced_bos_id,)
  return ids


def task_ids(
  model: Model, data: DataOptions, names: Sequence[str], option: str
) -> list[int] | None:
  """The argument `task_ids` of `generate`, from names of tasks.

  Args:
    model: The model.
    data: The options of the run's data, which has the tasks.
    names: The name of the task of each row; '' where none is given.
    option: The option that gives the name, for messages.

  Returns:
    None where the model does not route by task.

  Raises:
    ValueError: The model routes by task, and a name is missing or unknown; or
      the model does not route by task, and a name is given.
  """
  if not model.stacks.task_sequences:
    if any(names):
      raise InputError(
        f'{option}={max(names)!r} has no effect: no router of the model goes '
        'by task'
      )
    return None
  for name in names:
    if not name:
      raise InputError(
        f'the model routes by task: give {option}, one of {list(data.tasks)}'
      )
    if name not in data.tasks:
      raise unknown(f'task {option}', name, data.tasks)
  return [data.tasks.index(name) for name in names]
