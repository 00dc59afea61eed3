"""A run's folder as something that generates: model, parameters, tokenizer.

Not here: the command line (`moe_jax.generate`).
"""

import os
import pathlib
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from jax.sharding import Mesh

from moe_jax import models
from moe_jax.config import merge
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.generation.prefix import longest
from moe_jax.models import EncoderDecoder, LstmLm, Model
from moe_jax.runs import workdir as workdir_lib
from moe_jax.shapes import Int

IMPORTED = 'huggingface'  # as `interop` names it


class Loaded(NamedTuple):
  """What a run's folder holds.

  Attributes:
    config: As the run had it, with the vocabulary's size filled in.
    model: Its model.
    variables: Its parameters, under 'params', and `router_state` if it has it.
    tokenizer: Its tokenizer.
    imported: Whether the model began elsewhere, as a Hugging Face checkpoint.
    step: Of the checkpoint.
    skipped: Newer checkpoints passed over, and why.
  """

  config: ml_collections.ConfigDict
  model: Model
  variables: dict[str, Any]
  tokenizer: Tokenizer
  imported: bool
  step: int
  skipped: list[tuple[int, str]]


def load(
  workdir: str | os.PathLike[str],
  step: int | None = None,
  *,
  dtype: str = '',
  mesh: Mesh | None = None,
) -> Loaded:
  """The model of a run, at its newest good checkpoint.

  Parameters are read, and what routers keep; each device reads its share.

  Args:
    workdir: The run's folder.
    step: The checkpoint; None: the newest good one.
    dtype: 'float32' or 'bfloat16', of parameters and products; '': the run's.
      Routers stay float32.
    mesh: Where the parameters go, by the run's own sharding table; None: the
      first local device.

  Raises:
    ValueError: Something is missing from the folder, or does not fit the rest.
    CheckpointError: No checkpoint is good.
  """
  config, tokenizer = workdir_lib.read(workdir)
  if dtype:
    types = {'dtype': dtype, 'param_dtype': dtype}
    config = merge(config, {'model': types})
  model = models.build(config)
  found = workdir_lib.restore_variables(
    workdir, model, config, mesh=mesh, step=step, cast=bool(dtype)
  )
  return Loaded(
    config=config,
    model=model,
    variables=found.state,
    tokenizer=tokenizer,
    imported=is_imported(workdir),
    step=found.step,
    skipped=found.skipped,
  )


def is_imported(workdir: str | os.PathLike[str]) -> bool:
  """Whether a run's model began as a Hugging Face checkpoint."""
  return (pathlib.Path(workdir).expanduser() / IMPORTED).is_dir()


def encode(
  config: ml_collections.ConfigDict,
  tokenizer: Tokenizer,
  text: str,
  *,
  imported: bool = False,
  **options: Any,
) -> np.ndarray:
  """The ids of a prompt, int32 [N], as the run's model was trained on them.

  A language model that began here was trained on documents, without the special
  tokens that a tokenizer puts around inputs; all others on inputs.

  Args:
    config: The run's.
    tokenizer: Its tokenizer.
    text: The prompt.
    imported: See `Loaded`.
    **options: Of `Tokenizer.encode_inputs`.
  """
  if config.data.get('task', 'lm') == 'lm' and not imported:
    return tokenizer.encode(text)
  return tokenizer.encode_inputs(text, **options)


def decode(tokenizer: Tokenizer, ids: Int[np.ndarray, ' N']) -> str:
  """The text of new tokens; ids that only the model has are none."""
  return tokenizer.decode(ids[ids < tokenizer.vocab_size])


def window(
  config: ml_collections.ConfigDict, model: Model, *, imported: bool = False
) -> int:
  """How far back a token looks when text outgrows the rows of training.

  Where positions are distances (or none at all), text may go on for ever: a
  token then sees as many as one at the end of a row did. 0: no bound, or none
  that would help; what a model saw that began elsewhere is not known here. An
  LSTM looks at its state alone, whatever the bound.
  """
  relative = model.config.embedding.positions in ('none', 'relative', 'rotary')
  others = isinstance(model, EncoderDecoder | LstmLm)
  if imported or others or not relative:
    return 0
  return config.data.seq_len


def fit(
  model: Model, prompt: np.ndarray, num_tokens: int
) -> tuple[np.ndarray, int]:
  """A prompt and a number of new tokens that learned positions have room for.

  New tokens go first; but a prompt keeps as many of its last tokens as fill
  half of the room. Of an encoder-decoder, each half has all of it.
  """
  room = longest(model)
  if room is None:
    return prompt, num_tokens
  if isinstance(model, EncoderDecoder):
    return prompt[:room], min(num_tokens, room)
  kept = max(room // 2, room - num_tokens + 1, 1)
  prompt = prompt[-kept:]
  return prompt, min(num_tokens, room - len(prompt) + 1)


def special_ids(model: Model, tokenizer: Tokenizer) -> dict[str, Any]:
  """The arguments of `generate` that a tokenizer decides.

  Raises:
    ValueError: The model is an encoder-decoder and the tokenizer has no id to
      start its decoder with.
  """
  found: dict[str, Any] = {'stop_ids': tokenizer.eos_ids}
  if tokenizer.pad_id is not None:
    found['pad_id'] = tokenizer.pad_id
  if isinstance(model, EncoderDecoder):
    if tokenizer.start_id is None:
      raise ValueError(
        f'tokenizer {tokenizer.identity} has no id that starts a decoder'
      )
    found['start_id'] = tokenizer.start_id
    if tokenizer.forced_bos_id is not None:
      found['forced_ids'] = (tokenizer.forced_bos_id,)
  return found
