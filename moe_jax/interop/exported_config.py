"""The config.json of a model that is written for transformers.

An architecture of transformers is found that computes the same function as the
model. If there is none, the error says how the nearest architecture differs.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, cast

from moe_jax.errors import InputError
from moe_jax.interop.architecture import Architecture
from moe_jax.interop.checkpoint_folder import (
  ARCHITECTURES,
  UnsupportedError,
  architecture_of,
  from_config,
)
from moe_jax.interop.quirks import TransformersEncoderDecoder
from moe_jax.interop.tensor_files import problem_text
from moe_jax.models import ModelOptions
from moe_jax.models.meaning import difference

# Keys that are not carried over: keys of older versions of transformers, which
# newer keys replace, and the key of quantized tensors.
_REPLACED_KEYS = (
  'torch_dtype',
  'rope_theta',
  'rope_scaling',
  'partial_rotary_factor',
  'original_max_position_embeddings',
  'quantization_config',
)
# By option, the text of messages that names it and says what it decides.
_OPTION_TEXTS = {
  f'{half}sparse': f'{half}moe.layers, which layers are sparse'
  for half in ('', 'encoder.')
}
_HINT = (
  "'What can be exported' in moe_jax/interop/README.md has the flags of one "
  'that can be'
)


def choose(
  options: ModelOptions, config: Mapping[str, Any]
) -> tuple[Architecture, dict[str, Any]]:
  """The architecture of a model, and the content of its config.json.

  The architecture is the one that the config names, or else the first that
  computes the same function; architectures without a class in transformers come
  last.

  Raises:
    ValueError: No architecture computes the same function. The message lists
      how the architecture with the fewest differences differs, or, if none can
      be compared, what the first one lacks.
  """
  if config.get('model_type') is not None:
    architecture = architecture_of(config)
    return architecture, describe(options, architecture, config)
  errors = []
  for architecture in sorted(
    ARCHITECTURES.values(), key=lambda a: a.needs_code
  ):
    if architecture.suits(options):
      try:
        return architecture, describe(options, architecture, config)
      except InputError as error:
        count = getattr(error, 'num_differences', math.inf)
        errors.append((architecture.needs_code, count, error))
  raise InputError(f'{min(errors, key=lambda e: e[:2])[2]}\n{_HINT}')


class _DiffersError(InputError):
  """The nearest model of an architecture computes another function than ours.

  Attributes:
    num_differences: The number of options that differ. Options that ours lacks
      are not counted, since they follow from another choice that differs.
  """

  def __init__(
    self, model_type: str, differences: list[str], problems: list[str]
  ):
    absent = [line for line in differences if ': absent, not ' in line]
    self.num_differences = len(differences) - len(absent)
    headline = (
      f'transformers cannot compute this model as {model_type}; the model has'
    )
    super().__init__(problem_text(headline, [*differences, *problems]))


def describe(
  options: ModelOptions, architecture: Architecture, config: Mapping[str, Any]
) -> dict[str, Any]:
  """The content of config.json for a model as one of an architecture.

  Raises:
    ValueError: No model of the architecture computes the same function.
  """
  refusal = f'the model is no {architecture.model_type} model of transformers'
  counts = [moe.num_experts for moe in options.build().stacks.mixtures]
  if not counts:
    raise InputError(
      f'{refusal}: it is dense; {architecture.model_type} has experts'
    )
  if len(set(counts)) > 1:
    raise InputError(
      f'{refusal}: its sparse layers have {counts} experts, where transformers '
      'has one number for all; merge or prune with one number, --experts=N'
    )
  try:
    decided = architecture.describe(options)
  except InputError as error:
    raise InputError(f'{refusal}: {error}') from error
  config_json = _config_json(options, architecture, config, decided)
  theirs, problems = _read_back(config_json)
  if theirs is None:
    raise InputError(f'{refusal}: {"; ".join(problems)}')
  differences = _differences(options, theirs)
  if differences or problems:
    raise _DiffersError(architecture.model_type, differences, problems)
  return config_json


def _config_json(
  options: ModelOptions,
  architecture: Architecture,
  config: Mapping[str, Any],
  decided: Mapping[str, Any],
) -> dict[str, Any]:
  """The keys that a model decides, together with other keys of the config."""
  replaced_keys = {*_REPLACED_KEYS, *architecture.keys.spellings}
  # Keys that act only in training get values without an effect, since our
  # models do not have their effects.
  neutral_values = {
    name: decided[neutral] if isinstance(neutral, str) else neutral
    for name, (_, _, neutral, _) in architecture.keys.training.items()
    if neutral is not ...
  }
  other_keys = {key: v for key, v in config.items() if key not in replaced_keys}
  return {
    **neutral_values,
    **other_keys,
    **decided,
    'model_type': architecture.borrowed_type or architecture.model_type,
    'architectures': [architecture.classes[0]],
    'dtype': cast(Any, options).numerics.param_dtype,
  }


def _read_back(
  config_json: Mapping[str, Any],
) -> tuple[ModelOptions | None, list[str]]:
  """The options of a config.json, with defaults for unsupported values.

  Returns:
    The options, or None if config.json cannot be read with defaults either; and
    a text for each value that is not supported.
  """
  problems = []
  try:
    try:
      return from_config(config_json), []
    except UnsupportedError as error:
      problems = error.problems
      bad_keys = {problem.partition('=')[0] for problem in problems}
      kept = {k: v for k, v in config_json.items() if k not in bad_keys}
      return from_config(kept), problems
  except InputError as error:
    return None, problems or [str(error)]


def _differences(ours: ModelOptions, theirs: ModelOptions) -> list[str]:
  """A line for each option by which the models compute different functions."""
  if ours.has_encoder:
    ours = TransformersEncoderDecoder.of(cast(Any, ours))
    # config.json does not say if the encoder has a table; the tensors do.
    theirs = dataclasses.replace(theirs, encoder_table=ours.encoder_table)
    if not ours.build().stacks.capacity_binds:
      # If all tokens have slots, the slots that padding takes do not matter.
      theirs = dataclasses.replace(theirs, route_padding=ours.route_padding)
  pairs = difference(ours, theirs)
  # An option that their model lacks follows from another choice that differs,
  # which is listed instead.
  causes = {name: pair for name, pair in pairs.items() if pair[1] is not None}
  return [
    f'{_OPTION_TEXTS.get(name, name)}: '
    f'{"absent" if old is None else repr(old)}, not {new!r}'
    for name, (old, new) in (causes or pairs).items()
  ]
