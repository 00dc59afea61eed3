"""The keys of a checkpoint's config.json, each of which is used or refused.

Every architecture sorts the keys that its `config.json` may have by their
treatment; an unknown key is an error.
"""

import dataclasses
import types
from collections.abc import Collection, Mapping
from typing import Any

from moe_jax.config import unknown_text

_LARGEST = 3.4e38  # the largest number of float32
_INTEGERS = 2**31  # int32 is below this
# The limit is low, as layers are counted one by one before tensors are known.
_LAYERS = 2**16


@dataclasses.dataclass(frozen=True)
class Number:
  """The rule that a value in config.json is a number in a range, and not NaN.

  Attributes:
    rule: The rule in words, for messages.
    low: The lower bound of the range.
    below: The upper bound of the range, which is not allowed itself.
    whole: Whether only integers are allowed.
    above: Whether `low` itself is not allowed.
    optional: Whether null is allowed.
  """

  rule: str
  low: float = -_LARGEST
  below: float = _LARGEST
  whole: bool = False
  above: bool = False
  optional: bool = False

  def holds(self, value: Any) -> bool:
    """Whether a value of a JSON file obeys the rule."""
    if value is None:
      return self.optional
    number_types = int if self.whole else int | float
    if isinstance(value, bool) or not isinstance(value, number_types):
      return False
    is_above_low = self.low < value if self.above else self.low <= value
    return is_above_low and value < self.below


def _or_null(kind: Number) -> Number:
  return dataclasses.replace(kind, rule=f'{kind.rule}, or null', optional=True)


SIZE = Number('integer of at least 1 in int32', 1, _INTEGERS, whole=True)
OPTIONAL_SIZE = _or_null(SIZE)
# A length of texts, which need not be a dimension of any tensor.
LENGTH = Number('length of at least 1 in int32', 1, _INTEGERS, whole=True)
OPTIONAL_LENGTH = _or_null(LENGTH)
LAYERS = Number(f'integer in [1, {_LAYERS})', 1, _LAYERS, whole=True)
OPTIONAL_LAYERS = _or_null(LAYERS)
COUNT = Number('integer of at least 0 in int32', 0, _INTEGERS, whole=True)
OPTIONAL_COUNT = _or_null(COUNT)
FINITE = Number('finite number of float32')
AMOUNT = Number('finite number of at least 0', 0)
POSITIVE = Number('finite number above 0', 0, above=True)
OPTIONAL_POSITIVE = _or_null(POSITIVE)
RATE = Number('number in [0, 1)', 0, 1)


@dataclasses.dataclass(frozen=True)
class Keys:
  """The keys of config.json that an architecture has, sorted by treatment.

  Attributes:
    honoured: For each key that shapes the model, its type and transformers'
      default.
    training: For each key that acts only in training, its type, its default,
      its neutral value and a reason. The neutral value is the only one with
      which our models train in the same way, or the name of a key whose value
      it is, or `...` if our options can express every value. The reason, for
      messages, says why no other value is carried over.
    fixed: For each key of which only some values are supported, these values,
      the default first.
    ignored: The other keys, which change neither inference nor training.
    spellings: Other spellings of keys, each with the key that it stands for.
  """

  honoured: Mapping[str, tuple[Any, Any]]
  training: Mapping[str, tuple[Any, Any, Any, str]]
  fixed: Mapping[str, tuple[Any, ...]]
  ignored: Collection[str]
  spellings: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Values(types.SimpleNamespace):
  """The value, or default, of each honoured or training key as an attribute."""


def read(
  keys: Keys, config: Mapping[str, Any]
) -> tuple[Values, list[str], list[str]]:
  """Reads the values of an architecture's keys from a config.json.

  Args:
    keys: The keys of the architecture.
    config: The content of `config.json`.

  Returns:
    The values, in which defaults replace bad ones; a text for each problem; and
    a text for each value of a training key that our options cannot express.
  """
  values, notes = Values(), []
  problems = [
    f'{name}={config[name]!r:.80} differs from {key}={config[key]!r:.80}'
    for name, key in keys.spellings.items()
    if {name, key} <= config.keys() and config[name] != config[key]
  ]
  config = {keys.spellings.get(name, name): v for name, v in config.items()}
  known_keys = {*keys.honoured, *keys.training, *keys.fixed, *keys.ignored}
  for name in config:
    if name not in known_keys:
      message = unknown_text('key', name, known_keys)
      problems.append(message.split('have [')[0].rstrip('; '))
  for name, (kind, default, *_) in {**keys.honoured, **keys.training}.items():
    value = config.get(name, default)
    if not is_kind(value, kind):
      problems.append(f'{name}={value!r:.80} is no {kind_name(kind)}')
      value = default
    setattr(values, name, value)
  for name, supported in keys.fixed.items():
    value = config.get(name, supported[0])
    if value not in supported:
      choices = ' or '.join(map(repr, supported))
      problems.append(f'{name}={value!r} is not supported, only {choices}')
  for name, (_, _, neutral, reason) in keys.training.items():
    value = getattr(values, name)
    if isinstance(neutral, str):
      neutral = getattr(values, neutral)
    if neutral is not ... and value != neutral:
      notes.append(f'{name}={value!r} is not carried over: {reason}')
  return values, problems, notes


def bad_ids(config: Mapping[str, Any], vocab_size: int) -> list[str]:
  """A text for each key of config.json with a token id outside [0, V)."""
  rule = f'token id, an integer in [0, {vocab_size})'
  kind = Number(rule, 0, vocab_size, whole=True)
  return [
    f'{name}={value!r:.80} is no {rule}'
    for name, value in config.items()
    if name.endswith('_token_id') and value is not None
    for i in (value if isinstance(value, list) else [value])
    if not kind.holds(i)
  ]


def is_kind(value: Any, kind: Any) -> bool:
  """Whether a JSON value obeys `kind`, a `Number`, or is of `kind`, a type."""
  if isinstance(kind, Number):
    return kind.holds(value)
  if isinstance(value, bool):
    return kind is bool
  return isinstance(value, kind)


def kind_name(kind: Any) -> str:
  """The name, for messages, of a `Number` or of a Python type."""
  if isinstance(kind, Number):
    return kind.rule
  return getattr(kind, '__name__', str(kind))


# Keys that every architecture may have, with the only values that are
# supported.
COMMON_FIXED = {
  'per_layer_config': (None,),
  'quantization_config': (None,),
  'pruned_heads': (None, {}),
  'tie_encoder_decoder': (False,),
  'cross_attention_hidden_size': (None,),
  'add_cross_attention': (False,),
  'is_decoder': (False,),
}
# Keys on which the model does not depend, so that every value is allowed;
# generation reads the special ids among them.
_GENERATION = """
  bos_token_id eos_token_id decoder_start_token_id forced_bos_token_id
  forced_eos_token_id sep_token_id max_length min_length do_sample
  early_stopping num_beams temperature top_k top_p typical_p repetition_penalty
  length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
  num_return_sequences output_scores return_dict_in_generate
  remove_invalid_values exponential_decay_length_penalty suppress_tokens
  begin_suppress_tokens epsilon_cutoff eta_cutoff encoder_repetition_penalty
  num_assistant_tokens num_assistant_tokens_schedule
  assistant_confidence_threshold assistant_lookbehind target_lookbehind
  num_beam_groups diversity_penalty
"""
# Keys on which no number of the model depends.
_NO_NUMBER = """
  _commit_hash _name_or_path attn_implementation _attn_implementation
  _attn_implementation_autoset chunk_size_feed_forward experts_implementation
  gradient_checkpointing name_or_path output_attentions output_hidden_states
  output_past output_router_logits return_dict tie_last_hidden_states
  torchscript transformers_version use_bfloat16 use_cache
"""
# Keys of classification heads. A checkpoint with such a head names a class that
# is refused, so that the keys need no check.
_CLASSIFICATION = 'finetuning_task id2label label2id num_labels problem_type'
# Keys with which transformers 5.24 does nothing in a model.
_UNUSED = 'prefix task_specific_params tf_legacy_loss tokenizer_class'
# Keys that `read` ignores, as they have been read to choose the architecture or
# the dtype; `auto_map` names code of the repository, none of which is run.
_READ_BEFORE = 'model_type architectures auto_map dtype torch_dtype'
COMMON_IGNORED = (
  *_READ_BEFORE.split(),
  *_GENERATION.split(),
  *_NO_NUMBER.split(),
  *_CLASSIFICATION.split(),
  *_UNUSED.split(),
)
