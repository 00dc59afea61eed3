"""Every option of a config has a sentence, a rule, and an effect."""

import copy
import dataclasses
import math
from collections.abc import Iterator

import pytest

from moe_jax.config import (
  Check,
  Options,
  default_of,
  fields_of,
  leaves_of,
  read_options,
  section_of,
  spec_of,
  types_of,
)
from moe_jax.run_config import RunConfig

CONFIG = section_of(RunConfig)
LEAVES = {leaf.path: leaf for leaf in leaves_of(RunConfig, CONFIG)}


def classes_of(cls: type[Options], visited=None) -> Iterator[type[Options]]:
  """Every class of options that a config can hold."""
  visited = set() if visited is None else visited
  if cls in visited:
    return
  visited.add(cls)
  yield cls
  for field in fields_of(cls).values():
    spec, default = spec_of(field), default_of(field)
    nested = []
    if spec.kinds is not None:
      nested = spec.kinds.builtin.values()
    elif isinstance(default, Options):
      nested = [type(default)]
    for child in nested:
      yield from classes_of(child, visited)


CLASSES = list(classes_of(RunConfig))
each_class = pytest.mark.parametrize(
  'cls', CLASSES, ids=[cls.__name__ for cls in CLASSES]
)


@each_class
def test_every_option_has_a_whole_sentence(cls):
  for name, field in fields_of(cls).items():
    sentence = spec_of(field).sentence
    assert sentence, f'{cls.__name__}.{name} has no sentence'
    first, last = sentence[0], sentence[-1]
    assert first.isupper() or not first.isalpha(), f'{name}: {sentence}'
    assert last == '.', f'{cls.__name__}.{name}: {sentence}'
    assert len(sentence.split()) > 1, f'{cls.__name__}.{name}: {sentence}'


@each_class
def test_every_number_has_a_rule_or_says_why_not(cls):
  for name, hint in types_of(cls).items():
    field = fields_of(cls).get(name)
    if field is not None and hint in (int, float):
      assert spec_of(field).checks, f'{cls.__name__}.{name} has no check'


def other_values(value, checks: tuple[Check, ...]):
  """Allowed values of the same type, other than the given one."""
  if isinstance(value, bool):
    candidates = [not value]
  elif isinstance(value, int | float):
    step = [1, 2, 3, 0, -1, 0.5, 0.25, 1.5]
    candidates = [type(value)(number) for number in step]
  elif isinstance(value, str):
    names = [name for check in checks for name in check.names]
    candidates = names or ['other', 'data', 'tensor', 'every 3', 'bleu']
  elif isinstance(value, tuple):
    candidates = (
      [value[:1], value + value[-1:]] if value else [(2,), (('x', 1.0),)]
    )
  else:
    candidates = []
  return [
    other
    for other in candidates
    if other != value
    and not (isinstance(other, float) and not math.isfinite(other))
    and all(keeps(check, other) for check in checks)
  ]


def keeps(check: Check, value) -> bool:
  """Whether a value satisfies a rule; False if the rule cannot read it."""
  try:
    return check.problem('x', value) is None
  except (TypeError, ValueError):
    return False


def test_every_option_that_cannot_matter_is_refused_by_name():
  # Defaults leave most kinds unchosen and many conditions unmet.
  idle = {path: leaf for path, leaf in LEAVES.items() if leaf.idle is not None}
  assert len(idle) > 80
  values = {}
  for path, leaf in idle.items():
    if leaf.spec.kinds is not None:
      kinds = [kind for kind in leaf.spec.kinds.builtin if kind != leaf.value]
    elif leaf.default is dataclasses.MISSING:
      kinds = ['other']
    else:
      kinds = other_values(leaf.value, leaf.spec.checks)
    if kinds:
      values[path] = kinds[0]
  assert len(values) > 0.9 * len(idle)
  expected = [f'{p}={v!r}' for p, v in values.items()]
  assert sorted(refusals(values)) == sorted(expected)
  for path in [*values][::20]:
    assert refusals({path: values[path]}) == [f'{path}={values[path]!r}']


def refusals(values: dict) -> list[str]:
  """Pairs of option and value that are refused once options are set."""
  config = copy.deepcopy(CONFIG)
  config.update_from_flattened_dict(values)
  with pytest.raises(ValueError, match='has no effect') as error:
    read_options(RunConfig, config)
  return [text.partition(' has no ')[0] for text in error.value.problems]


@each_class
def test_what_neighbours_switch_off_is_refused_in_python_too(cls):
  for name, field in fields_of(cls).items():
    spec = spec_of(field)
    if not spec.when or spec.kinds is not None:
      continue
    values = other_values(default_of(field), spec.checks)
    if not values or idle_beside(cls, name) is None:
      continue
    neighbours = idle_beside(cls, name)
    with pytest.raises(ValueError, match=f'{name}=.*has no effect unless'):
      cls(**neighbours, **{name: values[0]})


def idle_beside(cls, name):
  """Values of other options with which an option has no effect, or None."""
  neighbours = {}
  for other, allowed in spec_of(fields_of(cls)[name]).when.items():
    field = fields_of(cls)[other]
    spec, value = spec_of(field), default_of(field)
    if spec.kinds is not None or isinstance(value, Options):
      return None
    for candidate in [value, *other_values(value, spec.checks)]:
      holds = (
        allowed.holds(candidate)
        if isinstance(allowed, Check)
        else candidate in allowed
      )
      if not holds:
        neighbours[other] = candidate
        break
    else:
      return None
  try:
    cls(**neighbours)
  except (TypeError, ValueError):  # these values cannot go together
    return None
  return neighbours
