"""What in a model's config its outputs depend on.

Two configs may differ in how they are computed, started or trained and still
be one function of the parameters. A field that nothing here names counts.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

# Fields by their own name: how, not what.
_HOW = frozenset(
  (
    'balance_choices',
    'dispatch',
    'dropout',
    'dtype',
    'grouped_matmul',
    'implementation',
    'init',
    'jitter',
    'param_dtype',
    'remat',
    'scan_layers',
    'second_policy',
    'second_threshold',
    'stacked',
  )
)
# Without effect where the field before the arrow has the value after it.
_IDLE = {
  ('relative_buckets', 0): ('relative_max_distance',),
  ('rotary', False): ('rope_theta',),
  ('rule', 'all'): ('factor', 'rounding', 'multiple', 'minimum', 'slots'),
  ('rule', 'fixed'): ('factor', 'rounding', 'multiple', 'minimum'),
  ('rule', 'fraction'): ('rounding', 'multiple', 'minimum', 'slots'),
  ('num_selected', 1): ('slot_priority',),
  ('kind', 'token_choice'): ('hash_of', 'seed'),
  ('kind', 'noisy_top_k'): ('hash_of', 'seed'),
  ('kind', 'expert_choice'): ('hash_of', 'seed'),
  ('kind', 'strictly_balanced'): ('hash_of', 'seed'),
  ('branching', 0): ('branches_selected',),
}
_POSITIONS = {'learned': 'max_len', 'sinusoidal': 'position_offset'}


def difference(old: Any, new: Any) -> list[str]:
  """How two models' configs differ in what they compute, a line a field."""
  old, new = dict(_meaning('', old)), dict(_meaning('', new))
  return [
    f'{name}: {old.get(name)!r}, not {new.get(name)!r}'
    for name in sorted(old.keys() | new.keys())
    if old.get(name) != new.get(name)
  ]


def _meaning(prefix: str, config: Any) -> Iterator[tuple[str, Any]]:
  """The fields that count, as ('stack.block.attention.window', 0)."""
  values = {
    field.name: getattr(config, field.name)
    for field in dataclasses.fields(config)
    if field.name not in _HOW
  }
  for name in _idle(values):
    values.pop(name, None)
  for name, value in values.items():
    if dataclasses.is_dataclass(value):
      yield from _meaning(f'{prefix}{name}.', value)
    else:
      yield f'{prefix}{name}', value


def _idle(values: dict[str, Any]) -> Iterator[str]:
  for (name, value), idle in _IDLE.items():
    if name in values and values[name] == value:
      yield from idle
  if 'positions' in values:
    used = _POSITIONS.get(values['positions'])
    yield from (n for n in _POSITIONS.values() if n != used)
  router = values.get('router')
  if router is not None and router.capacity.rule == 'all':
    # Nobody waits for a slot, so nobody stands in another's way.
    yield from ('group_size', 'route_padding')
    values['router'] = dataclasses.replace(router, slot_priority='token_major')
  block, sparse = values.get('block'), values.get('sparse')
  if block is not None:
    if all(sparse) and not block.extra_ffn and block.moe is not None:
      values['block'] = dataclasses.replace(block, ffn=block.moe.expert)
    elif not any(sparse):
      values['block'] = dataclasses.replace(block, moe=None, twin=None)
