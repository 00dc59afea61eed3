"""Overrides of a config, and errors that name the nearest key."""

import ml_collections
import pytest

from moe_jax.config import difference, flatten, merge, unknown
from moe_jax.configs import base


def example():
  nested = dict(
    depth=2, rate=0.5, name='a', on=False, inner=dict(x=1, pair=(1, 2))
  )
  return ml_collections.ConfigDict(dict(seed=0, model=nested, empty={})).lock()


def test_merge_changes_only_what_is_named():
  config = example()
  merged = merge(config, {'model': {'depth': 3, 'inner': {'pair': (3,)}}})
  expected = config.to_dict()
  expected['model']['depth'] = 3
  expected['model']['inner']['pair'] = (3,)
  assert merged.to_dict() == expected
  assert isinstance(merged.model.inner.pair, tuple)
  # The original config is unchanged.
  assert config.model.depth == 2
  assert config.model.inner.pair == (1, 2)


def test_merged_configs_are_locked_at_every_level():
  for merged in (merge(example(), {}), merge(example(), {'seed': 1})):
    for section in (merged, merged.model, merged.model.inner):
      assert section.is_locked
      with pytest.raises(AttributeError):
        section.typo = 1
  with pytest.raises(AttributeError):
    merge(example(), {'model': {'inner': {'x': 2}}}).model.inner.typo = 1


def test_merge_takes_config_dicts_and_widens_int_to_float():
  override = ml_collections.ConfigDict({'model': {'rate': 1}})
  rate = merge(example(), override).model.rate
  assert rate == 1.0
  assert isinstance(rate, float)
  # JSON has no tuples.
  pair = merge(example(), {'model': {'inner': {'pair': [3]}}})
  assert pair.model.inner.pair == (3,)


@pytest.mark.parametrize(
  ('override', 'message'),
  [
    ({'sed': 1}, "unknown config key 'sed'; did you mean 'seed'"),
    (
      {'model': {'depht': 1}},
      r"unknown config key 'model\.depht'; did you mean 'model\.depth'",
    ),
    ({'model': {'inner': {'y': 1}}}, r"have \['model\.inner\.pair', 'model"),
    ({'model.depth': 1}, r"unknown config key 'model\.depth'"),
    ({'model': 3}, 'model=3 replaces a section; give its keys'),
    ({'model': {'depth': 1.5}}, r'model\.depth=1\.5 is a float, its default 2'),
    ({'model': {'depth': '3'}}, r"model\.depth='3' is a str"),
    ({'model': {'depth': True}}, r'model\.depth=True is a bool'),
    ({'model': {'on': 1}}, r'model\.on=1 is a int, its default False'),
    ({'model': {'name': None}}, r'model\.name=None is a NoneType'),
    ({'seed': {'a': 1}}, 'is a dict'),
  ],
)
def test_overrides_that_do_not_fit_are_refused(override, message):
  with pytest.raises(ValueError, match=message):
    merge(example(), override)


def test_merge_into_the_defaults():
  config = merge(base.get_config(), {'model': {'moe': {'num_selected': 2}}})
  assert difference(base.get_config(), config) == {
    'model.moe.num_selected': (1, 2)
  }


def test_unknown_names_the_nearest_and_all():
  near = unknown('gates', 'row', ('raw', 'even'))
  assert str(near) == (
    "unknown gates 'row'; did you mean 'raw'? have ['even', 'raw']"
  )
  far = unknown('gates', 'zzz', {'raw': 1, 3: 2})
  assert str(far) == "unknown gates 'zzz'; have ['3', 'raw']"


def test_flatten_names_leaves_by_their_path():
  assert flatten(example()) == {
    'seed': 0,
    'model.depth': 2,
    'model.rate': 0.5,
    'model.name': 'a',
    'model.on': False,
    'model.inner.x': 1,
    'model.inner.pair': (1, 2),
  }


def test_difference_names_both_values_and_takes_lists_for_tuples():
  old = {'a': 1, 'b': {'c': (1, (2, 3)), 'd': 4}, 'gone': 5}
  # JSON returns lists for tuples.
  new = {'a': 2, 'b': {'c': [1, [2, 3]], 'd': 4}, 'here': {'x': 6}}
  assert difference(old, new) == {
    'a': (1, 2),
    'gone': (5, None),
    'here.x': (None, 6),
  }
