"""Options and config sections, with an example of each kind of field."""

import copy
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import pytest

from moe_jax import cli
from moe_jax.config import (
  Kinds,
  OptionError,
  Options,
  above,
  at_least,
  choice,
  each,
  entries,
  flatten,
  leaves_of,
  merge,
  nested,
  one_of,
  option,
  read_options,
  section_of,
  settle,
  within,
)
from moe_jax.run_config import RunConfig


@dataclasses.dataclass(frozen=True)
class Rule(Options):
  pass


@dataclasses.dataclass(frozen=True)
class Tokens(Rule):
  gates: str = option('raw', 'Kind of gates.', one_of('raw', 'even'))
  policy: str = option('all', 'Who is sent.', one_of('all', 'threshold'))
  threshold: float = option(
    0.2, 'Least gate.', within('(0, 1]'), when={'policy': ('threshold',)}
  )


@dataclasses.dataclass(frozen=True)
class Hashed(Rule):
  table: str = option(sentence='Path of the table; it has no default.')
  seed: int = option(0, 'Seed of the table.', at_least(0))


@dataclasses.dataclass(frozen=True)
class OwnRule(Rule):
  alpha: float = option(0.5, 'Share of tokens.', above(0))


RULES = Kinds('rule', Rule, {'tokens': Tokens, 'hashed': Hashed})


@dataclasses.dataclass(frozen=True)
class Shape(Options):
  width: int = option(8, 'Width.', at_least(1))


@dataclasses.dataclass(frozen=True)
class Deep(Shape):
  depth: int = option(2, 'Depth.', at_least(1))


@dataclasses.dataclass(frozen=True)
class Broad(Shape):
  sizes: tuple[int, ...] = option((4, 5), 'Sizes.', each(at_least(1)))


SHAPES = Kinds('shape', Shape, {'deep': Deep, 'broad': Broad}, inline=True)


@dataclasses.dataclass(frozen=True)
class Whole(Options):
  num_experts: int = option(8, 'Experts; 0: none.', at_least(0))
  limit: float = option(1.0, 'Limit.')
  rule: Rule = choice(
    RULES, 'tokens', 'The rule.', when={'num_experts': at_least(1)}
  )
  shape: Shape = choice(SHAPES, 'deep', 'The shape.')
  inner: Shape = nested(Shape(width=3), 'Another shape.')
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


def test_a_section_survives_json():
  whole = Whole(rule=Hashed(table='x'), shape=Broad())
  text = json.dumps(section_of(whole).to_dict())
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


def test_a_rule_of_several_fields_is_said_with_their_path():
  assert problems(changed(inner={'width': 101})) == ('inner.width=101 > 100',)


def test_a_missing_value_is_named():
  config = changed(rule={'kind': 'hashed'})
  assert problems(config) == (
    'rule.hashed.table is missing: it has no default; give '
    '--config.rule.hashed.table=...',
  )


def test_a_missing_value_of_an_entry_is_named():
  kinds = Kinds('rule', Rule, RULES.builtin, inline=True)

  @dataclasses.dataclass(frozen=True)
  class Several(Options):
    rules: Mapping[str, Rule] = entries(kinds, {}, 'Rules.')

  with pytest.raises(OptionError) as error:
    read_options(Several, {'rules': {'a': {'kind': 'hashed'}}})
  assert error.value.problems == (
    'rules.a.table is missing: it has no default; give '
    '--config.rules.a.table=...',
  )


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    ({'num_expert': 1}, "did you mean 'num_experts'"),
    ({'rule': {'tokens': {'gate': 'raw'}}}, 'rule.tokens.gates'),
    ({'num_experts': 2.0}, 'is a float'),
    ({'num_experts': True}, 'is a bool'),
    ({'rule': 'hashed'}, 'replaces a section'),
  ],
)
def test_merging_refuses_wrong_keys_and_types(overrides, message):
  with pytest.raises(ValueError, match=message):
    changed(**overrides)


def test_merging_fills_open_sections_and_turns_integers_into_floats():
  config = changed(limit=2, extra={'any': {'thing': 1}}, more={})
  whole = read_options(Whole, config)
  assert whole.limit == 2.0
  assert whole.extra == {'any': {'thing': 1}}
  assert not section_of(Whole).extra


@pytest.mark.parametrize('settled', [False, True])
def test_a_merged_copy_is_locked_where_the_config_is(settled):
  config = section_of(Whole)
  merged = merge(config, {'extra': {'new': 1}, 'inner': {'width': 9}})
  if settled:
    merged, _ = settle(Whole, config, merged)
  for section in (merged, merged.rule, merged.rule.hashed, merged.inner):
    with pytest.raises(KeyError, match='locked'):
      section['knew'] = 1
  for section in (merged.extra, merged.more, merged.rule.custom):
    section['new'] = 1
  # The config keeps its values.
  assert config.inner.width == 3
  assert not config.extra and not config.rule.custom


def test_unknown_keys_of_a_section_are_named_with_the_nearest():
  messages = problems({'inner': {'widht': 3}, 'rule': {'token': {}}})
  assert any("did you mean 'inner.width'" in text for text in messages)
  assert any("did you mean 'rule.tokens'" in text for text in messages)


def test_every_option_that_cannot_matter_is_refused_by_name():
  cases = {
    'rule.hashed.seed=1': changed(rule={'hashed': {'seed': 1}}),
    'rule.tokens.threshold=0.5': changed(rule={'tokens': {'threshold': 0.5}}),
    'shape.sizes=(1,)': changed(shape={'sizes': (1,)}),
    "rule.tokens.gates='even'": changed(
      num_experts=0, rule={'tokens': {'gates': 'even'}}
    ),
  }
  for name, config in cases.items():
    (text,) = problems(config)
    assert text.startswith(f'{name} has no effect'), text


def test_the_dataclass_refuses_what_cannot_matter_too():
  with pytest.raises(OptionError, match=r'threshold=0.5 has no effect'):
    Tokens(threshold=0.5)
  assert Tokens(policy='threshold', threshold=0.5).threshold == 0.5


def test_a_later_layer_switches_earlier_options_off():
  before = changed(rule={'tokens': {'gates': 'even'}}, shape={'depth': 3})
  after = copy.deepcopy(before)
  after.rule.kind = 'hashed'
  after.rule.hashed.table = 'x'
  config, ignored = settle(Whole, before, after)
  assert ignored == {'rule.tokens.gates': 'even'}
  assert read_options(Whole, config).rule == Hashed(table='x')
  after = merge(before, {'num_experts': 0})
  config, ignored = settle(Whole, before, after)
  assert ignored == {'rule.tokens.gates': 'even'}
  assert read_options(Whole, config).shape == Deep(depth=3)


def test_a_later_layer_chooses_another_kind_of_an_entry():
  before = section_of(Whole)
  after = merge(before, {'more': {'a': {'kind': 'broad'}}})
  config, ignored = settle(Whole, before, after)
  assert ignored == {'more.a.depth': 7}
  assert read_options(Whole, config).more == {'a': Broad()}
  # A key that the later layer itself sets in vain is refused by name.
  after = merge(after, {'more': {'a': {'depth': 9, 'sizes': (6,)}}})
  config, ignored = settle(Whole, before, after)
  assert not ignored
  assert problems(config) == (
    "more.a.depth=9 has no effect with more.a.kind='broad'",
  )
  after = merge(after, {'more': {'a': {'dept': 9}}})
  assert "unknown config key 'more.a.dept'" in problems(after)[0]


def test_a_later_layer_switches_nested_overrides_off():
  overrides = {'moe': {'num_selected': 1}}
  before = cli.load_config('moe_jax:tiny_seq2seq')
  before.model.encoder.overrides = overrides
  after = copy.deepcopy(before)
  after.model.kind = 'decoder'
  config, ignored = settle(RunConfig, before, after)
  assert ignored['model.encoder.overrides'] == overrides
  assert not config.model.encoder.overrides


def test_what_a_later_layer_sets_in_vain_is_refused():
  before = section_of(Whole)
  after = merge(
    before, {'num_experts': 0, 'rule': {'tokens': {'gates': 'even'}}}
  )
  config, ignored = settle(Whole, before, after)
  assert not ignored
  assert len(problems(config)) == 1


def test_a_users_kind_has_its_options_in_custom():
  name = f'{__name__}:OwnRule'
  config = changed(rule={'kind': name, 'custom': {'alpha': 0.25}})
  whole = read_options(Whole, config)
  assert type(whole.rule).__name__ == 'OwnRule'
  assert whole.rule.alpha == 0.25
  assert section_of(whole).rule.custom.alpha == 0.25
  messages = problems(
    changed(rule={'kind': name, 'custom': {'alpha': -1.0, 'beta': 1}})
  )
  assert any('rule.custom.alpha=-1.0' in text for text in messages) or any(
    'rule.custom.beta' in text for text in messages
  )
  messages = problems(changed(rule={'custom': {'alpha': 0.25}}))
  assert messages == (
    "rule.custom.alpha has no effect with rule.kind='tokens'",
  )


def test_descriptions_name_every_key_with_its_sentence():
  config = changed(rule={'tokens': {'gates': 'even'}})
  rows = {leaf.path: leaf for leaf in leaves_of(Whole, config)}
  assert rows['rule.tokens.gates'].value == 'even'
  assert rows['rule.tokens.gates'].default == 'raw'
  assert rows['rule.tokens.gates'].spec.sentence == 'Kind of gates.'
  flat = {
    key
    for key in flatten(config)
    if not key.endswith('custom') and not key.startswith(('extra', 'more'))
  }
  assert flat <= rows.keys()
