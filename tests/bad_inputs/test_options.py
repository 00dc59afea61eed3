"""Every number of a config: NaN, infinity, other types, what zero means."""

import dataclasses
import functools
import math
import re

import numpy as np
import pytest

from moe_jax import run_config
from moe_jax.config import SEEDS, OptionError, fields_of, keys_of, section_of
from moe_jax.layers import MoeOptions
from moe_jax.run_config import RunConfig
from tests.test_config import CLASSES

# These values are no number of the field's type, or none that arrays can hold.
NEVER = {
  'NaN': math.nan,
  'infinity': math.inf,
  'minus infinity': -math.inf,
  'none': None,
  'boolean': True,
  'text': '1',
  'complex': 1j,
  'list': [1],
  'more than 32 bits': 2**31,
  'more than float32': 1e39,
}
NUMBERS = {
  (cls, name): field.type
  for cls in CLASSES
  for name, field in fields_of(cls).items()
  if field.type in (int, float)
}


def test_integers_of_numpy_become_pythons():
  options = MoeOptions(num_experts=np.int64(4), output_masking=np.int32(0))
  assert type(options.num_experts) is int
  assert type(options.output_masking) is float


def refusal(cls, name, value) -> str:
  """Returns the message for one value in Python; '' if it is accepted."""
  # Tests check the types of arguments, which users of Python do not have.
  options = object.__new__(cls)
  for field_name, field in fields_of(cls).items():
    default = field.default
    if default is dataclasses.MISSING:
      default = 'x' if field.type is str else 1
    object.__setattr__(
      options, field_name, value if field_name == name else default
    )
  try:
    options.__post_init__()
  except OptionError as error:
    return '\n'.join(p for p in error.problems if p.startswith(f'{name}='))
  return ''


def is_seed(cls, name) -> bool:
  return fields_of(cls)[name].option.below == SEEDS


def test_there_are_many_numbers():
  assert len(NUMBERS) > 140


@pytest.mark.parametrize('value', NEVER.values(), ids=NEVER)
def test_no_number_is_refused_by_name(value):
  accepted = [
    f'{cls.__name__}.{name}'
    for (cls, name), hint in NUMBERS.items()
    if not refusal(cls, name, value)
    and not (value == 2**31 and (hint is float or is_seed(cls, name)))
  ]
  assert not accepted


@pytest.mark.parametrize('name', [True, False, 'x', 7, None, b'x'])
def test_a_switch_takes_only_booleans(name):
  value = name
  for cls in CLASSES:
    for option, field in fields_of(cls).items():
      if field.type is bool:
        is_boolean = isinstance(value, bool)
        message = refusal(cls, option, value)
        assert is_boolean == ('not bool' not in message), (cls, option)


@pytest.mark.parametrize(
  ('value', 'pattern'),
  [(0, r'(?<![\d.])0(\.0)?(?![\d.]*\d)|zero'), (-1, r'-1|negative')],
  ids=['zero', 'minus one'],
)
def test_a_sentence_says_what_an_unusual_number_means(value, pattern):
  for cls, name in NUMBERS:
    sentence = fields_of(cls)[name].option.sentence
    if not sentence.startswith('Seed') and not refusal(cls, name, value):
      assert re.search(pattern, sentence), f'{cls.__name__}.{name}: {sentence}'


BASE = section_of(RunConfig)


@functools.cache
def problems_of_flags(text: str) -> tuple[str, ...]:
  """Returns the problems when every number of the defaults has this text."""
  flags = [f'--config.{path}={text}' for path in numbers_of_config()]
  with pytest.raises(OptionError) as error:
    run_config.options_of(BASE, flags)
  return error.value.problems


def numbers_of_config() -> list[str]:
  """Returns the dotted keys of numbers that may have a fraction."""
  return [
    key.path for key in keys_of(RunConfig, BASE) if isinstance(key.value, float)
  ]


@pytest.mark.parametrize('text', ['nan', 'inf', '-inf', '1e39', '-1e39'])
def test_flags_are_refused_by_their_dotted_names(text):
  refused = {problem.partition('=')[0] for problem in problems_of_flags(text)}
  assert set(numbers_of_config()) - refused == set()


@pytest.mark.parametrize('path', numbers_of_config())
def test_a_flag_says_the_rule(path):
  (problem,) = (
    text for text in problems_of_flags('nan') if text.startswith(f'{path}=')
  )
  assert re.search('must be finite|has no effect', problem)


@pytest.mark.parametrize(
  ('flag', 'rule'),
  [
    ('checkpoint.every_steps=-1', 'must be at least 0'),
    ('optimizer.b2=2.0', 'not in [0, 1)'),
    ('optimizer.b1=-1.0', 'not in [0, 1)'),
    ('optimizer.epsilon=-1e-8', 'must be above 0'),
    ('optimizer.epsilon=0.0', 'must be above 0'),
    ('optimizer.schedule.final_fraction=-1.0', 'not in [0, 1]'),
    ('optimizer.schedule.final_fraction=2.0', 'not in [0, 1]'),
    ('logits_z_weight=-1.0', 'must be at least 0'),
    ('model.dropout=nan', 'must be finite'),
    ('model.dropout=1.0', 'not in [0, 1)'),
    ('sample.temperature=nan', 'must be finite'),
    ('sample.temperature=-1.0', 'must be at least 0'),
    ('total_steps=0', 'must be at least 1'),
    ('total_steps=2147483648', 'integers of 32 bits'),
    ('seed=-1', 'not in [0, 4294967296)'),
    ('seed=4294967296', 'integers of 32 bits'),
    ('batch_size=-1', 'must be at least 1'),
    ('data.seq_len=0', 'must be at least 1'),
    ('model.moe.capacity.per_token.factor=0.0', 'must be above 0'),
    ('model.moe.num_selected=0', 'must be at least 1'),
    ('mesh.data=-2', 'must be at least'),
    ('model.moe.layers=every 0', 'every 0'),
    ('model.moe.layers=every -1', 'every -1'),
    ('model.moe.layers=9', '9'),
    ('model.moe.layers=', 'layers'),
    # Groups are counted in rows of no length.
    ('model.kind=encoder_decoder', 'data.target_len above 0'),
  ],
)
def test_values_out_of_range(flag, rule):
  with pytest.raises(ValueError) as error:
    run_config.options_of(BASE, [f'--config.{flag}'])
  path = flag.partition('=')[0]
  assert any(
    path.rpartition('.')[2] in line and rule in line
    for line in str(error.value).splitlines()
  ), str(error.value)


@pytest.mark.parametrize(
  ('path', 'nearest'),
  [
    ('model.widht', 'model.width'),
    ('optimizer.lr', None),
    ('optimizer.learning_rat', 'optimizer.learning_rate'),
    ('total_step', 'total_steps'),
    ('model.moe.router.token_choice.jiter', 'jitter'),
    ('data.seqlen', 'data.seq_len'),
    ('evals.train_capacity.perod', None),
    ('meshes', 'mesh'),
  ],
)
def test_a_misspelled_key_of_an_unlocked_config_is_refused(path, nearest):
  config = section_of(RunConfig).unlock()
  *parents, key = path.split('.')
  section = config
  for parent in parents:
    section = section[parent]
  section[key] = 3
  with pytest.raises(OptionError, match='unknown config key') as error:
    run_config.read(config)
  (problem,) = error.value.problems
  assert path in problem
  if nearest is not None:
    assert f"did you mean '{nearest}" in problem or nearest in problem
