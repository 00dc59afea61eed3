"""Options, their sections in a config, and layers of a config."""

import copy
import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import ml_collections
import pytest

from moe_jax import cli
from moe_jax.config import (
  Kinds,
  OptionError,
  Options,
  choice,
  entries,
  fields_of,
  flatten,
  keys_of,
  layered,
  merge,
  option,
  overridden,
  read_options,
  section_of,
  settle,
)
from moe_jax.run_config import RunConfig


@dataclasses.dataclass(frozen=True)
class Rule(Options):
  pass


@dataclasses.dataclass(frozen=True)
class Tokens(Rule):
  gates: str = option('raw', 'Kind of gates.', choices=('raw', 'even'))
  policy: str = option('all', 'Who is sent.', choices=('all', 'threshold'))
  threshold: float = option(0.2, 'Least gate.', above=0, maximum=1)


@dataclasses.dataclass(frozen=True)
class Hashed(Rule):
  table: str = option(sentence='Path of the table; it has no default.')
  seed: int = option(0, 'Seed of the table.', minimum=0)


@dataclasses.dataclass(frozen=True)
class OwnRule(Rule):
  alpha: float = option(0.5, 'Share of tokens.', above=0)


RULES = Kinds('rule', Rule, {'tokens': Tokens, 'hashed': Hashed})


@dataclasses.dataclass(frozen=True)
class Shape(Options):
  width: int = option(8, 'Width.', minimum=1)


@dataclasses.dataclass(frozen=True)
class Deep(Shape):
  depth: int = option(2, 'Depth.', minimum=1)


@dataclasses.dataclass(frozen=True)
class Broad(Shape):
  sizes: tuple[int, ...] = option((4, 5), 'Sizes.', minimum=1)


SHAPES = Kinds('shape', Shape, {'deep': Deep, 'broad': Broad}, inline=True)


@dataclasses.dataclass(frozen=True)
class Whole(Options):
  num_experts: int = option(8, 'Experts; 0: none.', minimum=0)
  limit: float = option(1.0, 'Limit.')
  rule: Rule = choice(RULES, 'tokens', 'The rule.')
  shape: Shape = choice(SHAPES, 'deep', 'The shape.')
  inner: Shape = option(Shape(width=3), 'Another shape.')
  extra: Mapping[str, Any] = option({}, 'Open keys.')
  more: Mapping[str, Shape] = entries(SHAPES, {'a': Deep(depth=7)}, 'Shapes.')

  def problems(self):
    if self.inner.width > 100:
      yield f'inner.width={self.inner.width} > 100'


def changed(**values):
  return merge(section_of(Whole), values)


def problems(config):
  with pytest.raises(OptionError) as error:
    read_options(Whole, config)
  return error.value.problems


def test_a_section_at_its_defaults_reads_as_the_defaults():
  assert read_options(Whole, section_of(Whole)) == Whole()


def test_a_section_holds_the_values_of_an_instance():
  whole = Whole(
    num_experts=3,
    rule=Hashed(seed=4, table='x'),
    shape=Broad(width=9, sizes=(1, 2, 3)),
    inner=Shape(5),
    extra={'moe': {'layers': 'all'}},
    more={'b': Broad(width=6)},
  )
  section = section_of(whole)
  assert section.rule.hashed.seed == 4
  assert section.shape.sizes == (1, 2, 3)
  assert section.more.b.kind == 'broad'
  assert read_options(Whole, section) == whole
  text = json.dumps(section.to_dict())  # which makes lists of tuples
  assert read_options(Whole, json.loads(text)) == whole


def test_all_problems_are_said_at_once_with_their_names():
  config = changed(
    limit=float('nan'),
    rule={'kind': 'hashd'},
    shape={'width': 0},
    inner={'width': -1},
  )
  messages = problems(config)
  assert len(messages) == 4
  assert 'limit=nan must be finite' in messages
  assert any("did you mean 'hashed'" in text for text in messages)
  assert 'shape.width=0 must be at least 1' in messages
  assert 'inner.width=-1 must be at least 1' in messages
  assert problems({'rule': 3}) == ('rule=3 is no section',)
  # A rule of several fields is said with their path.
  assert problems(changed(inner={'width': 101})) == ('inner.width=101 > 100',)


def test_all_problems_survive_a_process():
  with pytest.raises(OptionError) as error:
    Whole(num_experts=-1, limit=math.nan)
  copied = copy.copy(error.value)
  assert copied.problems == error.value.problems
  assert str(copied) == str(error.value)


def test_a_missing_value_is_named():
  config = changed(rule={'kind': 'hashed'})
  assert problems(config) == (
    'rule.hashed.table is missing: it has no default; give '
    '--config.rule.hashed.table=...',
  )


def test_merging_fills_open_sections_and_turns_integers_into_floats():
  config = changed(limit=2, extra={'any': {'thing': 1}}, more={})
  whole = read_options(Whole, config)
  assert whole.limit == 2.0
  assert whole.extra == {'any': {'thing': 1}}
  assert not section_of(Whole).extra


def test_options_of_a_users_kind_are_checked():
  kind = {'kind': f'{__name__}:OwnRule', 'custom': {'alpha': 1, 'beta': 1}}
  (message,) = problems(changed(rule=kind))
  assert 'rule.custom.beta' in message


@pytest.mark.parametrize(
  ('overrides', 'value', 'reason'),
  [
    ({'shape': {'sizes': (1,)}}, 'shape.sizes=(1,)', "shape.kind='deep'"),
    (
      {'rule': {'custom': {'alpha': 0.25}}},
      'rule.custom.alpha=0.25',
      "rule.kind='tokens'",
    ),
    (
      {'more': {'a': {'sizes': (6,)}}},
      'more.a.sizes=(6,)',
      "more.a.kind='deep'",
    ),
  ],
)
def test_what_is_set_in_a_section_that_is_not_chosen_is_refused(
  overrides, value, reason
):
  (problem,) = problems(changed(**overrides))
  assert problem == f'{value} has no effect with {reason}'


def test_a_later_layer_may_choose_another_kind():
  before = changed(rule={'tokens': {'gates': 'even'}}, shape={'depth': 3})
  flags = ['--config.rule.kind=hashed', '--config.rule.hashed.table=x']
  config = cli.config_of(before, flags)
  settled, ignored = settle(Whole, config, map_names(flags))
  assert ignored == {'rule.tokens.gates': 'even'}
  whole = read_options(Whole, settled)
  assert (whole.rule, whole.shape) == (Hashed(table='x'), Deep(depth=3))
  # What the later layer itself sets in vain is refused.
  flags.append('--config.rule.tokens.gates=even')
  settled, ignored = settle(Whole, config, map_names(flags))
  assert not ignored
  assert problems(settled) == (
    "rule.tokens.gates='even' has no effect with rule.kind='hashed'",
  )


def map_names(flags):
  return [cli.name_of(flag) for flag in flags]


def test_a_later_layer_may_choose_another_kind_of_an_entry():
  overrides = {'more': {'a': {'kind': 'broad'}}}
  config = layered(Whole, section_of(Whole), overrides)
  assert read_options(Whole, config).more == {'a': Broad()}
  overrides['more']['a']['depth'] = 9
  config = layered(Whole, section_of(Whole), overrides)
  assert problems(config) == (
    "more.a.depth=9 has no effect with more.a.kind='broad'",
  )
  overrides['more']['a'] = {'dept': 9}
  config = layered(Whole, section_of(Whole), overrides)
  assert "unknown config key 'more.a.dept'" in problems(config)[0]


def test_overrides_of_options_may_choose_another_kind():
  whole = Whole(rule=Tokens(gates='even'), shape=Deep(depth=3))
  rule = {'kind': 'hashed', 'hashed': {'table': 'x'}}
  changed_options = overridden(Whole, whole, {'rule': rule})
  assert changed_options == dataclasses.replace(whole, rule=Hashed(table='x'))
  shape = overridden(SHAPES, Deep(depth=3), {'kind': 'broad'}, 'shape.')
  assert shape == Broad()
  with pytest.raises(OptionError) as error:
    overridden(SHAPES, Deep(), {'sizes': (1,)}, 'shape.')
  assert error.value.problems == (
    "shape.sizes=(1,) has no effect with shape.kind='deep'",
  )


@pytest.mark.parametrize('copied', [merge, lambda *a: layered(Whole, *a)])
def test_a_changed_copy_is_locked_where_the_config_is(copied):
  config = section_of(Whole)
  merged = copied(config, {'extra': {'new': 1}, 'inner': {'width': 9}})
  for section in (merged, merged.rule, merged.rule.hashed, merged.inner):
    with pytest.raises(KeyError, match='locked'):
      section['knew'] = 1
  for section in (merged.extra, merged.more, merged.rule.custom):
    section['new'] = 1
  # The config keeps its values.
  assert config.inner.width == 3
  assert not config.extra and not config.rule.custom


def test_keys_have_their_values_defaults_and_sentences():
  config = changed(rule={'tokens': {'gates': 'even'}})
  keys = {key.path: key for key in keys_of(Whole, config)}
  gates = keys['rule.tokens.gates']
  assert (gates.value, gates.default) == ('even', 'raw')
  assert gates.option.sentence == 'Kind of gates.'
  assert gates.unchosen is None
  assert keys['rule.hashed.seed'].unchosen == "with rule.kind='tokens'"
  flat = {
    key
    for key in flatten(config)
    if not key.endswith('custom') and not key.startswith(('extra', 'more'))
  }
  assert flat <= keys.keys()


def example():
  nested = dict(
    depth=2, rate=0.5, name='a', on=False, inner=dict(x=1, pair=(1, 2))
  )
  return ml_collections.ConfigDict(dict(seed=0, model=nested, empty={})).lock()


def test_merge_changes_only_what_is_named():
  config = example()
  # JSON has no tuples.
  changes = {'model': {'depth': 3, 'rate': 1, 'inner': {'pair': [3]}}}
  merged = merge(config, ml_collections.ConfigDict(changes))
  expected = config.to_dict()
  expected['model'] |= {'depth': 3, 'rate': 1.0}
  expected['model']['inner']['pair'] = (3,)
  assert merged.to_dict() == expected
  assert isinstance(merged.model.rate, float)
  # The original config is unchanged.
  assert config.model.depth == 2
  assert config.model.inner.pair == (1, 2)


@pytest.mark.parametrize(
  ('override', 'message'),
  [
    (
      {'model': {'depht': 1}},
      r"unknown config key 'model\.depht'; did you mean 'model\.depth'",
    ),
    ({'model': 3}, 'model=3 replaces a section'),
    ({'model': {'depth': 1.5}}, r'model\.depth=1\.5 is a float'),
    ({'model': {'depth': True}}, r'model\.depth=True is a bool'),
    ({'seed': {'a': 1}}, 'is a dict'),
  ],
)
def test_overrides_that_do_not_fit_are_refused(override, message):
  with pytest.raises(ValueError, match=message):
    merge(example(), override)


def classes_of(cls: type[Options], visited: set) -> set[type[Options]]:
  """Every class of options that a config can hold."""
  if cls not in visited:
    visited.add(cls)
    for field in fields_of(cls).values():
      children = []
      if field.option.kinds is not None:
        children = field.option.kinds.builtin.values()
      elif isinstance(field.default, Options):
        children = [type(field.default)]
      for child in children:
        classes_of(child, visited)
  return visited


CLASSES = sorted(classes_of(RunConfig, set()), key=lambda cls: cls.__name__)
# Numbers of which all are allowed.
UNBOUNDED = {
  ('GenerateEvaluation', 'length_penalty'),
  ('LstmOptions', 'forget_bias'),
}


def test_every_number_has_a_bound():
  bounds = 'minimum', 'maximum', 'above', 'below'
  unbounded = {
    (cls.__name__, name)
    for cls in CLASSES
    for name, field in fields_of(cls).items()
    if field.type in (int, float)
    and all(getattr(field.option, bound) is None for bound in bounds)
  }
  assert unbounded == UNBOUNDED


def test_the_docstring_of_options_has_their_sentences():
  @dataclasses.dataclass(frozen=True)
  class Wide(Shape):
    """A wide shape."""

    height: int = option(1, 'Height.')

  assert Wide.__doc__ == (
    'A wide shape.\n\nOptions:\n  width: Width.\n  height: Height.'
  )
