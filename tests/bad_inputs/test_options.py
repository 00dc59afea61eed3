"""Refusals that follow from how options are declared, made for all of them.

Told bad inputs that follow from no declaration are in `test_told.py`.
"""

import dataclasses
import math
from collections.abc import Mapping

import pytest

from moe_jax import run_config
from moe_jax.config import SEEDS, OptionError, fields_of, keys_of, section_of
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
FIELDS = [(cls, name) for cls in CLASSES for name in fields_of(cls)]
NUMBERS = [
  (cls, name)
  for cls, name in FIELDS
  if fields_of(cls)[name].type in (int, float)
]
BASE = section_of(RunConfig)
KEYS = keys_of(RunConfig, BASE)


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


@pytest.mark.parametrize('value', NEVER.values(), ids=NEVER)
def test_what_is_no_number_is_refused_by_name(value):
  accepted = [
    f'{cls.__name__}.{name}'
    for cls, name in NUMBERS
    for field in [fields_of(cls)[name]]
    if not refusal(cls, name, value)
    and not (
      value == 2**31 and (field.type is float or field.option.below == SEEDS)
    )
  ]
  assert len(NUMBERS) > 140
  assert not accepted


def outside(described, is_whole):
  """Numbers just beyond the bounds of an option, each with the bound."""
  step = 1 if is_whole else 1e-3
  for bound, sign in (('minimum', -1), ('maximum', 1)):
    if (limit := getattr(described, bound)) is not None:
      yield limit + sign * step, limit
  for limit in (described.above, described.below):
    if limit is not None and limit != SEEDS:
      yield limit, limit


def test_numbers_out_of_range_are_refused_by_the_rule():
  count = 0
  for cls, name in NUMBERS:
    field = fields_of(cls)[name]
    for value, limit in outside(field.option, field.type is int):
      message = refusal(cls, name, field.type(value))
      assert f'{limit:g}' in message, (cls, name, value, message)
      count += 1
  assert count > 150


def test_switches_texts_and_choices_take_their_own_alone():
  for cls, name in FIELDS:
    field = fields_of(cls)[name]
    if field.type is bool:
      for value in (0, 'x', None):
        assert 'not bool' in refusal(cls, name, value), (cls, name)
    elif field.type is str:
      assert 'not str' in refusal(cls, name, 3), (cls, name)
      if choices := field.option.choices:
        message = refusal(cls, name, 'no such')
        assert all(repr(known) in message for known in choices), message


@pytest.mark.parametrize('text', ['nan', 'inf', '-inf', '1e39'])
def test_flags_are_refused_by_their_dotted_names(text):
  paths = {key.path for key in KEYS if isinstance(key.value, float)}
  with pytest.raises(OptionError) as error:
    run_config.options_of(BASE, [f'--config.{path}={text}' for path in paths])
  rules = dict(problem.split('=', 1) for problem in error.value.problems)
  assert paths <= set(rules)
  assert all(
    'must be finite' in rule or 'infinite' in rule or 'no effect' in rule
    for rule in rules.values()
  )


def test_misspelled_keys_are_refused_with_the_nearest():
  paths = [
    key.path
    for key in KEYS
    if len(key.path.split('.')[-1]) > 4 and not isinstance(key.value, Mapping)
  ]
  wrong = {path: f'{path[:-2]}{path[-1]}{path[-2]}' for path in paths}
  wrong = {path: typo for path, typo in wrong.items() if typo != path}
  assert len(wrong) > 300
  with pytest.raises(OptionError) as error:
    run_config.options_of(
      BASE, [f'--config.{typo}=3' for typo in wrong.values()]
    )
  for path, typo in wrong.items():
    (problem,) = (
      text
      for text in error.value.problems
      if f'unknown config key {typo!r}' in text
    )
    assert f'did you mean {path!r}?' in problem


@pytest.mark.parametrize(
  'path', [key.path for key in KEYS if key.path.endswith('.kind')]
)
def test_an_unknown_kind_is_refused_with_those_that_exist(path):
  with pytest.raises(OptionError, match=f'{path}=.no_such.: unknown') as error:
    run_config.options_of(BASE, [f'--config.{path}=no_such'])
  assert 'have [' in str(error.value)


def test_what_is_set_for_a_kind_that_is_not_chosen_is_refused():
  keys = [k for k in KEYS if k.unchosen and type(k.value) in (int, float)]
  assert len(keys) > 60
  flags = [f'--config.{key.path}={key.value + 1}' for key in keys]
  with pytest.raises(OptionError) as error:
    run_config.options_of(BASE, flags)
  for key in keys:
    assert any(
      problem.startswith(f'{key.path}=') and 'no effect' in problem
      for problem in error.value.problems
    ), key.path
